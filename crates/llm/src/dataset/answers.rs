//! Where the answers stand in a rendered conversation.
//!
//! A template that marks them with `{% generation %}` says so itself. For the others, an answer begins behind the generation prompt
//! of the messages before it, and ends where the conversation up to it ends. Both texts have to be a prefix of the whole one.
//!
//! Where they are not, since the template renders a message otherwise when others follow (reasoning that is left out of earlier
//! answers, tools that stand before the last question, an end of text after the last turn), the whole conversation is rendered
//! again with one string replaced: what stays the same before and after it says where that string stands. The answer begins behind
//! what follows the message before it in a prompt, and ends with what follows it at the end of a conversation.

use std::ops::Range;

use unsloth_core::ops::cross_entropy::IGNORE_INDEX;

use crate::{
    chat_template::{
        ChatTemplate, Conversation, Rendered,
        conversation::{ASSISTANT, role},
    },
    json::{Json, Object},
};

/// A string that no template has a reason to change, and that no text holds.
const PROBE: &str = "\u{fdd2}answer\u{fdd3}";

/// Byte ranges of the answers, in order, each with its end of turn. `tokens` are the byte ranges of the tokens of the text.
///
/// # Errors
/// The index of a message whose range cannot be told.
pub(super) fn find(
    template: &ChatTemplate,
    conversation: &Conversation,
    rendered: &Rendered,
    tokens: &[Range<usize>],
) -> Result<Vec<Range<usize>>, usize> {
    if template.has_generation(conversation) {
        return Ok(rendered.generated.clone());
    }
    let finder = Finder { template, conversation, whole: &rendered.text, tokens };
    let answers = conversation.messages.iter().enumerate().filter(|(_, message)| role(message) == ASSISTANT);
    let mut spans: Vec<Range<usize>> = Vec::new();
    for (index, _) in answers {
        let span = finder.span(index).ok_or(index)?;
        let after = spans.last().map_or(0, |last| last.end);
        if span.is_empty() || span.start < after {
            return Err(index);
        }
        spans.push(span);
    }
    Ok(spans)
}

/// Takes the label of every token that no range touches.
pub(super) fn mask(labels: &mut [i32], tokens: &[Range<usize>], ranges: &[Range<usize>]) {
    let mut ranges = ranges.iter().peekable();
    for (label, token) in labels.iter_mut().zip(tokens) {
        while ranges.next_if(|range| range.end <= token.start).is_some() {}
        if ranges.peek().is_none_or(|range| range.start >= token.end) {
            *label = IGNORE_INDEX;
        }
    }
}

struct Finder<'a> {
    template: &'a ChatTemplate,
    conversation: &'a Conversation,
    whole: &'a str,
    tokens: &'a [Range<usize>],
}

/// A string of a message that the template prints.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Content,
    /// Name of the first function called.
    Call,
}

impl Finder<'_> {
    fn span(&self, index: usize) -> Option<Range<usize>> {
        Some(self.start(index)?..self.end(index)?)
    }

    fn start(&self, index: usize) -> Option<usize> {
        let content = || self.place(index, Part::Content).map(|content| content.start);
        let is_prefix = |text: &String| self.whole.starts_with(text.as_str());
        let Some(prompt) = self.beginning(index, true).filter(is_prefix) else {
            let behind = self.behind_the_one_before(index);
            return behind.or_else(|| content().map(|start| self.without_space(start, 0)));
        };
        let without_prompt = self.beginning(index, false);
        if without_prompt.is_none_or(|text| text.len() < prompt.len()) {
            return Some(prompt.len());
        }
        // The template has no generation prompt: whatever stands before the content is not learnt.
        Some(self.without_space(content().unwrap_or(prompt.len()), prompt.len()))
    }

    fn end(&self, index: usize) -> Option<usize> {
        if index + 1 == self.conversation.messages.len() {
            return Some(self.whole.len());
        }
        if let Some(upto) = self.beginning(index + 1, false).filter(|text| self.whole.starts_with(text)) {
            return Some(upto.len());
        }
        [Part::Content, Part::Call].into_iter().find_map(|part| {
            let place = self.place(index, part)?;
            let end_of_turn = self.behind(index, part, false)?;
            let same = common_prefix(&self.whole[place.end..], &end_of_turn);
            Some(self.token_boundary(place.end + same))
        })
    }

    /// Behind the generation prompt that follows the message before.
    fn behind_the_one_before(&self, index: usize) -> Option<usize> {
        let before = index.checked_sub(1)?;
        let content = self.place(before, Part::Content)?;
        let prompt = self.behind(before, Part::Content, true)?;
        self.whole[content.end..].starts_with(&prompt).then_some(content.end + prompt.len())
    }

    /// Tokenizers put the space before a word into its token.
    fn without_space(&self, start: usize, least: usize) -> usize {
        self.whole[..start].trim_end_matches(' ').len().max(least).min(start)
    }

    /// Where a string of a message stands, bounded by all that stays the same when it is replaced.
    fn place(&self, index: usize, part: Part) -> Option<Range<usize>> {
        let mut messages = self.conversation.messages.clone();
        messages[index] = replaced(&messages[index], part)?;
        let text = self.render(messages, false)?;
        let (before, after) = text.split_once(PROBE).filter(|(_, after)| !after.contains(PROBE))?;
        let end = self.whole.len().checked_sub(after.len()).filter(|&end| end >= before.len())?;
        (self.whole.starts_with(before) && self.whole.ends_with(after)).then_some(before.len()..end)
    }

    /// What follows a string of a message in the conversation that ends with the message.
    fn behind(&self, index: usize, part: Part, add_generation_prompt: bool) -> Option<String> {
        let mut messages = self.conversation.messages[..=index].to_vec();
        messages[index] = replaced(&messages[index], part)?;
        let text = self.render(messages, add_generation_prompt)?;
        text.split_once(PROBE).map(|(_, behind)| behind.to_owned())
    }

    /// The first messages rendered alone; `None` if there are none, or if the template refuses to.
    fn beginning(&self, count: usize, add_generation_prompt: bool) -> Option<String> {
        let messages = self.conversation.messages[..count].to_vec();
        if messages.is_empty() { None } else { self.render(messages, add_generation_prompt) }
    }

    fn render(&self, messages: Vec<Object>, add_generation_prompt: bool) -> Option<String> {
        let rendered = self.template.render(&self.conversation.with(messages), add_generation_prompt);
        rendered.ok().map(|rendered| rendered.text)
    }

    /// The place, or the beginning of the token that goes across it.
    fn token_boundary(&self, place: usize) -> usize {
        let across = self.tokens.iter().find(|token| token.start < place && place < token.end);
        across.map_or(place, |token| token.start)
    }
}

