//! Messages as templates expect them, from the forms that people have.

use super::ChatTemplate;
use crate::json::{Json, Object};

/// What a chat template renders.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Conversation {
    /// Each with `role`, without fields that are null.
    pub(crate) messages: Vec<Object>,
    /// Function schemas; never an empty list, which some templates take for tools.
    pub(crate) tools: Option<Vec<Json>>,
    /// Further variables of the template, such as `enable_thinking`.
    pub(crate) variables: Object,
}

/// A field of an example that is not what it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Invalid {
    pub(crate) field: &'static str,
    /// What is wrong: value and rule.
    pub(crate) message: String,
}

type Result<T> = std::result::Result<T, Invalid>;

/// Roles that every template is given.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// The role of messages that are learnt.
pub(crate) const ASSISTANT: &str = "assistant";

/// Names in `from` and the roles that they are.
const SHAREGPT_ROLES: [(&str, &str); 13] = [
    ("system", "system"),
    ("human", "user"),
    ("user", "user"),
    ("gpt", ASSISTANT),
    ("assistant", ASSISTANT),
    ("chatgpt", ASSISTANT),
    ("bot", ASSISTANT),
    ("model", ASSISTANT),
    ("function_call", ASSISTANT),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
    ("function", "tool"),
];

/// Names under which a message has its reasoning; the first is the one that templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl Conversation {
    /// Reads the messages in `field`, with `tools`, `system` and `chat_template_kwargs` beside it.
    pub(crate) fn read(example: &Object, field: &'static str) -> Result<Self> {
        let mut messages = read_messages(example, field)?;
        if let Some(system) = text_field(example, "system")?.filter(|system| !system.is_empty()) {
            let has_one = messages.first().is_some_and(|first| role(first) == "system");
            if has_one {
                return Err(invalid("system", format!("stands beside a system message in `{field}`")));
            }
            messages.insert(0, message("system", system));
        }
        Ok(Self { messages, tools: read_tools(example)?, variables: read_variables(example)? })
    }

    /// This conversation with other messages.
    pub(crate) fn with(&self, messages: Vec<Object>) -> Self {
        Self { messages, ..self.clone() }
    }

    /// Index of the first message with a role that neither all templates know nor this one names.
    pub(crate) fn unknown_role(&self, template: &ChatTemplate) -> Option<usize> {
        let known = |role: &str| ROLES.contains(&role) || template.names(self, role);
        self.messages.iter().position(|message| !known(role(message)))
    }

    /// What [`Self::unknown_role`] found, in words.
    pub(crate) fn describe_unknown_role(&self, index: usize) -> String {
        let role = self.messages.get(index).map_or("", role);
        let known = ROLES.join(", ");
        format!(
            "has the role `{role}` in message {}, must be one of {known} or one that the chat template names",
            index + 1
        )
    }
}

/// Messages of a list, whatever its form.
pub(crate) fn read_messages(example: &Object, field: &'static str) -> Result<Vec<Object>> {
    let list = match example.get(field) {
        Some(Json::List(list)) if list.is_empty() => return Err(invalid(field, "is empty".into())),
        Some(Json::List(list)) => list,
        Some(other) => return Err(invalid(field, format!("is {}, must be a list of messages", other.kind()))),
        None => return Err(invalid(field, "is missing or null".into())),
    };
    list.iter().enumerate().map(|(index, entry)| read_message(entry).map_err(|what| at(field, index, &what))).collect()
}

/// A message with `role` and `content`.
pub(crate) fn message(role: &str, content: &str) -> Object {
    Object::from([("role", Json::Text(role.to_owned())), ("content", Json::Text(content.to_owned()))])
}

/// The role of a message that was read.
pub(crate) fn role(message: &Object) -> &str {
    message.get("role").and_then(Json::as_text).unwrap_or_default()
}

/// A field that holds a string, or nothing.
pub(crate) fn text_field<'a>(example: &'a Object, field: &'static str) -> Result<Option<&'a str>> {
    let text = |value: &'a Json| {
        value.as_text().ok_or_else(|| invalid(field, format!("is {}, must be a string", value.kind())))
    };
    example.get(field).map(text).transpose()
}

pub(crate) fn invalid(field: &'static str, message: String) -> Invalid {
    Invalid { field, message }
}

/// Messages count from 1, as people do.
fn at(field: &'static str, index: usize, what: &str) -> Invalid {
    invalid(field, format!("is wrong in message {}: {what}", index + 1))
}

