//! The named special tokens of a tokenizer, as text.

use std::path::Path;

use serde_json::Value;

use crate::{
    Error, Result,
    fields::{Fields, read_object},
};

/// Names under which transformers knows special tokens and gives them to chat templates.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Where they stand; a name in an earlier file hides the same name in a later one.
const FILES: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpecialTokens(Vec<(&'static str, String)>);

impl SpecialTokens {
    /// Those that a folder names; a file that is not there names none.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`]; [`Error::Config`] for a token that is neither a string nor an object with `content`.
    pub(crate) fn load(folder: &Path) -> Result<Self> {
        let mut tokens = Self::default();
        for file in FILES {
            let path = folder.join(file);
            if !path.is_file() {
                continue;
            }
            let map = read_object(&path)?;
            let fields =
                Fields::new(&path, &map, |path, field, value, rule| Error::Config { path, field, value, rule });
            for name in NAMES {
                let Some(value) = fields.get(name) else { continue };
                let content = if let Value::Object(token) = value { token.get("content") } else { Some(value) };
                let rule = "a string, or an object with a string `content`";
                let text = content.and_then(Value::as_str).ok_or_else(|| fields.refuse(name, rule))?;
                if tokens.get(name).is_none() {
                    tokens.0.push((name, text.to_owned()));
                }
            }
        }
        Ok(tokens)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(known, _)| *known == name).map(|(_, text)| text)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, text)| (*name, text.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn strings_objects_and_the_older_file() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(SpecialTokens::load(folder.path()).unwrap(), SpecialTokens::default());
        let write = |file: &str, text: &str| fs::write(folder.path().join(file), text).unwrap();
        write("special_tokens_map.json", r#"{"eos_token": "old", "unk_token": "<unk>"}"#);
        write(
            "tokenizer_config.json",
            r#"{"eos_token": {"content": "</s>", "lstrip": false}, "bos_token": "<s>", "pad_token": null}"#,
        );
        let tokens = SpecialTokens::load(folder.path()).unwrap();
        let expected = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
        assert_eq!(tokens.iter().collect::<Vec<_>>(), expected);
        write("tokenizer_config.json", r#"{"eos_token": 2}"#);
        let error = SpecialTokens::load(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json") && error.contains("`eos_token` = 2"), "{error}");
    }
}
