//! Against what transformers makes of the templates that models publish: `tests/fixtures/chat`, made by `reference.py` there.

use super::*;
use crate::json::Object;

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat")
}

pub(crate) const FAMILIES: [&str; 15] = [
    "alpaca",
    "chatml",
    "deepseek-r1",
    "deepseek-v3",
    "gemma-2",
    "gemma-3",
    "llama-2",
    "llama-3",
    "llama-3.1",
    "mistral-v3",
    "phi-3",
    "phi-4",
    "qwen2.5",
    "qwen3",
    "zephyr",
];

/// A conversation and what transformers renders of it.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) conversation: Conversation,
    pub(crate) add_generation_prompt: bool,
    /// As JSON: `text`, `ids` and `mask`, or `error`, which is empty for one that the template does not raise itself.
    pub(crate) expected: Value,
}

pub(crate) fn cases(family: &str) -> Vec<Case> {
    let lines = |path: PathBuf| fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect::<Vec<_>>();
    let (given, expected) =
        (lines(fixtures().join("cases.jsonl")), lines(fixtures().join(family).join("expected.jsonl")));
    assert_eq!(given.len(), expected.len());
    let case = |(given, expected): (&String, &String)| {
        let (example, expected): (Object, Value) =
            (serde_json::from_str(given).unwrap(), serde_json::from_str(expected).unwrap());
        let name = example.get("name").and_then(Json::as_text).unwrap().to_owned();
        assert_eq!(expected["case"], name);
        let conversation = Conversation::read(&example, "messages").unwrap();
        let add_generation_prompt = example.get("add_generation_prompt").is_some();
        Case { name, conversation, add_generation_prompt, expected }
    };
    given.iter().zip(&expected).map(case).collect()
}

/// The template of a family, or the same with its answers marked, in a folder of its own.
pub(crate) fn template(family: &str, file: &str) -> (tempfile::TempDir, ChatTemplate) {
    let (source, folder) = (fixtures().join(family), tempfile::tempdir().unwrap());
    for (from, to) in [
        (file, "chat_template.jinja"),
        ("tokenizer_config.json", "tokenizer_config.json"),
        ("tokenizer.json", "tokenizer.json"),
    ] {
        fs::copy(source.join(from), folder.path().join(to)).unwrap();
    }
    let template = ChatTemplate::load(folder.path()).unwrap().unwrap();
    (folder, template)
}

