//! Text to token ids and back, by the `tokenizers` crate.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// What a tokenizer may consist of, across the families and versions of transformers.
pub(crate) const TOKENIZER_FILES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
];

/// The tokenizer of a Hugging Face folder.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
}

/// A text as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Encoded {
    pub(crate) ids: Vec<i32>,
    /// Bytes of the text that each token stands for; empty for one that was added.
    pub(crate) ranges: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Whether a folder has a tokenizer: token ids can be trained on and continued without one.
    pub fn exists(folder: &Path) -> bool {
        folder.join(FILE).is_file()
    }

    /// Reads `tokenizer.json` of a folder.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Tokenizer`] if it is not a tokenizer.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let failed = |source| Error::Tokenizer { path: path.clone(), source };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(failed)?;
        // A file may hold the settings of whoever wrote it last; transformers sets them anew too.
        inner.with_padding(None).with_truncation(None).map_err(failed)?;
        Ok(Self { path, inner })
    }

    /// Ids of a text, with the special tokens that the tokenizer puts around it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]; [`Error::InvalidOption`] for an id of 2^31 or more.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        Ok(self.encode_ranges(text, true)?.ids)
    }

    /// Ids of a text in which a chat template has put all special tokens already.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<i32>> {
        Ok(self.encode_ranges(text, false)?.ids)
    }

    /// # Errors
    /// As [`Self::encode`].
    pub(crate) fn encode_ranges(&self, text: &str, add_special_tokens: bool) -> Result<Encoded> {
        let encoding = self.inner.encode(text, add_special_tokens).map_err(|source| self.failed(source))?;
        let id = |&id: &u32| {
            let too_large =
                |_| Error::InvalidOption { field: "token id", value: id.to_string(), rule: "below 2^31".to_owned() };
            i32::try_from(id).map_err(too_large)
        };
        let ids = encoding.get_ids().iter().map(id).collect::<Result<_>>()?;
        Ok(Encoded { ids, ranges: encoding.get_offsets().iter().map(|&(start, end)| start..end).collect() })
    }

    /// Text of ids, without special tokens.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a negative id; [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[i32]) -> Result<String> {
        self.decode_ids(ids, true)
    }

    /// Text of ids, special tokens included.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_all(&self, ids: &[i32]) -> Result<String> {
        self.decode_ids(ids, false)
    }

    fn decode_ids(&self, ids: &[i32], skip_special_tokens: bool) -> Result<String> {
        let id = |&id: &i32| {
            let negative =
                |_| Error::InvalidOption { field: "token id", value: id.to_string(), rule: "0 or more".to_owned() };
            u32::try_from(id).map_err(negative)
        };
        let ids = ids.iter().map(id).collect::<Result<Vec<u32>>>()?;
        self.inner.decode(&ids, skip_special_tokens).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: tokenizers::Error) -> Error {
        Error::Tokenizer { path: self.path.clone(), source }
    }
}

const FILE: &str = "tokenizer.json";
