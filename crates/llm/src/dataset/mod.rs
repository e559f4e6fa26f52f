//! Examples in JSONL, one a line, or in Parquet, one a row, in the forms that people have, as token ids and targets.
//!
//! The fields of a file's first line tell its form, and every line has to have it:
//! - `{"messages": [{"role", "content"}, ..]}`, and `{"conversations": [{"from", "value"}, ..]}`: chats, rendered by the model's own
//!   chat template;
//! - `{"instruction", "input", "output"}`: a chat of one turn, or Alpaca's prompt where the model has no chat template;
//! - `{"prompt", "completion"}`: two texts, or two lists of messages;
//! - `{"text"}`: all of it is learnt;
//! - `{"input_ids", "labels"}`: tokens. Labels are as long as the ids and not shifted; [`IGNORE_INDEX`] means "no target"; without
//!   labels every token is a target.
//!
//! Here, and nowhere else, labels are shifted: the target of token `i` is the label of token `i + 1` of the same document, and the
//! last token of a document has none.

mod answers;
mod example;
mod lines;
#[cfg(feature = "parquet")]
mod parquet;
mod reader;
mod sample;
mod split;
mod tokens;

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use unsloth_core::ops::cross_entropy::IGNORE_INDEX;
use unsloth_train::Document;

pub use self::sample::{Piece, Sample};
use self::{
    example::{Place, Shape},
    reader::Reader,
};
use crate::{Error, Result, tokenizer::Tokenizer};

/// How examples are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOptions<'a> {
    /// Folder of the model, for its tokenizer and chat template. Tokens are read without them.
    pub model: &'a Path,
    /// Ids and labels are below this.
    pub vocab_size: usize,
    /// Longer examples are cut to their first tokens; at least 1.
    pub max_seq_len: usize,
    /// Which tokens are learnt. `None`: answers of chats and completions, all of plain text; tokens bring their own labels.
    pub train_on: Option<TrainOn>,
}

/// Which tokens of an example are targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrainOn {
    /// What the assistant says, its end of turn included, or the completion of a prompt.
    Answers,
    /// Every token.
    All,
}

impl fmt::Display for TrainOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrainOn::Answers => "answers",
            TrainOn::All => "all",
        })
    }
}

impl FromStr for TrainOn {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "answers" => Ok(TrainOn::Answers),
            "all" => Ok(TrainOn::All),
            _ => {
                let rule = "answers or all".to_owned();
                Err(Error::InvalidOption { field: "train_on", value: text.to_owned(), rule })
            }
        }
    }
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
    /// Whether document `i` was longer.
    is_truncated: Vec<bool>,
    report: Report,
}

/// An example as tokens, with a label each.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Labelled {
    ids: Vec<i32>,
    /// As long as the ids, not shifted.
    labels: Vec<i32>,
}

impl Dataset {
    /// Reads files one after another: JSONL line by line, or, with feature `parquet`, Parquet row by row. Blank lines and unknown
    /// fields are skipped.
    ///
    /// # Errors
    /// [`Error::Parquet`], and [`Error::ParquetNotBuilt`] without the feature. Each of the others names file and line (or row):
    /// [`Error::Io`]; [`Error::DataSyntax`] for a line that is not such an object;
    /// [`Error::UnknownShape`] for fields of no known form; [`Error::Data`] for a field of another form than the first line has
    /// or of a wrong type, number or range; [`Error::Rendering`] for a conversation that the chat template refuses;
    /// [`Error::AnswerSpan`]. [`Error::NoChatTemplate`], [`Error::ChatTemplate`] and whatever loading the tokenizer refuses;
    /// [`Error::NoExamples`] for a file without examples and [`Error::NoTargets`] for one whose examples all lack a target;
    /// [`Error::InvalidOption`] for a `max_seq_len` of 0 or a `train_on` that the data cannot follow.
    pub fn read(paths: &[PathBuf], options: ReadOptions<'_>) -> Result<Self> {
        if options.max_seq_len == 0 {
            let rule = "at least 1".into();
            return Err(Error::InvalidOption { field: "max_seq_len", value: "0".into(), rule });
        }
        let mut dataset = Self::empty();
        let mut reader = Reader::new(options);
        for path in paths {
            dataset.read_file(path, &mut reader)?;
        }
        Ok(dataset)
    }

    fn read_file(&mut self, path: &Path, reader: &mut Reader<'_>) -> Result<()> {
        let max_seq_len = reader.options().max_seq_len;
        let before = self.report;
        let mut shape: Option<Shape> = None;
        lines::read(path, &mut |line, text| {
            let place = Place { path, line };
            let shape = match shape {
                Some(shape) => shape,
                None => *shape.insert(reader.shape(&place, text)?),
            };
            self.push(&reader.read(shape, &place, text)?, max_seq_len);
            Ok(())
        })?;
        let num_dropped = self.report.num_dropped - before.num_dropped;
        if self.report.num_examples == before.num_examples {
            let path = path.to_owned();
            return Err(if num_dropped == 0 {
                Error::NoExamples { path }
            } else {
                Error::NoTargets { path, num_examples: num_dropped, max_seq_len }
            });
        }
        Ok(())
    }

    /// Adds an example, cut and shifted, unless it has no target.
    fn push(&mut self, example: &Labelled, max_seq_len: usize) {
        let length = example.ids.len().min(max_seq_len);
        self.report.num_truncated += usize::from(length < example.ids.len());
        let (ids, labels) = (&example.ids[..length], &example.labels[..length]);
        let num_targets = labels.iter().skip(1).filter(|&&label| label != IGNORE_INDEX).count();
        if num_targets == 0 {
            self.report.num_dropped += 1;
            return;
        }
        self.ids.extend(ids);
        self.targets.extend(&labels[1..]);
        self.targets.push(IGNORE_INDEX);
        self.offsets.push(self.ids.len());
        self.is_truncated.push(length < example.ids.len());
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

    /// The beginning of the first document as the model is given it.
    ///
    /// # Errors
    /// As [`Tokenizer::decode_all`].
    pub fn sample(&self, tokenizer: &Tokenizer) -> Result<Sample> {
        Sample::of(self.document(0), tokenizer)
    }
}

#[cfg(test)]
mod tests;
