//! From the fields of an example to its tokens and labels.

use std::path::Path;

use unsloth_core::ops::cross_entropy::IGNORE_INDEX;

use super::{
    Labelled, ReadOptions, TrainOn, answers,
    example::{Place, Shape},
    tokens,
};
use crate::{
    Error, Result,
    chat_template::{ChatTemplate, Conversation, conversation},
    json::{Json, Object},
    special_tokens::SpecialTokens,
    tokenizer::Tokenizer,
};

/// Alpaca's prompts, with the answer on a line of its own. Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca
const ALPACA: &str = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
    ### Instruction:\n{instruction}\n\n### Response:\n";
const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further context. \
    Write a response that appropriately completes the request.\n\n\
    ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n";

/// Reads examples; loads tokenizer and chat template when the first one needs them.
pub(super) struct Reader<'a> {
    options: ReadOptions<'a>,
    text: Option<TextModel>,
    /// `None`: not looked for yet.
    template: Option<Option<ChatTemplate>>,
}

struct TextModel {
    tokenizer: Tokenizer,
    eos: String,
}

impl<'a> Reader<'a> {
    pub(super) fn new(options: ReadOptions<'a>) -> Self {
        Self { options, text: None, template: None }
    }

    pub(super) fn options(&self) -> &ReadOptions<'a> {
        &self.options
    }

    /// The form of a file by its first line.
    pub(super) fn shape(&mut self, place: &Place<'_>, text: &[u8]) -> Result<Shape> {
        let shape = place.shape(text)?;
        let rule = match (shape, self.options.train_on) {
            (Shape::Tokens, Some(_)) => "absent for data that has labels of its own",
            (Shape::Text, Some(TrainOn::Answers)) => "all for plain text",
            _ => return Ok(shape),
        };
        let value = self.options.train_on.map(|train_on| train_on.to_string()).unwrap_or_default();
        Err(Error::InvalidOption {
            field: "train_on",
            value,
            rule: format!("{rule}, as in `{}`", place.path.display()),
        })
    }

    /// The tokens of a line.
    pub(super) fn read(&mut self, shape: Shape, place: &Place<'_>, text: &[u8]) -> Result<Labelled> {
        if shape == Shape::Tokens {
            return tokens::read(place, text, self.options.vocab_size);
        }
        let example = place.object(text, shape)?;
        let labelled = match shape {
            Shape::Tokens | Shape::Text => self.text(place, &example),
            Shape::Messages => self.chat(place, read_chat(place, &example, "messages")?),
            Shape::Conversations => self.chat(place, read_chat(place, &example, "conversations")?),
            Shape::Completion => self.completion(place, &example),
            Shape::Alpaca => self.alpaca(place, &example),
        }?;
        let vocab_size = self.options.vocab_size;
        match labelled.ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= vocab_size)) {
            Some(id) => {
                let message = format!("becomes token {id}, and the vocabulary size of the model is {vocab_size}");
                Err(place.error(shape.fields()[0], message))
            }
            None => Ok(labelled),
        }
    }

    fn on_answers(&self) -> bool {
        self.options.train_on != Some(TrainOn::All)
    }

    /// The whole text, begun as the tokenizer begins texts and ended with its end-of-sequence token.
    fn text(&mut self, place: &Place<'_>, example: &Object) -> Result<Labelled> {
        let text = required_text(place, example, "text")?;
        let TextModel { tokenizer, eos } = text_model(&mut self.text, self.options.model)?;
        let ids = tokenizer.encode(&ended(text.to_owned(), eos))?;
        Ok(Labelled { labels: ids.clone(), ids })
    }

    fn completion(&mut self, place: &Place<'_>, example: &Object) -> Result<Labelled> {
        if matches!(example.get("prompt"), Some(Json::List(_))) {
            let (prompt, _) = read_chat(place, example, "prompt")?;
            let completion = conversation::read_messages(example, "completion").map_err(|what| place.invalid(what))?;
            let whole = prompt.with(prompt.messages.iter().cloned().chain(completion).collect());
            let template = template_for(&mut self.template, self.options.model, (place, "completion"), &whole)?;
            let render = |chat, add| template.render(chat, add).map_err(|error| place.rendering(error));
            let (prompt, whole) = (render(&prompt, true)?.text, render(&whole, false)?.text);
            let tokenizer = &text_model(&mut self.text, self.options.model)?.tokenizer;
            let (prompt, ids) = (tokenizer.encode_rendered(&prompt)?, tokenizer.encode_rendered(&whole)?);
            return Ok(self.after(&prompt, ids));
        }
        let prompt = required_text(place, example, "prompt")?.to_owned();
        let completion = required_text(place, example, "completion")?.to_owned();
        self.texts(&prompt, completion)
    }

    /// A prompt and what follows it without a chat template.
    fn texts(&mut self, prompt: &str, completion: String) -> Result<Labelled> {
        let TextModel { tokenizer, eos } = text_model(&mut self.text, self.options.model)?;
        let ids = tokenizer.encode(&format!("{prompt}{}", ended(completion, eos)))?;
        let prompt = tokenizer.encode(prompt)?;
        Ok(self.after(&prompt, ids))
    }

    /// Labels from where the tokens differ from those of the prompt alone: a token across the border belongs to the completion.
    fn after(&self, prompt: &[i32], ids: Vec<i32>) -> Labelled {
        let mut labels = ids.clone();
        if self.on_answers() {
            let common = prompt.iter().zip(&ids).take_while(|(a, b)| a == b).count();
            labels[..common].fill(IGNORE_INDEX);
        }
        Labelled { ids, labels }
    }

    fn alpaca(&mut self, place: &Place<'_>, example: &Object) -> Result<Labelled> {
        let instruction = required_text(place, example, "instruction")?;
        let output = required_text(place, example, "output")?;
        let optional = |field| conversation::text_field(example, field).map_err(|what| place.invalid(what));
        let (input, system) = (optional("input")?.unwrap_or_default(), optional("system")?.unwrap_or_default());
        if matches!(example.get("history"), Some(Json::List(turns)) if !turns.is_empty()) {
            return Err(place.error("history", "is not read; use `messages` for chats of several turns".into()));
        }
        if template(&mut self.template, self.options.model)?.is_some() {
            let system = (!system.is_empty()).then(|| conversation::message("system", system));
            let question = if input.is_empty() { instruction.to_owned() } else { format!("{instruction}\n{input}") };
            let turns =
                [conversation::message("user", &question), conversation::message(conversation::ASSISTANT, output)];
            let messages = system.into_iter().chain(turns).collect();
            return self.chat(place, (Conversation { messages, ..Conversation::default() }, "output"));
        }
        let form = if input.is_empty() { ALPACA } else { ALPACA_WITH_INPUT };
        let form = if system.is_empty() { form.to_owned() } else { format!("{system}\n\n{form}") };
        // Split first: an instruction may well hold `{input}`.
        let (before, after) = form.split_once("{instruction}").unwrap_or((&form, ""));
        let prompt = format!("{before}{instruction}{}", after.replace("{input}", input));
        self.texts(&prompt, output.to_owned())
    }

    fn chat(&mut self, place: &Place<'_>, (conversation, field): (Conversation, &'static str)) -> Result<Labelled> {
        let on_answers = self.on_answers();
        let template = template_for(&mut self.template, self.options.model, (place, field), &conversation)?;
        let rendered = template.render(&conversation, false).map_err(|error| place.rendering(error))?;
        let text = text_model(&mut self.text, self.options.model)?;
        let encoded = text.tokenizer.encode_ranges(&rendered.text, false)?;
        let mut labels = encoded.ids.clone();
        if on_answers {
            let spans = answers::find(template, &conversation, &rendered, &encoded.ranges).map_err(|message| {
                Error::AnswerSpan { path: place.path.to_owned(), line: place.line, message: message + 1 }
            })?;
            answers::mask(&mut labels, &encoded.ranges, &spans);
        }
        Ok(Labelled { ids: encoded.ids, labels })
    }
}

