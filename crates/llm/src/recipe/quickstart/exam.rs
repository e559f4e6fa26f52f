//! Answers to held-out questions, and what guessing would get.

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;

use super::{corpus::Question, grammar::Kind};
use crate::{
    Error, Result,
    chat_template::ChatTemplate,
    decoder::Decoder,
    generate::{GenerateOptions, StopReason, generate},
    sampler::Sampling,
    tokenizer::Tokenizer,
};

/// Longer than any right answer by far.
const MAX_ANSWER_TOKENS: usize = 24;

/// How many answers were right.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Score {
    /// Answers equal to the letter to what was expected, and ended there.
    pub right: usize,
    /// Questions.
    pub total: usize,
}

impl Score {
    /// Share of right answers, in `[0, 1]`.
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.total.max(1) as f64
    }
}

/// A question as it was answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answered {
    /// The story and the question.
    pub prompt: String,
    /// The right answer.
    pub expected: String,
    /// What the model said.
    pub answer: String,
}

/// Turns texts into prompts of a model and tokens into texts.
pub(super) struct Speech {
    pub(super) tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Speech {
    pub(super) fn load(folder: &Path) -> Result<Self> {
        let no_template = || Error::NoChatTemplate { model: folder.to_owned() };
        let template = ChatTemplate::load(folder)?.ok_or_else(no_template)?;
        Ok(Self { tokenizer: Tokenizer::load(folder)?, template })
    }

    /// What a model writes behind the beginning of a story.
    pub(super) fn story(&self, model: &Decoder, beginning: &str, sampling: Sampling) -> Result<String> {
        let prompt = self.tokenizer.encode(beginning)?;
        let max_new_tokens = model.config().max_position_embeddings;
        let options = GenerateOptions { max_new_tokens, ignore_eos: false, sampling };
        let told = generate(model, &prompt, options, |_| ())?;
        Ok(format!("{beginning}{}", self.tokenizer.decode(&told.tokens)?))
    }

    /// The most likely answer to a question, and why it ended.
    fn answer(&self, model: &Decoder, question: &Question) -> Result<(String, StopReason)> {
        let prompt = self.tokenizer.encode_rendered(&self.template.prompt(&question.prompt)?)?;
        let options =
            GenerateOptions { max_new_tokens: MAX_ANSWER_TOKENS, ignore_eos: false, sampling: Sampling::GREEDY };
        let said = generate(model, &prompt, options, |_| ())?;
        Ok((self.tokenizer.decode(&said.tokens)?, said.stop_reason))
    }
}

/// Asks all the questions. `shown` of them are given back as they were answered.
pub(super) fn examine(
    model: &Decoder,
    speech: &Speech,
    questions: &[Question],
    shown: usize,
) -> Result<(Score, Vec<Answered>)> {
    let mut score = Score::default();
    let mut answered = Vec::new();
    for question in questions {
        let (answer, stop_reason) = speech.answer(model, question)?;
        score.total += 1;
        score.right += usize::from(answer == question.answer && stop_reason == StopReason::Eos);
        if answered.len() < shown {
            answered.push(Answered { prompt: question.prompt.clone(), expected: question.answer.clone(), answer });
        }
    }
    Ok((score, answered))
}

/// What one gets by always filling in the word that is most often asked for in the lessons, for each kind of question; of equally
/// frequent ones the last in the alphabet.
pub(super) fn majority(lessons: &[Vec<Question>], questions: &[Question]) -> Score {
    let mut counts: BTreeMap<(Kind, &str), usize> = BTreeMap::new();
    for question in lessons.iter().flatten() {
        *counts.entry((question.kind, question.word)).or_default() += 1;
    }
    let guess = |kind| counts.iter().filter(|((of, _), _)| *of == kind).max_by_key(|(_, count)| **count);
    let guesses = Kind::ALL.map(|kind| guess(kind).map(|((_, word), _)| *word));
    let right = questions.iter().filter(|question| guesses[question.kind as usize] == Some(question.word)).count();
    Score { right, total: questions.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(kind: Kind, word: &'static str) -> Question {
        Question { kind, prompt: String::new(), word, answer: String::new() }
    }

    #[test]
    fn majority_is_counted_by_kind() {
        let learnt =
            [("red", 2), ("blue", 3)].map(|(answer, count)| vec![question(Kind::Colour, answer); count]).concat();
        let learnt = [learnt, vec![question(Kind::Who, "Tom"), question(Kind::Who, "Ben")]].concat();
        let asked = [
            question(Kind::Colour, "blue"),
            question(Kind::Colour, "red"),
            question(Kind::Who, "Tom"),
            question(Kind::Who, "blue"),
            question(Kind::Where, "park"),
        ];
        let score = majority(&[learnt], &asked);
        assert_eq!((score.right, score.total, score.accuracy()), (2, 5, 0.4));
    }
}
