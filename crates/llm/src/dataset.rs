//! Pre-tokenised data: one JSON object a line, `{"input_ids": [..], "labels": [..]}`.
//!
//! Labels are as long as the ids and not shifted; [`IGNORE_INDEX`] means "no target"; without labels every token is a
//! target. Here, and nowhere else, they are shifted: the target of token `i` is the label of token `i + 1` of the same
//! document, and the last token of a document has none.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, de::Error as _};
use unsloth_core::ops::cross_entropy::IGNORE_INDEX;
use unsloth_train::Document;

use crate::{Error, Result};

/// What examples are held against while they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// Ids and labels are below this.
    pub vocab_size: usize,
    /// Longer examples are cut to their first tokens; at least 1.
    pub max_seq_len: usize,
}

/// What was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Examples kept.
    pub num_examples: usize,
    /// Tokens of the examples kept.
    pub num_tokens: usize,
    /// Tokens that have a target.
    pub num_targets: usize,
    /// Examples, dropped ones included, that were longer than the limit.
    pub num_truncated: usize,
    /// Examples without a target, after cutting.
    pub num_dropped: usize,
}

impl Report {
    /// Share of the tokens that have a target, in `[0, 1]`.
    pub fn target_share(&self) -> f64 {
        if self.num_tokens == 0 { 0.0 } else { self.num_targets as f64 / self.num_tokens as f64 }
    }
}

/// Documents in reading order, held as two flat arrays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    ids: Vec<i32>,
    targets: Vec<i32>,
    /// Document `i` is `offsets[i] .. offsets[i + 1]`.
    offsets: Vec<usize>,
    report: Report,
}

impl Dataset {
    /// Reads JSONL files one after another, line by line; blank lines and unknown fields are skipped.
    ///
    /// # Errors
    /// Each names file and line: [`Error::Io`]; [`Error::DataSyntax`] for a line that is not such an object; [`Error::Data`]
    /// for ids or labels of the wrong number or range; [`Error::NoExamples`] for a file without examples and
    /// [`Error::NoTargets`] for one whose examples all lack a target; [`Error::InvalidOption`] for a `max_seq_len` of 0.
    pub fn read_jsonl(paths: &[PathBuf], options: ReadOptions) -> Result<Self> {
        if options.max_seq_len == 0 {
            let rule = "at least 1".into();
            return Err(Error::InvalidOption { field: "max_seq_len", value: "0".into(), rule });
        }
        let mut dataset = Self { ids: vec![], targets: vec![], offsets: vec![0], report: Report::default() };
        for path in paths {
            dataset.read_file(path, options)?;
        }
        Ok(dataset)
    }

    fn read_file(&mut self, path: &Path, options: ReadOptions) -> Result<()> {
        let mut reader = BufReader::new(File::open(path).map_err(Error::io("read", path))?);
        let before = self.report;
        let mut bytes = Vec::new();
        let mut line = 0;
        loop {
            bytes.clear();
            if reader.read_until(b'\n', &mut bytes).map_err(Error::io("read", path))? == 0 {
                break;
            }
            line += 1;
            let text = bytes.trim_ascii_end();
            if !text.is_empty() {
                let place = Place { path, line };
                let example = place.parse(text)?;
                place.check(&example, options.vocab_size)?;
                self.push(&example, options.max_seq_len);
            }
        }
        let num_dropped = self.report.num_dropped - before.num_dropped;
        if self.report.num_examples == before.num_examples {
            let path = path.to_owned();
            return Err(if num_dropped == 0 {
                Error::NoExamples { path }
            } else {
                Error::NoTargets { path, num_examples: num_dropped, max_seq_len: options.max_seq_len }
            });
        }
        Ok(())
    }

