//! Generation with cached keys and values: the prompt in one pass, then one token a pass.

use std::fmt;

use crate::{Error, Result, decoder::Decoder, sampler::Sampling};

/// How a prompt is continued.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to add; may be 0.
    pub max_new_tokens: usize,
    /// Whether to go on behind an end-of-sequence token.
    pub ignore_eos: bool,
    /// How each token is chosen.
    pub sampling: Sampling,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    /// The model gave an end-of-sequence token, which is the last of the new tokens.
    Eos,
    /// As many tokens as were asked for.
    Length,
    /// The model's longest sequence is full.
    Context,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StopReason::Eos => "eos",
            StopReason::Length => "length",
            StopReason::Context => "context",
        })
    }
}

/// A finished generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The new tokens alone.
    pub tokens: Vec<i32>,
    /// Why it ended.
    pub stop_reason: StopReason,
}

/// Continues a prompt, calling `on_token` for each new token.
///
/// # Errors
/// [`Error::InvalidOption`] for a prompt that is empty, too long for the model or has an id outside the vocabulary, and as
/// [`Sampling::validate`]; [`Error::NonFiniteLogits`]; [`unsloth_core::Error::OutOfMemory`].
pub fn generate(
    model: &Decoder,
    prompt: &[i32],
    options: GenerateOptions,
    mut on_token: impl FnMut(i32),
) -> Result<Generation> {
    options.sampling.validate()?;
    check_prompt(model, prompt)?;
    let limit = model.config().max_position_embeddings;
    let capacity = limit.min(prompt.len().saturating_add(options.max_new_tokens));
    let end_of_context = if capacity == limit && limit - prompt.len() < options.max_new_tokens {
        StopReason::Context
    } else {
        StopReason::Length
    };
    let mut tokens = Vec::with_capacity(capacity - prompt.len());
    let mut cache = model.kv_cache(capacity)?;
    let mut past = 0;
    while prompt.len() + tokens.len() < capacity {
        let new = if past == 0 { prompt } else { &tokens[tokens.len() - 1..] };
        let logits = model.next_logits(new, past, &mut cache)?;
        past += new.len();
        let index = options.sampling.choose(&logits, past).ok_or(Error::NonFiniteLogits { position: past })?;
        // Below the vocabulary's size, which fits i32: checked when the configuration is read.
        let token = index as i32;
        tokens.push(token);
        on_token(token);
        if !options.ignore_eos && model.config().eos_token_ids.contains(&token) {
            return Ok(Generation { tokens, stop_reason: StopReason::Eos });
        }
    }
    Ok(Generation { tokens, stop_reason: end_of_context })
}

fn check_prompt(model: &Decoder, prompt: &[i32]) -> Result<()> {
    let invalid = |value: String, rule: String| Err(Error::InvalidOption { field: "prompt", value, rule });
    let (vocab_size, limit) = (model.config().vocab_size, model.config().max_position_embeddings);
    if prompt.is_empty() {
        return invalid("0 tokens".to_owned(), "at least 1 token".to_owned());
    }
    if prompt.len() > limit {
        return invalid(format!("{} tokens", prompt.len()), format!("at most the model's {limit} tokens"));
    }
    match prompt.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= vocab_size)) {
        Some(id) => invalid(format!("id {id}"), format!("ids from 0 to {}", vocab_size - 1)),
        None => Ok(()),
    }
}