fn text_model<'t>(slot: &'t mut Option<TextModel>, folder: &Path) -> Result<&'t TextModel> {
    let model = match slot.take() {
        Some(model) => model,
        None => {
            let eos = SpecialTokens::load(folder)?.get("eos_token").unwrap_or_default().to_owned();
            TextModel { tokenizer: Tokenizer::load(folder)?, eos }
        }
    };
    Ok(slot.insert(model))
}

fn template<'t>(slot: &'t mut Option<Option<ChatTemplate>>, folder: &Path) -> Result<Option<&'t ChatTemplate>> {
    let template = match slot.take() {
        Some(template) => template,
        None => ChatTemplate::load(folder)?,
    };
    Ok(slot.insert(template).as_ref())
}

/// The chat template, for a conversation whose roles it knows.
fn template_for<'t>(
    slot: &'t mut Option<Option<ChatTemplate>>,
    folder: &Path,
    (place, field): (&Place<'_>, &'static str),
    conversation: &Conversation,
) -> Result<&'t ChatTemplate> {
    let template = template(slot, folder)?.ok_or_else(|| Error::NoChatTemplate { model: folder.to_owned() })?;
    match conversation.unknown_role(template) {
        Some(index) => Err(place.error(field, conversation.describe_unknown_role(index))),
        None => Ok(template),
    }
}

fn read_chat(place: &Place<'_>, example: &Object, field: &'static str) -> Result<(Conversation, &'static str)> {
    let conversation = Conversation::read(example, field).map_err(|what| place.invalid(what))?;
    Ok((conversation, field))
}

fn required_text<'a>(place: &Place<'_>, example: &'a Object, field: &'static str) -> Result<&'a str> {
    let text = conversation::text_field(example, field).map_err(|what| place.invalid(what))?;
    text.ok_or_else(|| place.error(field, "is missing or null".into()))
}

/// The text with the end-of-sequence token at its end, once.
fn ended(text: String, eos: &str) -> String {
    if text.ends_with(eos) { text } else { text + eos }
}