    /// Adds a checked example, cut and shifted, unless it has no target.
    fn push(&mut self, example: &Example, max_seq_len: usize) {
        let length = example.input_ids.len().min(max_seq_len);
        self.report.num_truncated += usize::from(length < example.input_ids.len());
        let labels = &example.labels.as_ref().unwrap_or(&example.input_ids)[..length];
        let num_targets = labels.iter().skip(1).filter(|&&label| label != i64::from(IGNORE_INDEX)).count();
        if num_targets == 0 {
            self.report.num_dropped += 1;
            return;
        }
        // In i32 range: checked against the vocabulary, which is.
        self.ids.extend(example.input_ids[..length].iter().map(|&id| id as i32));
        self.targets.extend(labels.iter().skip(1).map(|&label| label as i32));
        self.targets.push(IGNORE_INDEX);
        self.offsets.push(self.ids.len());
        self.report.num_examples += 1;
        self.report.num_tokens += length;
        self.report.num_targets += num_targets;
    }

    /// What was read.
    pub fn report(&self) -> Report {
        self.report
    }

    /// Number of documents.
    pub fn num_documents(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Ids and shifted targets of a document.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn document(&self, index: usize) -> Document<'_> {
        let range = self.offsets[index]..self.offsets[index + 1];
        Document { ids: &self.ids[range.clone()], targets: &self.targets[range] }
    }

    /// Tokens of each document.
    pub fn lengths(&self) -> Vec<usize> {
        self.offsets.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }
}

/// One line of a file.
#[derive(Deserialize)]
struct Example {
    #[serde(deserialize_with = "input_ids")]
    input_ids: Vec<i64>,
    #[serde(default, deserialize_with = "labels")]
    labels: Option<Vec<i64>>,
}

// serde_json says where an element is wrong but not in which field.
fn input_ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<i64>, D::Error> {
    Vec::deserialize(deserializer).map_err(|error| D::Error::custom(format_args!("`input_ids`: {error}")))
}

fn labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<i64>>, D::Error> {
    Option::deserialize(deserializer).map_err(|error| D::Error::custom(format_args!("`labels`: {error}")))
}

/// Where an example stands, for messages.
struct Place<'a> {
    path: &'a Path,
    line: usize,
}

