//! Text to token ids and back, by the `tokenizers` crate.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The tokenizer of a Hugging Face folder.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a folder.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Tokenizer`] if it is not a tokenizer.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|source| Error::Tokenizer { path: path.clone(), source })?;
        Ok(Self { path, inner })
    }

    /// Ids of a text, with the special tokens that the tokenizer puts around it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]; [`Error::InvalidOption`] for an id of 2^31 or more.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        let encoding = self.inner.encode(text, true).map_err(|source| self.failed(source))?;
        let id = |&id: &u32| {
            let too_large =
                |_| Error::InvalidOption { field: "token id", value: id.to_string(), rule: "below 2^31".to_owned() };
            i32::try_from(id).map_err(too_large)
        };
        encoding.get_ids().iter().map(id).collect()
    }

    /// Text of ids, without special tokens.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a negative id; [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[i32]) -> Result<String> {
        let id = |&id: &i32| {
            let negative =
                |_| Error::InvalidOption { field: "token id", value: id.to_string(), rule: "0 or more".to_owned() };
            u32::try_from(id).map_err(negative)
        };
        let ids = ids.iter().map(id).collect::<Result<Vec<u32>>>()?;
        self.inner.decode(&ids, true).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: tokenizers::Error) -> Error {
        Error::Tokenizer { path: self.path.clone(), source }
    }
}
