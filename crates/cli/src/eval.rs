//! `unsloth eval`

use std::{io::Write, path::PathBuf};

use anyhow::{Context, Result};
use unsloth_rs::{
    llm::dataset::TrainOn,
    recipe::{EvalConfig, evaluate},
};

use crate::{
    args::{DeviceArgs, ModelArgs, describe},
    note,
};

/// Options of `unsloth eval`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder of an adapter to apply
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// JSONL file of chats, instructions, prompts and completions, texts or tokens; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Tokens to predict: answers (of chats, and completions) or all [default: answers, all for plain text, labels for tokens]
    #[arg(long, value_name = "answers|all")]
    train_on: Option<TrainOn>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Documents computed at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch_size: usize,
    /// Longer examples are cut to this many tokens [default: the model's limit or 2048, the smaller]
    #[arg(long, value_name = "N")]
    max_seq_len: Option<usize>,
    /// Print {"loss", "perplexity", "tokens"} instead of a sentence
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let Args { model, adapter, data, train_on, device, batch_size, max_seq_len, json } = args;
    let device = device.open()?;
    let config =
        EvalConfig { model: model.model, adapter, data, train_on, dtype: model.dtype.into(), batch_size, max_seq_len };
    let found = evaluate(&device, &config)?;
    let line = if json {
        serde_json::to_string(&found)?
    } else {
        note(&describe("data", &found.data));
        format!("loss {:.6}, perplexity {:.4} over {} target tokens", found.loss, found.perplexity, found.tokens)
    };
    writeln!(std::io::stdout(), "{line}").context("cannot write to standard output")
}