#[test]
fn renders_what_transformers_renders() {
    let mut num_raised = 0;
    for family in FAMILIES {
        for file in ["chat_template.jinja", "marked.jinja"] {
            let (_folder, template) = template(family, file);
            for case in cases(family) {
                let place = format!("{family}, {file}, {}", case.name);
                let rendered = template.render(&case.conversation, case.add_generation_prompt);
                match case.expected["error"].as_str() {
                    None => assert_eq!(rendered.unwrap().text, case.expected["text"].as_str().unwrap(), "{place}"),
                    Some(message) => {
                        let Err(Error::ChatTemplate { line, reason, .. }) = rendered else { panic!("{place}") };
                        assert!(line > 0, "{place}");
                        if !message.is_empty() {
                            assert_eq!(reason, message, "{place}");
                            num_raised += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(num_raised > 30, "{num_raised}");
}

#[test]
fn prompt_is_a_user_turn() {
    let (_folder, template) = template("phi-4", "chat_template.jinja");
    let expected = "<|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>assistant<|im_sep|>";
    assert_eq!(template.prompt("Hello").unwrap(), expected);
}

fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

fn conversation(json: &str) -> Conversation {
    Conversation::read(&serde_json::from_str(json).unwrap(), "messages").unwrap()
}

#[test]
fn finds_the_template_where_models_have_it() {
    let tools = conversation(r#"{"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f"}]}"#);
    let plain = conversation(r#"{"messages": [{"role": "user", "content": "x"}], "tools": "[]"}"#);
    let rendered = |files: &[(&str, &str)]| {
        let template = ChatTemplate::load(folder_with(files).path()).unwrap().unwrap();
        [&plain, &tools].map(|conversation| template.render(conversation, false).unwrap().text)
    };
    let config = r#"{"bos_token": {"content": "<s>"}, "chat_template": "config{{ bos_token }}"}"#;
    assert_eq!(rendered(&[("tokenizer_config.json", config)]), ["config<s>", "config<s>"]);
    let named = r#"{"chat_template": [{"name": "tool_use", "template": "{{ tools[0].name }}"}, {"name": "default", "template": "d"}]}"#;
    assert_eq!(rendered(&[("tokenizer_config.json", named)]), ["d", "f"]);
    // The file hides the field; special tokens still come from the configuration.
    let jinja = ("chat_template.jinja", "file{{ bos_token }}");
    assert_eq!(rendered(&[("tokenizer_config.json", config), jinja]), ["file<s>", "file<s>"]);
    let tool_use = ("additional_chat_templates/tool_use.jinja", "tools");
    assert_eq!(rendered(&[jinja, tool_use]), ["file", "tools"]);
    for files in [&[][..], &[("tokenizer_config.json", "{}")]] {
        assert!(ChatTemplate::load(folder_with(files).path()).unwrap().is_none());
    }
}

#[test]
fn variables_of_the_example_hide_special_tokens() {
    let folder = folder_with(&[
        (
            "chat_template.jinja",
            "{{ bos_token }}{{ eos_token }}{{ enable_thinking }}{{ tools is none and documents is none }}",
        ),
        ("tokenizer_config.json", r#"{"bos_token": "<s>", "eos_token": "</s>"}"#),
    ]);
    let template = ChatTemplate::load(folder.path()).unwrap().unwrap();
    let given = r#"{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"bos_token": "B", "enable_thinking": false}}"#;
    assert_eq!(template.render(&conversation(given), false).unwrap().text, "B</s>FalseTrue");
}

#[test]
fn wrong_templates_are_errors_with_file_and_line() {
    let message = |name: &str, text: &str| {
        let folder = folder_with(&[(name, text)]);
        ChatTemplate::load(folder.path()).unwrap_err().to_string()
    };
    let text = message("chat_template.jinja", "a\n{% if x %}\n{% endfor %}");
    assert!(text.contains("chat_template.jinja`, line 3 of chat template `default`: syntax error"), "{text}");
    let text = message("tokenizer_config.json", r#"{"chat_template": "{{ x"}"#);
    assert!(text.contains("tokenizer_config.json`, line 1 of chat template"), "{text}");
    for wrong in ["3", r#"[{"name": "rag", "template": "x"}]"#, r#"[{"name": "default"}]"#, "{}"] {
        let text = message("tokenizer_config.json", &format!("{{\"chat_template\": {wrong}}}"));
        assert!(text.contains("`chat_template` = ") && text.contains("named `default`"), "{text}");
    }
}

#[test]
fn marks_are_taken_out() {
    let [open, close] = engine::GENERATION;
    let rendered = unmark(&format!("a{open}é{close}b{open}{close}{open}c{close}"));
    assert_eq!(rendered, Rendered { text: "aébc".to_owned(), generated: vec![1..3, 4..4, 4..5] });
    assert_eq!(unmark("plain"), Rendered { text: "plain".to_owned(), generated: vec![] });
}

#[test]
fn forms_of_messages() {
    let read = |json: &str, field: &'static str| Conversation::read(&serde_json::from_str(json).unwrap(), field);
    let messages = |json: &str| {
        let list = read(json, "conversations").unwrap().messages.into_iter().map(Json::Object).collect();
        let text = Variable::from(&Json::List(list)).to_string();
        text.replace('\'', "\"")
    };
    let sharegpt = r#"{"system": "S", "conversations": [{"from": "human", "value": "q", "weight": 0}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"}, {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}]}"#;
    assert_eq!(
        messages(sharegpt),
        concat!(
            r#"[{"role": "system", "content": "S"}, {"role": "user", "content": "q"}, "#,
            r#"{"role": "assistant", "content": "", "#,
            r#""tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}, "#,
            r#"{"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]"#
        )
    );
    let parts = r#"{"conversations": [{"role": "user", "content": [{"type": "text", "text": "a "}, "b"], "name": null, "thinking": "t"}]}"#;
    assert_eq!(messages(parts), r#"[{"role": "user", "content": "a b", "thinking": "t", "reasoning_content": "t"}]"#);
    for (json, field, what) in [
        (r#"{"conversations": []}"#, "conversations", "is empty"),
        (r#"{"conversations": {}}"#, "conversations", "is an object, must be a list"),
        (r#"{"conversations": ["x"]}"#, "conversations", "message 1: it is a string"),
        (
            r#"{"conversations": [{"from": "human", "value": "x"}, {"from": "narrator", "value": "x"}]}"#,
            "conversations",
            "message 2: `from` is `narrator`, must be one of system, human",
        ),
        (r#"{"conversations": [{"from": "human"}]}"#, "conversations", "`value` is missing"),
        (r#"{"conversations": [{"from": "function_call", "value": "f()"}]}"#, "conversations", "must be JSON"),
        (r#"{"conversations": [{"content": "x"}]}"#, "conversations", "`role` is missing"),
        (r#"{"conversations": [{"role": 1, "content": "x"}]}"#, "conversations", "`role` is a number"),
        (r#"{"conversations": [{"role": "user"}]}"#, "conversations", "`content` is missing"),
        (r#"{"conversations": [{"role": "user", "content": true}]}"#, "conversations", "`content` is a boolean"),
        (r#"{"conversations": [{"role": "user", "content": [{"type": "image"}]}]}"#, "conversations", "not text"),
        (r#"{"conversations": [{"role": "user", "content": ""}], "tools": "{"}"#, "tools", "not JSON"),
        (r#"{"conversations": [{"role": "user", "content": ""}], "tools": [1]}"#, "tools", "a list with a number"),
        (r#"{"conversations": [{"role": "user", "content": ""}], "tools": {}}"#, "tools", "an object"),
        (r#"{"conversations": [{"role": "user", "content": ""}], "system": 1}"#, "system", "a number"),
        (
            r#"{"conversations": [{"role": "system", "content": ""}], "system": "x"}"#,
            "system",
            "beside a system message",
        ),
        (
            r#"{"conversations": [{"role": "user", "content": ""}], "chat_template_kwargs": []}"#,
            "chat_template_kwargs",
            "a list",
        ),
        (
            r#"{"conversations": [{"role": "user", "content": ""}], "chat_template_kwargs": {"messages": 1}}"#,
            "chat_template_kwargs",
            "`messages`",
        ),
    ] {
        let invalid = read(json, "conversations").unwrap_err();
        assert!(invalid.field == field && invalid.message.contains(what), "{json}: {invalid:?}");
    }
}