/// The message with [`PROBE`] in place of one of its strings; `None` if it does not have it.
fn replaced(message: &Object, part: Part) -> Option<Object> {
    let mut message = message.clone();
    let place = match part {
        Part::Content => message.get_mut("content")?,
        Part::Call => {
            let Json::List(calls) = message.get_mut("tool_calls")? else { return None };
            let Some(Json::Object(call)) = calls.first_mut() else { return None };
            let Json::Object(function) = call.get_mut("function")? else { return None };
            function.get_mut("name")?
        }
    };
    *place = Json::Text(PROBE.to_owned());
    Some(message)
}

/// Bytes that two texts have in common at their beginnings, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        chat_template::tests::{FAMILIES, cases, template},
        tokenizer::{Encoded, Tokenizer},
    };

    /// Ids and mask of a case, or the message that has no range.
    fn answers(
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
        conversation: &Conversation,
    ) -> Result<(Encoded, Vec<i32>), usize> {
        let rendered = template.render(conversation, false).unwrap();
        let encoded = tokenizer.encode_ranges(&rendered.text, false).unwrap();
        let ranges = find(template, conversation, &rendered, &encoded.ranges)?;
        let mut labels = vec![0; encoded.ids.len()];
        mask(&mut labels, &encoded.ranges, &ranges);
        let mask = labels.iter().map(|&label| i32::from(label == 0)).collect();
        Ok((encoded, mask))
    }

    /// Ids and masks are those of transformers, whose masks come from the marks; without marks the ranges are found.
    #[test]
    fn answers_are_those_of_transformers() {
        let mut num_compared = 0;
        let mut not_found = Vec::new();
        for family in FAMILIES {
            for file in ["marked.jinja", "chat_template.jinja"] {
                let (folder, template) = template(family, file);
                let tokenizer = Tokenizer::load(folder.path()).unwrap();
                let usable = |case: &crate::chat_template::tests::Case| {
                    !case.add_generation_prompt && case.expected["error"].is_null()
                };
                for case in cases(family).into_iter().filter(usable) {
                    let list =
                        |field: &str| -> Vec<i32> { serde_json::from_value(case.expected[field].clone()).unwrap() };
                    let place = format!("{family}, {file}, {}", case.name);
                    let Ok((encoded, mask)) = answers(&template, &tokenizer, &case.conversation) else {
                        not_found.push(place);
                        continue;
                    };
                    assert_eq!(encoded.ids, list("ids"), "{place}");
                    let mut expected = list("mask");
                    // Of several tokens of one character transformers takes the first alone.
                    for (token, pair) in encoded.ranges.windows(2).enumerate().filter(|(_, pair)| pair[0] == pair[1]) {
                        assert!(!pair[0].is_empty());
                        expected[token + 1] |= expected[token];
                    }
                    assert_eq!(mask, expected, "{place}");
                    num_compared += 1;
                }
            }
        }
        assert_eq!(not_found, [""; 0]);
        assert!(num_compared > 250, "{num_compared}");
    }

    #[test]
    fn masks_tokens_that_no_range_touches() {
        // A token across the beginning of a range counts; one without text, as a tokenizer adds, does not.
        let tokens = [0..0, 0..3, 3..5, 5..9, 9..9, 9..12, 12..14];
        let mut labels = [1, 2, 3, 4, 5, 6, 7];
        mask(&mut labels, &tokens, &[4..9, 12..14]);
        assert_eq!(labels, [-100, -100, 3, 4, -100, -100, 7]);
        mask(&mut labels, &tokens, &[]);
        assert_eq!(labels, [-100; 7]);
    }

    #[test]
    fn common_prefixes_end_at_characters() {
        assert_eq!([common_prefix("aé|", "aè|"), common_prefix("é", "éa"), common_prefix("", "a")], [1, 2, 0]);
    }
}