impl Place<'_> {
    fn parse(&self, text: &[u8]) -> Result<Example> {
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

    fn error(&self, field: &'static str, message: String) -> Error {
        Error::Data { path: self.path.to_owned(), line: self.line, field, message }
    }

    fn check(&self, example: &Example, vocab_size: usize) -> Result<()> {
        let in_vocabulary = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < vocab_size);
        let num_ids = example.input_ids.len();
        if num_ids == 0 {
            return Err(self.error("input_ids", "is empty".into()));
        }
        if let Some((index, id)) = example.input_ids.iter().enumerate().find(|(_, id)| !in_vocabulary(id)) {
            let message =
                format!("holds {id} at index {index}, must be 0 or more and below the vocabulary size {vocab_size}");
            return Err(self.error("input_ids", message));
        }
        let Some(labels) = &example.labels else { return Ok(()) };
        if labels.len() != num_ids {
            return Err(self.error("labels", format!("has {} entries, `input_ids` has {num_ids}", labels.len())));
        }
        let allowed = |label: &i64| *label == i64::from(IGNORE_INDEX) || in_vocabulary(label);
        if let Some((index, label)) = labels.iter().enumerate().find(|(_, label)| !allowed(label)) {
            let message = format!(
                "holds {label} at index {index}, must be {IGNORE_INDEX}, or 0 or more and below the vocabulary size {vocab_size}"
            );
            return Err(self.error("labels", message));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: ReadOptions = ReadOptions { vocab_size: 100, max_seq_len: 4 };

    fn read(texts: &[&str], options: ReadOptions) -> Result<Dataset> {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..texts.len()).map(|i| folder.path().join(format!("{i}.jsonl"))).collect();
        for (path, text) in paths.iter().zip(texts) {
            std::fs::write(path, text).unwrap();
        }
        Dataset::read_jsonl(&paths, options)
    }

    fn message(text: &str) -> String {
        read(&[text], OPTIONS).unwrap_err().to_string()
    }

    #[test]
    fn shifts_by_document() {
        let text = "{\"input_ids\": [1, 2, 3], \"labels\": [-100, 2, 3], \"source\": {\"page\": [4]}}\n\n  {\"input_ids\": [5, 6]}\r\n";
        let data = read(&[text, "{\"input_ids\":[7,8],\"labels\":null}"], OPTIONS).unwrap();
        let documents: Vec<_> = (0..data.num_documents()).map(|i| data.document(i)).collect();
        assert_eq!(documents.iter().map(|d| d.ids).collect::<Vec<_>>(), [&[1, 2, 3][..], &[5, 6], &[7, 8]]);
        assert_eq!(
            documents.iter().map(|d| d.targets).collect::<Vec<_>>(),
            [&[2, 3, -100][..], &[6, -100], &[8, -100]]
        );
        assert_eq!(data.lengths(), [3, 2, 2]);
        let expected = Report { num_examples: 3, num_tokens: 7, num_targets: 4, num_truncated: 0, num_dropped: 0 };
        assert_eq!(data.report(), expected);
    }

    #[test]
    fn cuts_and_drops_and_says_so() {
        // Cut to four tokens the first keeps three targets; the second loses its only target; the third has one token.
        let text = "{\"input_ids\":[1,2,3,4,5,6]}\n{\"input_ids\":[1,2,3,4,5],\"labels\":[-100,-100,-100,-100,5]}\n{\"input_ids\":[9]}\n";
        let data = read(&[text], OPTIONS).unwrap();
        assert_eq!((data.num_documents(), data.document(0).targets), (1, &[2, 3, 4, -100][..]));
        let expected = Report { num_examples: 1, num_tokens: 4, num_targets: 3, num_truncated: 2, num_dropped: 2 };
        assert_eq!(data.report(), expected);
        assert_eq!(data.report().target_share(), 0.75);
    }

    #[test]
    fn malformed_json_names_line_and_column() {
        let text = message("{\"input_ids\":[1,2]}\n{\"input_ids\":[1,2}\n");
        assert!(text.contains("0.jsonl`, line 2, column 18: `input_ids`: expected `,` or `]`"), "{text}");
        let text = message("{\"input_ids\":[1,\"a\"]}");
        assert!(text.contains("line 1, column 19: `input_ids`: invalid type: string \"a\""), "{text}");
        assert!(message("{\"labels\":[1]}").contains("line 1, column 14: missing field `input_ids`"));
        assert!(message("{\"input_ids\":[1], \"labels\": [1.5]}").contains("`labels`: invalid type: floating point"));
        assert!(message("[[1,2],[1,2]]").contains("line 1, column 1: expected a JSON object"));
        assert!(message("{\"input_ids\":[1,2]} x").contains("trailing characters"));
        assert!(!message("{\"input_ids\":[1,2").contains("at line"));
    }

    #[test]
    fn values_are_checked() {
        assert!(message("{\"input_ids\":[]}").contains("line 1: `input_ids` is empty"));
        let text = message("\n{\"input_ids\":[1,100]}");
        assert!(
            text.contains("line 2: `input_ids` holds 100 at index 1") && text.contains("vocabulary size 100"),
            "{text}"
        );
        assert!(message("{\"input_ids\":[-1,1]}").contains("holds -1 at index 0"));
        assert!(message("{\"input_ids\":[1,2],\"labels\":[1]}").contains("`labels` has 1 entries, `input_ids` has 2"));
        assert!(message("{\"input_ids\":[1,2],\"labels\":[-100,-99]}").contains("`labels` holds -99 at index 1"));
        // Beyond the cut too: a file is right or wrong whatever the limit is.
        assert!(message("{\"input_ids\":[1,2,3,4,500]}").contains("holds 500 at index 4"));
    }

    #[test]
    fn useless_files_are_errors() {
        for text in ["", "\n \n"] {
            assert!(message(text).contains("0.jsonl`: no examples"), "{}", message(text));
        }
        let text = message("{\"input_ids\":[1,2],\"labels\":[-100,-100]}\n{\"input_ids\":[3,4],\"labels\":[3,-100]}");
        assert!(text.contains("none of the 2 examples has a target"), "{text}");
        assert!(matches!(read(&["{\"input_ids\":[1,2]}", ""], OPTIONS), Err(Error::NoExamples { .. })));
        let zero = ReadOptions { max_seq_len: 0, ..OPTIONS };
        assert!(matches!(
            read(&["{\"input_ids\":[1,2]}"], zero),
            Err(Error::InvalidOption { field: "max_seq_len", .. })
        ));
    }
}
