//! Values as `json.dumps` of Python writes them.

use std::fmt::Write;

use minijinja::{
    Error, ErrorKind,
    value::{Value, ValueKind},
};

/// Options of `json.dumps`.
pub(super) struct Dumps {
    pub(super) ensure_ascii: bool,
    /// What a level of nesting adds at the beginning of a line; `None`: everything on one line.
    pub(super) indent: Option<String>,
    pub(super) item_separator: String,
    pub(super) key_separator: String,
    pub(super) sort_keys: bool,
}

impl Dumps {
    /// `json.dumps(value)`.
    ///
    /// # Errors
    /// For a value that JSON does not have, such as one that is undefined.
    pub(super) fn text(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.write(value, 0, &mut out)?;
        Ok(out)
    }

    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&self.number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect::<Vec<_>>();
                self.items(['[', ']'], items, depth, out, |this, item, out| this.write(&item, depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut keys = value.try_iter()?.collect::<Vec<_>>();
                if self.sort_keys {
                    keys.sort();
                }
                self.items(['{', '}'], keys, depth, out, |this, key, out| {
                    let text = key.as_str().map_or_else(|| this.number(&key), str::to_owned);
                    this.string(&text, out);
                    out.push_str(&this.key_separator);
                    this.write(&value.get_item(&key)?, depth + 1, out)
                })?;
            }
            kind => {
                let message = format!("tojson: a value that is {kind} cannot be written as JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn items(
        &self,
        [open, close]: [char; 2],
        items: Vec<Value>,
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(&Self, Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        let is_empty = items.is_empty();
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                out.push_str(&self.item_separator);
            }
            self.line_break(depth + 1, out);
            write(self, item, out)?;
        }
        if !is_empty {
            self.line_break(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn line_break(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    }

    fn number(&self, value: &Value) -> String {
        match f64::try_from(value.clone()) {
            Ok(number) if !value.is_integer() && number.is_nan() => "NaN".to_owned(),
            Ok(number) if !value.is_integer() && number.is_infinite() => {
                if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
            }
            Ok(number) if !value.is_integer() => float(number),
            _ => value.to_string(),
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                _ if c < ' ' || self.ensure_ascii && c > '~' => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string cannot fail.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                _ => out.push(c),
            }
        }
        out.push('"');
    }
}

/// The fewest digits that name a finite number, with an exponent below 1e-4 and from 1e16.
fn float(number: f64) -> String {
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..16).contains(&exponent) {
        return format!("{number:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(json: &str) -> Value {
        Value::from(&serde_json::from_str::<crate::json::Json>(json).unwrap())
    }

    fn dumps(indent: Option<&str>, ensure_ascii: bool) -> Dumps {
        let item_separator = if indent.is_some() { "," } else { ", " }.to_owned();
        let indent = indent.map(str::to_owned);
        Dumps { ensure_ascii, indent, item_separator, key_separator: ": ".to_owned(), sort_keys: false }
    }

    // The expectations are what Python 3.11 prints.
    #[test]
    fn json_as_python_writes_it() {
        let nested = value(
            r#"{"b": [1, 2.0, -0.5, 1e20, 1e-7], "a": {}, "é": "\"\\\n\u0001\u007f🦀", "c": [], "d": [true, null]}"#,
        );
        assert_eq!(
            dumps(None, false).text(&nested).unwrap(),
            "{\"b\": [1, 2.0, -0.5, 1e+20, 1e-07], \"a\": {}, \"é\": \"\\\"\\\\\\n\\u0001\u{7f}🦀\", \"c\": [], \"d\": [true, null]}"
        );
        assert_eq!(dumps(None, true).text(&value(r#""é\u007f🦀""#)).unwrap(), "\"\\u00e9\\u007f\\ud83e\\udd80\"");
        assert_eq!(
            dumps(Some("    "), false).text(&value(r#"{"b": [1, {"x": []}], "a": {}}"#)).unwrap(),
            "{\n    \"b\": [\n        1,\n        {\n            \"x\": []\n        }\n    ],\n    \"a\": {}\n}"
        );
        let sorted = Dumps { sort_keys: true, ..dumps(None, false) };
        assert_eq!(sorted.text(&value(r#"{"b": 1, "a": 2}"#)).unwrap(), r#"{"a": 2, "b": 1}"#);
        assert!(dumps(None, false).text(&Value::UNDEFINED).unwrap_err().to_string().contains("undefined"));
    }

    #[test]
    fn floats_as_python_prints_them() {
        let cases = [
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.0 / 3.0, "0.3333333333333333"),
        ];
        for (number, text) in cases {
            assert_eq!(float(number), text);
        }
    }
}
