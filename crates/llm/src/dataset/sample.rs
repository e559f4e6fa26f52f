//! An example as people read it.

use unsloth_core::ops::cross_entropy::IGNORE_INDEX;
use unsloth_train::Document;

use crate::{Result, tokenizer::Tokenizer};

/// The beginning of an example, special tokens included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Its parts in order.
    pub pieces: Vec<Piece>,
    /// Whether the example goes on.
    pub is_cut: bool,
}

/// A part of an example that is learnt as a whole or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The text of its tokens.
    pub text: String,
    /// Whether its tokens are targets.
    pub is_trained: bool,
}

/// Enough to see the form, not so much that a report scrolls away.
const MAX_TOKENS: usize = 400;

impl Sample {
    pub(super) fn of(document: Document<'_>, tokenizer: &Tokenizer) -> Result<Self> {
        let ids = &document.ids[..document.ids.len().min(MAX_TOKENS)];
        // The target of a token is the one after it, and the first token is nobody's.
        let trained: Vec<bool> = std::iter::once(false)
            .chain(document.targets.iter().map(|&target| target != IGNORE_INDEX))
            .take(ids.len())
            .collect();
        let mut pieces = Vec::new();
        let mut start = 0;
        for run in trained.chunk_by(|a, b| a == b) {
            let end = start + run.len();
            // A tokenizer may decode tokens otherwise at the beginning of a text.
            let (before, all) = (tokenizer.decode_all(&ids[..start])?, tokenizer.decode_all(&ids[..end])?);
            let text = match all.strip_prefix(&before) {
                Some(text) => text.to_owned(),
                None => tokenizer.decode_all(&ids[start..end])?,
            };
            pieces.push(Piece { text, is_trained: run[0] });
            start = end;
        }
        Ok(Self { pieces, is_cut: ids.len() < document.ids.len() })
    }
}
