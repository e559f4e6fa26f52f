//! The files of a quickstart: stories to learn from, chats to learn from, chats to be examined with.

use std::{collections::HashSet, fs, path::Path};

use serde_json::json;

use super::{
    Size,
    grammar::{Kind, Part, Story},
};
use crate::{Error, Result, atomic};

/// A question, and what the assistant has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) kind: Kind,
    /// What the user says; a chat begins with the story.
    pub(super) prompt: String,
    /// The word that is asked for.
    pub(super) word: &'static str,
    /// The answer to the letter.
    pub(super) answer: String,
}

/// All that is learnt from, and what is not.
pub(super) struct Corpus {
    pub(super) stories: Vec<String>,
    /// Chats: several questions about one story.
    pub(super) lessons: Vec<Vec<Question>>,
    /// Each the beginning of a chat.
    pub(super) held_out: Vec<Question>,
}

/// Questions of a lesson: half of what there is to ask, so that few answers can be read off other questions.
const NUM_TURNS: usize = 3;

impl Corpus {
    /// Draws stories and questions. Kinds of held-out questions take turns.
    ///
    /// # Panics
    /// If a story of a held-out question is among those learnt from, which the grammar rules out: its people never meet there.
    pub(super) fn draw(seed: u64, size: &Size) -> Self {
        let drawn = |part, count: usize| (0..count as u32).map(move |index| (index, Story::draw(seed, part, index)));
        let mut learnt = HashSet::new();
        let mut stories = Vec::new();
        for (_, story) in drawn(Part::Stories, size.num_stories) {
            stories.push(story.whole());
            learnt.insert(story.text);
        }
        let mut lessons = Vec::new();
        for (index, story) in drawn(Part::Lessons, size.num_lessons) {
            lessons.push((0..NUM_TURNS).map(|turn| ask(&story, index, turn)).collect());
            learnt.insert(story.text);
        }
        let mut held_out = Vec::new();
        for (index, story) in drawn(Part::HeldOut, size.num_held_out) {
            assert!(!learnt.contains(&story.text), "a held-out story is not among those learnt from: {}", story.text);
            held_out.push(ask(&story, index, 0));
        }
        Self { stories, lessons, held_out }
    }

    /// Writes `stories.jsonl`, `questions.jsonl` and `held-out.jsonl`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        write_lines(&folder.join(STORIES), self.stories.iter().map(|text| json!({"text": text}).to_string()))?;
        write_lines(&folder.join(QUESTIONS), self.lessons.iter().map(|lesson| chat(lesson)))?;
        write_lines(&folder.join(HELD_OUT), self.held_out.iter().map(|question| chat(std::slice::from_ref(question))))
    }
}

pub(super) const STORIES: &str = "stories.jsonl";
pub(super) const QUESTIONS: &str = "questions.jsonl";
pub(super) const HELD_OUT: &str = "held-out.jsonl";

/// A question of a chat about a story. Over all stories every kind of question comes in every turn.
fn ask(story: &Story, index: u32, turn: usize) -> Question {
    let index = index as usize;
    // Steps of 1 and 5 both go round six kinds; neither puts two kinds always behind each other.
    let step = if (index / Kind::ALL.len()).is_multiple_of(2) { 1 } else { Kind::ALL.len() - 1 };
    let fact = &story.facts[(index + turn * step) % Kind::ALL.len()];
    let prompt = if turn == 0 { format!("{} {}", story.text, fact.question) } else { fact.question.clone() };
    Question { kind: fact.kind, prompt, word: fact.word, answer: format!("Answer: {}", fact.statement) }
}

fn chat(questions: &[Question]) -> String {
    let message = |role, content: &str| json!({"role": role, "content": content});
    let turn = |question: &Question| [message("user", &question.prompt), message("assistant", &question.answer)];
    json!({"messages": questions.iter().flat_map(turn).collect::<Vec<_>>()}).to_string()
}

fn write_lines(path: &Path, lines: impl Iterator<Item = String>) -> Result<()> {
    let text: String = lines.map(|line| line + "\n").collect();
    atomic::write(path, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kind_is_asked_in_every_turn() {
        let corpus = Corpus::draw(0, &Size { num_lessons: 24, ..Size::TINY });
        for turn in 0..NUM_TURNS {
            let kinds: BTreeSet<usize> = corpus.lessons.iter().map(|lesson| lesson[turn].kind as usize).collect();
            assert_eq!(kinds.len(), Kind::ALL.len());
        }
        for lesson in &corpus.lessons {
            let kinds: BTreeSet<usize> = lesson.iter().map(|question| question.kind as usize).collect();
            assert_eq!(kinds.len(), NUM_TURNS, "{lesson:?}");
        }
        assert!(
            corpus
                .held_out
                .iter()
                .all(|question| question.prompt.contains('.') && question.answer.starts_with("Answer: "))
        );
    }

    #[test]
    fn files_are_of_forms_that_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let corpus = Corpus::draw(0, &Size::TINY);
        corpus.write(folder.path()).unwrap();
        let first =
            |name: &str| fs::read_to_string(folder.path().join(name)).unwrap().lines().next().unwrap().to_owned();
        assert_eq!(first(STORIES), json!({"text": corpus.stories[0]}).to_string());
        let asked = &corpus.held_out[0];
        let expected = json!({"messages": [
            {"role": "user", "content": asked.prompt},
            {"role": "assistant", "content": asked.answer},
        ]});
        assert_eq!(first(HELD_OUT), expected.to_string());
        assert_eq!(first(QUESTIONS).matches("assistant").count(), NUM_TURNS);
    }
}