fn read_message(entry: &Json) -> std::result::Result<Object, String> {
    let Json::Object(entry) = entry else { return Err(format!("it is {}, must be an object", entry.kind())) };
    let mut message = if entry.get("role").is_none() && entry.get("from").is_some() {
        read_sharegpt(entry)?
    } else {
        entry.clone().without_nulls()
    };
    match message.get("role") {
        Some(Json::Text(_)) => {}
        Some(other) => return Err(format!("`role` is {}, must be a string", other.kind())),
        None => return Err("`role` is missing".into()),
    }
    let content = match message.get("content") {
        Some(Json::Text(_)) => None,
        Some(Json::List(parts)) => Some(join_parts(parts)?),
        Some(other) => return Err(format!("`content` is {}, must be a string or a list of text parts", other.kind())),
        None if message.get("tool_calls").is_some() => None,
        None => return Err("`content` is missing".into()),
    };
    if let Some(content) = content {
        message.set("content", Json::Text(content));
    }
    if let Some(reasoning) = REASONING.into_iter().find_map(|name| message.get(name)).cloned() {
        if message.get("thinking").is_none() {
            message.set("thinking", reasoning.clone());
        }
        message.set(REASONING[0], reasoning);
    }
    Ok(message)
}

/// Text parts put together: whether a template takes parts, or prints them as a list, does not show from outside.
fn join_parts(parts: &[Json]) -> std::result::Result<String, String> {
    let text = |part: &Json| match part {
        Json::Text(text) => Some(text.clone()),
        Json::Object(part) if part.get("type").is_none_or(|kind| kind.as_text() == Some("text")) => {
            part.get("text").and_then(Json::as_text).map(str::to_owned)
        }
        _ => None,
    };
    let wrong = || "`content` holds a part that is not text, must be {\"type\": \"text\", \"text\": ..}".to_owned();
    parts.iter().map(|part| text(part).ok_or_else(wrong)).collect()
}

/// `{"from", "value"}` as `{"role", "content"}`.
fn read_sharegpt(entry: &Object) -> std::result::Result<Object, String> {
    let text = |field: &str| match entry.get(field) {
        Some(Json::Text(text)) => Ok(text.as_str()),
        Some(other) => Err(format!("`{field}` is {}, must be a string", other.kind())),
        None => Err(format!("`{field}` is missing")),
    };
    let (from, value) = (text("from")?, text("value")?);
    let Some((_, role)) = SHAREGPT_ROLES.into_iter().find(|(name, _)| *name == from) else {
        let known: Vec<&str> = SHAREGPT_ROLES.into_iter().map(|(name, _)| name).collect();
        return Err(format!("`from` is `{from}`, must be one of {}", known.join(", ")));
    };
    if from != "function_call" {
        return Ok(message(role, value));
    }
    let calls = match serde_json::from_str(value) {
        Ok(Json::Object(call)) => vec![Json::Object(call)],
        Ok(Json::List(calls)) => calls,
        _ => {
            return Err(
                "`value` of a function_call must be JSON: an object with `name` and `arguments`, or a list".into()
            );
        }
    };
    let call = |call| Json::Object(Object::from([("type", Json::Text("function".into())), ("function", call)]));
    let calls = Json::List(calls.into_iter().map(call).collect());
    Ok(Object::from([("role", Json::Text(role.into())), ("content", Json::Text(String::new())), ("tool_calls", calls)]))
}

/// A list of function schemas, also as JSON in a string, which is how tables of mixed tools are stored.
fn read_tools(example: &Object) -> Result<Option<Vec<Json>>> {
    let wrong = |what: &str| {
        invalid("tools", format!("is {what}, must be a list of function schemas, or such a list as a string of JSON"))
    };
    let parsed = match example.get("tools") {
        None => return Ok(None),
        Some(Json::Text(text)) if text.trim().is_empty() => return Ok(None),
        Some(Json::Text(text)) => serde_json::from_str(text).map_err(|_| wrong("a string that is not JSON"))?,
        Some(value) => value.clone(),
    };
    match parsed {
        Json::Null => Ok(None),
        Json::List(list) if list.is_empty() => Ok(None),
        Json::List(list) => match list.iter().find(|tool| !matches!(tool, Json::Object(_))) {
            Some(tool) => Err(wrong(&format!("a list with {}", tool.kind()))),
            None => Ok(Some(list)),
        },
        other => Err(wrong(other.kind())),
    }
}

fn read_variables(example: &Object) -> Result<Object> {
    const FIELD: &str = "chat_template_kwargs";
    const OURS: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];
    match example.get(FIELD) {
        None => Ok(Object::default()),
        Some(Json::Object(variables)) => match variables.keys().find(|name| OURS.contains(name)) {
            Some(name) => Err(invalid(FIELD, format!("sets `{name}`, which the program sets"))),
            None => Ok(variables.clone()),
        },
        Some(other) => Err(invalid(FIELD, format!("is {}, must be an object", other.kind()))),
    }
}
