//! Lines of a file, their place and their form.

use std::{collections::BTreeMap, path::Path};

use serde::de::{DeserializeOwned, IgnoredAny};

use crate::{Error, Result, chat_template::Invalid, json::Object};

/// Where an example stands, for messages.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) path: &'a Path,
    pub(super) line: usize,
}

/// A form of example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Tokens,
    Messages,
    Conversations,
    Completion,
    Alpaca,
    Text,
}

impl Shape {
    /// In the order in which a line with the fields of several is taken for one.
    const ALL: [Self; 6] =
        [Self::Tokens, Self::Messages, Self::Conversations, Self::Completion, Self::Alpaca, Self::Text];

    /// Fields that make up the form.
    pub(super) fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Tokens => &["input_ids"],
            Self::Messages => &["messages"],
            Self::Conversations => &["conversations"],
            Self::Completion => &["prompt", "completion"],
            Self::Alpaca => &["instruction", "output"],
            Self::Text => &["text"],
        }
    }
}

impl Place<'_> {
    /// The form of a line, by its fields.
    pub(super) fn shape(&self, text: &[u8]) -> Result<Shape> {
        let keys: BTreeMap<String, IgnoredAny> = self.parse(text)?;
        let has_fields = |shape: &Shape| shape.fields().iter().all(|&field| keys.contains_key(field));
        Shape::ALL.into_iter().find(has_fields).ok_or_else(|| {
            let found: Vec<String> = keys.keys().map(|key| format!("`{key}`")).collect();
            let found = if found.is_empty() { "no field".to_owned() } else { found.join(", ") };
            Error::UnknownShape { path: self.path.to_owned(), line: self.line, found }
        })
    }

    /// A line with the fields of a form.
    pub(super) fn object(&self, text: &[u8], shape: Shape) -> Result<Object> {
        let object: Object = self.parse(text)?;
        match shape.fields().iter().find(|field| object.get(field).is_none()) {
            Some(field) => Err(self.error(field, "is missing or null, and the first line of the file has it".into())),
            None => Ok(object),
        }
    }

    pub(super) fn parse<T: DeserializeOwned>(&self, text: &[u8]) -> Result<T> {
        let syntax = |column: usize, reason: String| Error::DataSyntax {
            path: self.path.to_owned(),
            line: self.line,
            column,
            reason,
        };
        // An array would be taken for a struct without field names.
        if text.trim_ascii_start().first() != Some(&b'{') {
            return Err(syntax(1, "expected a JSON object".into()));
        }
        serde_json::from_slice(text).map_err(|error| {
            let full = error.to_string();
            let position = format!(" at line {} column {}", error.line(), error.column());
            syntax(error.column(), full.strip_suffix(&position).unwrap_or(&full).to_owned())
        })
    }

    pub(super) fn error(&self, field: &'static str, message: String) -> Error {
        Error::Data { path: self.path.to_owned(), line: self.line, field, message }
    }

    pub(super) fn invalid(&self, Invalid { field, message }: Invalid) -> Error {
        self.error(field, message)
    }

    /// An error of a chat template on this example.
    pub(super) fn rendering(&self, source: Error) -> Error {
        Error::Rendering { path: self.path.to_owned(), line: self.line, source: Box::new(source) }
    }
}
