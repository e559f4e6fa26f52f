//! Reading and checking fields of a JSON object, with errors that name file, field, value and rule.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Makes the error of one kind of file from path, field, value and rule.
pub(crate) type MakeError = fn(PathBuf, String, String, &'static str) -> Error;

/// A JSON object of a file. A field that is `null` counts as absent.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    path: &'a Path,
    /// Name of a nested object, with the dot; empty for the file's own object.
    prefix: &'a str,
    map: &'a Map<String, Value>,
    error: MakeError,
}

/// A field, the values under which it changes nothing, and the rule that a refusal names.
pub(crate) type NeutralField = (&'static str, Neutral, &'static str);

/// The values of a field under which it changes nothing.
#[derive(Clone, Copy)]
pub(crate) enum Neutral {
    Absent,
    False,
    True,
    Number(f64),
    /// Absent, or an empty list, object or string.
    Empty,
}

impl Neutral {
    fn accepts(self, value: &Value) -> bool {
        match self {
            Neutral::Absent => false,
            Neutral::False => *value == Value::Bool(false),
            Neutral::True => *value == Value::Bool(true),
            Neutral::Number(number) => value.as_f64() == Some(number),
            Neutral::Empty => match value {
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::String(text) => text.is_empty(),
                _ => false,
            },
        }
    }
}

pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(Error::json(path))
}

/// The shortest decimal number that means this f32, so that 0.1 stays 0.1 in a file.
pub(crate) fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

impl<'a> Fields<'a> {
    pub(crate) fn new(path: &'a Path, map: &'a Map<String, Value>, error: MakeError) -> Self {
        Self { path, prefix: "", map, error }
    }

    /// The object in a field of this one; `prefix` is its name with a dot.
    pub(crate) fn nested(&self, prefix: &'a str, map: &'a Map<String, Value>) -> Self {
        Self { prefix, map, ..*self }
    }

    pub(crate) fn path(&self) -> &'a Path {
        self.path
    }

    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether a field is there and `null`, where that says something else than its absence.
    pub(crate) fn is_null(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(Value::is_null)
    }

    /// The object in a field, unless it is empty; `prefix` is the field's whole name with a dot.
    pub(crate) fn object(&self, name: &str, prefix: &'a str) -> Result<Option<Self>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(self.nested(prefix, map)).filter(|_| !map.is_empty())),
            Some(_) => Err(self.refuse(name, "an object")),
        }
    }

    /// Names of the fields that are not null.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str())
    }

    pub(crate) fn refuse(&self, name: &str, rule: &'static str) -> Error {
        const SHOWN_CHARS: usize = 120;
        let mut value = self.get(name).map_or_else(|| "missing".to_owned(), Value::to_string);
        if let Some((end, _)) = value.char_indices().nth(SHOWN_CHARS) {
            value.truncate(end);
            value.push_str("..");
        }
        (self.error)(self.path.to_owned(), format!("{}{name}", self.prefix), value, rule)
    }

    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.refuse(name, "true or false")),
        }
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>> {
        self.get(name).map(|value| value.as_str().ok_or_else(|| self.refuse(name, "a string"))).transpose()
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<f64>> {
        let finite = |value: &Value| value.as_f64().filter(|number| number.is_finite());
        self.get(name).map(|value| finite(value).ok_or_else(|| self.refuse(name, "a finite number"))).transpose()
    }

    pub(crate) fn required_number(&self, name: &str) -> Result<f64> {
        self.number(name)?.ok_or_else(|| self.refuse(name, "a finite number"))
    }

    /// A count from 1 to 2^31 - 1.
    pub(crate) fn size(&self, name: &str) -> Result<Option<usize>> {
        self.whole(name, 1, "a whole number from 1 to 2147483647")
    }

    /// A count from 0 to 2^31 - 1.
    pub(crate) fn count(&self, name: &str) -> Result<Option<usize>> {
        self.whole(name, 0, "a whole number from 0 to 2147483647")
    }

    fn whole(&self, name: &str, least: u64, rule: &'static str) -> Result<Option<usize>> {
        let in_range = |value: &Value| {
            let number = value.as_u64().filter(|number| (least..=i32::MAX as u64).contains(number))?;
            usize::try_from(number).ok()
        };
        self.get(name).map(|value| in_range(value).ok_or_else(|| self.refuse(name, rule))).transpose()
    }

    pub(crate) fn required_size(&self, name: &str) -> Result<usize> {
        self.size(name)?.ok_or_else(|| self.refuse(name, "a whole number from 1 to 2147483647"))
    }

    /// Token ids: one whole number or a list of them; empty when absent.
    pub(crate) fn ids(&self, name: &str) -> Result<Vec<i32>> {
        let id = |value: &Value| value.as_i64().and_then(|id| i32::try_from(id).ok()).filter(|&id| id >= 0);
        let ids = match self.get(name) {
            None => Some(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.refuse(name, "a token id or a list of token ids"))
    }

    /// Refuses every field of the table that is present with a value that changes the model.
    pub(crate) fn require_neutral<'t>(&self, table: impl IntoIterator<Item = &'t NeutralField>) -> Result<()> {
        for &(name, neutral, rule) in table {
            if self.get(name).is_some_and(|value| !neutral.accepts(value)) {
                return Err(self.refuse(name, rule));
            }
        }
        Ok(())
    }
}
