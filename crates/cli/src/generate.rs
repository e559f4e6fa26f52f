//! `unsloth generate`

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Instant,
};

use anyhow::{Context, Result};
use serde::Serialize;
use unsloth_rs::{
    llm::{
        Error,
        chat_template::ChatTemplate,
        generate::{GenerateOptions, StopReason, generate},
        hub::{self, Parts},
        sampler::Sampling,
        text_stream::TextStream,
        tokenizer::Tokenizer,
    },
    recipe::load_model,
};

use crate::{
    args::{DeviceArgs, ModelArgs},
    note,
};

/// Options of `unsloth generate`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder of an adapter to apply
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    prompt: Prompt,
    #[command(flatten)]
    device: DeviceArgs,
    /// Most tokens to add
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Go on behind an end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print {"prompt_tokens", "tokens", "text", "stop_reason", "tokens_per_second"} at the end instead of text as it comes
    #[arg(long)]
    json: bool,
}

/// What to continue.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Prompt {
    /// Token ids to continue, separated by commas
    #[arg(long, value_name = "ID,ID,..", value_delimiter = ',')]
    tokens: Option<Vec<i32>>,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// What a user says, to be answered by the model in the form of its chat template
    #[arg(long, value_name = "TEXT")]
    chat: Option<String>,
}

/// How each token is chosen. The filters work in the order in which they stand here.
#[derive(clap::Args)]
struct SamplingArgs {
    /// Divides the logits; 0 takes the most likely token each time
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    temperature: f64,
    /// Draw from the N most likely tokens alone [default: all]
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Draw from the most likely tokens that together have this probability [default: all]
    #[arg(long, value_name = "F")]
    top_p: Option<f64>,
    /// Draw from tokens at least this many times as likely as the most likely one [default: all]
    #[arg(long, value_name = "F")]
    min_p: Option<f64>,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl From<SamplingArgs> for Sampling {
    fn from(args: SamplingArgs) -> Self {
        let SamplingArgs { temperature, top_k, top_p, min_p, seed } = args;
        Self { temperature, top_k, top_p, min_p, seed }
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Found {
    prompt_tokens: Vec<i32>,
    tokens: Vec<i32>,
    /// `null` for a model without a tokenizer.
    text: Option<String>,
    stop_reason: StopReason,
    tokens_per_second: f64,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let sampling = Sampling::from(args.sampling);
    sampling.validate()?;
    let device = args.device.open()?;
    let folder = &hub::folder(&args.model.model, Parts::All)?;
    // Ids can be continued without a tokenizer, text cannot.
    let has_text = args.prompt.prompt.is_some() || args.prompt.chat.is_some();
    let has_tokenizer = has_text || Tokenizer::exists(folder);
    let model = load_model(&device, folder, args.adapter.as_deref(), args.model.dtype.into())?;
    let tokenizer = has_tokenizer.then(|| Tokenizer::load(folder)).transpose()?;
    let prompt_tokens = match (&args.prompt, &tokenizer) {
        (Prompt { prompt: Some(text), .. }, Some(tokenizer)) => tokenizer.encode(text)?,
        (Prompt { chat: Some(text), .. }, Some(tokenizer)) => {
            let template =
                ChatTemplate::load(folder)?.ok_or_else(|| Error::NoChatTemplate { model: folder.clone() })?;
            tokenizer.encode_rendered(&template.prompt(text)?)?
        }
        _ => args.prompt.tokens.unwrap_or_default(),
    };

    let options = GenerateOptions { max_new_tokens: args.max_new_tokens, ignore_eos: args.ignore_eos, sampling };
    let mut output = (!args.json).then(|| Output::new(tokenizer.as_ref()));
    // The first failure to show a token; the generation itself cannot be interrupted from here.
    let mut shown = Ok(());
    let start = Instant::now();
    let generation = generate(&model, &prompt_tokens, options, |token| {
        if let (Some(output), Ok(())) = (&mut output, &shown) {
            shown = output.show(token);
        }
    })?;
    let tokens_per_second = generation.tokens.len() as f64 / start.elapsed().as_secs_f64().max(1e-9);
    shown?;
    if let Some(output) = output {
        output.finish()?;
        let (count, reason) = (generation.tokens.len(), generation.stop_reason);
        note(&format!("{count} tokens, {tokens_per_second:.1} tokens/s, stopped by {reason}"));
        return Ok(());
    }
    let text = tokenizer.map(|tokenizer| tokenizer.decode(&generation.tokens)).transpose()?;
    let (tokens, stop_reason) = (generation.tokens, generation.stop_reason);
    let found = Found { prompt_tokens, tokens, text, stop_reason, tokens_per_second };
    print(&format!("{}\n", serde_json::to_string(&found)?))
}

/// Standard output, with text or, for a model without a tokenizer, ids.
struct Output<'a> {
    text: Option<TextStream<'a>>,
    separator: &'static str,
}

impl<'a> Output<'a> {
    fn new(tokenizer: Option<&'a Tokenizer>) -> Self {
        Self { text: tokenizer.map(TextStream::new), separator: "" }
    }

    fn show(&mut self, token: i32) -> Result<()> {
        match &mut self.text {
            Some(text) => print(&text.push(token)?),
            None => print(&format!("{}{token}", std::mem::replace(&mut self.separator, ","))),
        }
    }

    fn finish(self) -> Result<()> {
        let rest = self.text.map(TextStream::finish).transpose()?.unwrap_or_default();
        print(&format!("{rest}\n"))
    }
}

fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("cannot write to standard output")
}
