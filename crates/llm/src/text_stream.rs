//! Text of a generation while it grows.

use crate::{Result, tokenizer::Tokenizer};

/// Turns ids into text piece by piece. A token may be a part of a character, and its text may depend on the tokens before it,
/// so pieces come late rather than wrong; put together they are the text of all ids.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The ids of the last piece, whose text the next one may depend on, and those without text yet.
    ids: Vec<i32>,
    /// How many of `ids` belong to the last piece.
    num_shown: usize,
}

/// What a decoder gives for bytes that are not a character, or not yet.
const INCOMPLETE: char = '\u{fffd}';

impl<'a> TextStream<'a> {
    /// A stream before its first id.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), num_shown: 0 }
    }

    /// The text that this id completes; empty if it ends within a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: i32) -> Result<String> {
        self.ids.push(id);
        let piece = self.rest()?;
        if piece.is_empty() || piece.ends_with(INCOMPLETE) {
            return Ok(String::new());
        }
        self.ids.drain(..self.num_shown);
        self.num_shown = self.ids.len();
        Ok(piece)
    }

    /// What is left at the end: bytes that never became a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        self.rest()
    }

    fn rest(&self) -> Result<String> {
        let shown = self.tokenizer.decode(&self.ids[..self.num_shown])?;
        let all = self.tokenizer.decode(&self.ids)?;
        Ok(all.strip_prefix(&shown).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_up_the_text() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama/model");
        let tokenizer = Tokenizer::load(&folder).unwrap();
        for text in ["plain words, and more", "größer als 3 \u{1f980}\u{1f980} 終", " \n\n  spaces ", ""] {
            let ids = tokenizer.encode(text).unwrap();
            let mut stream = TextStream::new(&tokenizer);
            let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            assert!(pieces.iter().all(|piece| !piece.contains(INCOMPLETE)), "{pieces:?}");
            pieces.push(stream.finish().unwrap());
            assert_eq!(pieces.concat(), tokenizer.decode(&ids).unwrap());
            assert!(pieces.len() <= 2 || pieces.iter().filter(|piece| !piece.is_empty()).count() > 1, "{pieces:?}");
        }
    }

    #[test]
    fn an_unfinished_character_comes_at_the_end() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama/model");
        let tokenizer = Tokenizer::load(&folder).unwrap();
        let ids = tokenizer.encode("a\u{1f980}").unwrap();
        let cut = &ids[..ids.len() - 1];
        let mut stream = TextStream::new(&tokenizer);
        let shown: String = cut.iter().map(|&id| stream.push(id).unwrap()).collect();
        let rest = stream.finish().unwrap();
        assert!(!shown.contains(INCOMPLETE) && rest.contains(INCOMPLETE), "{shown:?} {rest:?}");
        assert_eq!(shown + &rest, tokenizer.decode(cut).unwrap());
    }
}
