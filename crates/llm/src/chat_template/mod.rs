//! A model's own chat template, rendered as transformers renders it.
//!
//! `chat_template.jinja`, with named ones in `additional_chat_templates/`, or else `chat_template` in `tokenizer_config.json`: a
//! string, or a list of named templates, of which `tool_use` is for conversations with tools and `default` for the others.

pub(crate) mod conversation;
mod engine;
mod python;

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use minijinja::{Environment, value::Value as Variable};
use serde_json::Value;

pub(crate) use self::conversation::{Conversation, Invalid};
use crate::{
    Error, Result,
    fields::{Fields, read_object},
    json::{Json, Object},
    special_tokens::SpecialTokens,
};

/// The templates of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    templates: Vec<Named>,
    special_tokens: SpecialTokens,
}

/// A template and where it stands.
#[derive(Debug)]
struct Named {
    name: String,
    path: PathBuf,
    source: String,
    has_generation: bool,
}

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rendered {
    pub(crate) text: String,
    /// Byte ranges that the template marks with `{% generation %}`, in order.
    pub(crate) generated: Vec<Range<usize>>,
}

/// Names of templates.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// The template of a model's folder; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`]; [`Error::Config`] for a field `chat_template` of another form, or without a template
    /// named `default`; [`Error::ChatTemplate`] for one that is not Jinja.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        let templates = find(folder)?;
        let Some(first) = templates.first() else { return Ok(None) };
        let mut environment = engine::environment().map_err(|error| first.failed(&error))?;
        for template in &templates {
            let (_, prepared) = engine::prepare(&template.source);
            environment.add_template_owned(template.name.clone(), prepared).map_err(|error| template.failed(&error))?;
        }
        Ok(Some(Self { environment, templates, special_tokens: SpecialTokens::load(folder)? }))
    }

    /// The beginning of a conversation: what the user says, and the header behind which the model answers.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] if the template fails.
    pub fn prompt(&self, user: &str) -> Result<String> {
        let message = Object::from([("role", Json::Text("user".into())), ("content", Json::Text(user.into()))]);
        let conversation = Conversation { messages: vec![message], ..Conversation::default() };
        Ok(self.render(&conversation, true)?.text)
    }

    /// # Errors
    /// [`Error::ChatTemplate`] if the template fails or refuses the conversation.
    pub(crate) fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<Rendered> {
        let named = self.of(conversation);
        let Conversation { messages, tools, variables } = conversation;
        let list = |values: &mut dyn Iterator<Item = Variable>| values.collect::<Variable>();
        let tokens = self.special_tokens.iter().map(|(name, text)| (name, Variable::from(text)));
        let given = variables.iter().map(|(name, value)| (name, Variable::from(value)));
        let ours = [
            ("messages", list(&mut messages.iter().map(Variable::from))),
            ("tools", tools.as_ref().map_or(Variable::from(()), |tools| list(&mut tools.iter().map(Variable::from)))),
            ("documents", Variable::from(())),
            ("add_generation_prompt", Variable::from(add_generation_prompt)),
        ];
        // Of equal names the last counts.
        let context = Variable::from_pairs(tokens.chain(given).chain(ours));
        let template = self.environment.get_template(&named.name).map_err(|error| named.failed(&error))?;
        let text = template.render(context).map_err(|error| named.failed(&error))?;
        Ok(if named.has_generation { unmark(&text) } else { Rendered { text, generated: vec![] } })
    }

    /// Whether the template of this conversation marks what the assistant says.
    pub(crate) fn has_generation(&self, conversation: &Conversation) -> bool {
        self.of(conversation).has_generation
    }

    /// Whether the template of this conversation has this text as a string.
    pub(crate) fn names(&self, conversation: &Conversation, text: &str) -> bool {
        let source = &self.of(conversation).source;
        ['\'', '"'].into_iter().any(|quote| source.contains(&format!("{quote}{text}{quote}")))
    }

    fn of(&self, conversation: &Conversation) -> &Named {
        let find = |name: &str| self.templates.iter().find(|template| template.name == name);
        let with_tools = conversation.tools.is_some().then(|| find(TOOL_USE)).flatten();
        with_tools.or_else(|| find(DEFAULT)).unwrap_or(&self.templates[0])
    }
}

impl Named {
    fn new(name: &str, path: PathBuf, source: String) -> Self {
        let (has_generation, _) = engine::prepare(&source);
        Self { name: name.to_owned(), path, source, has_generation }
    }

    fn failed(&self, error: &minijinja::Error) -> Error {
        let detail = error.detail().unwrap_or_default();
        let raised = std::error::Error::source(error).is_some_and(|source| source.is::<engine::Raised>());
        let reason = match (raised, detail) {
            (true, detail) => detail.to_owned(),
            (false, "") => error.kind().to_string(),
            (false, detail) => format!("{}: {detail}", error.kind()),
        };
        Error::ChatTemplate {
            path: self.path.clone(),
            name: self.name.clone(),
            line: error.line().unwrap_or_default(),
            reason,
        }
    }
}

/// The templates of a folder.
fn find(folder: &Path) -> Result<Vec<Named>> {
    let read = |name: &str, path: PathBuf| -> Result<Named> {
        let source = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        Ok(Named::new(name, path, source))
    };
    let default = folder.join("chat_template.jinja");
    if default.is_file() {
        let mut found = vec![read(DEFAULT, default)?];
        let tool_use = folder.join("additional_chat_templates").join(format!("{TOOL_USE}.jinja"));
        if tool_use.is_file() {
            found.push(read(TOOL_USE, tool_use)?);
        }
        return Ok(found);
    }
    let path = folder.join("tokenizer_config.json");
    if !path.is_file() {
        return Ok(vec![]);
    }
    let map = read_object(&path)?;
    let fields = Fields::new(&path, &map, |path, field, value, rule| Error::Config { path, field, value, rule });
    let rule = "a string, or a list of objects with strings `name` and `template`, one named `default`";
    let refused = || fields.refuse("chat_template", rule);
    let found = match fields.get("chat_template") {
        None => return Ok(vec![]),
        Some(Value::String(source)) => vec![Named::new(DEFAULT, path.clone(), source.clone())],
        Some(Value::Array(list)) => {
            let text = |entry: &Value, field: &str| entry.get(field)?.as_str().map(str::to_owned);
            let named = |entry| Some(Named::new(&text(entry, "name")?, path.clone(), text(entry, "template")?));
            list.iter().map(named).collect::<Option<Vec<_>>>().ok_or_else(refused)?
        }
        Some(_) => return Err(refused()),
    };
    if found.iter().all(|template| template.name != DEFAULT) { Err(refused()) } else { Ok(found) }
}

/// Takes the marks of `{% generation %}` out of a text.
fn unmark(marked: &str) -> Rendered {
    let [open, close] = engine::GENERATION;
    let mut rendered = Rendered::default();
    let mut rest = marked;
    while let Some((before, from_mark)) = rest.split_once(open) {
        rendered.text.push_str(before);
        let (inside, after) = from_mark.split_once(close).unwrap_or((from_mark, ""));
        let start = rendered.text.len();
        rendered.text.push_str(inside);
        rendered.generated.push(start..rendered.text.len());
        rest = after;
    }
    rendered.text.push_str(rest);
    rendered
}

#[cfg(test)]
pub(crate) mod tests;
