//! `unsloth train`

use std::path::PathBuf;

use anyhow::Result;
use clap::ArgAction;
use unsloth_rs::{
    llm::{
        dataset::{Sample, TrainOn},
        decoder::Targets,
    },
    recipe::{Event, Method, RunLength, StepRecord, Summary, TrainConfig, Warmup, train},
    train::{AdamWConfig, Checkpointing, ScheduleKind},
};

use crate::{
    args::{DeviceArgs, ModelArgs, describe},
    note,
};

/// Options of `unsloth train`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// JSONL file of chats, instructions, prompts and completions, texts or tokens; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Folder for the adapter or the model, the tokenizer's files and metrics.jsonl
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// What is trained: lora (adapters), full (every weight) or scratch (every weight, from random ones; of the model's folder,
    /// config.json and the tokenizer's files are read)
    #[arg(long, value_name = "METHOD", default_value = "lora")]
    method: Method,
    /// Folder of an adapter to go on from
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Seed of the order of the data, of new adapters and of random weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Inner dimension of the adapters [default: that of --adapter, else 16]
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// The adapters' update is multiplied by alpha / rank [default: that of --adapter, else 16]
    #[arg(long, value_name = "F")]
    alpha: Option<f32>,
    /// all-linear, or names of the layers to adapt, such as q_proj,v_proj [default: those of --adapter, else all-linear]
    #[arg(long, value_name = "NAME,NAME,..")]
    targets: Option<Targets>,
    /// Tokens to learn: answers (of chats, and completions) or all [default: answers, all for plain text, labels for tokens]
    #[arg(long, value_name = "answers|all")]
    train_on: Option<TrainOn>,
    /// Longer examples are cut to this many tokens [default: the model's limit or 2048, the smaller]
    #[arg(long, value_name = "N")]
    max_seq_len: Option<usize>,
    /// Put as many documents into a sequence as fit; they do not see each other
    #[arg(long, value_name = "true|false", default_value_t = true, action = ArgAction::Set)]
    packing: bool,
    /// Another order of the data in each epoch
    #[arg(long, value_name = "true|false", default_value_t = true, action = ArgAction::Set)]
    shuffle: bool,
    /// Optimiser steps to take
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<usize>,
    /// Passes over the data, where --steps is not given
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    epochs: f64,
    /// Sequences in a micro-batch
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch_size: usize,
    /// Micro-batches in a step
    #[arg(long, value_name = "N", default_value_t = 1)]
    grad_accum: usize,
    #[command(flatten)]
    optimizer: OptimizerArgs,
    /// Layers whose activations are computed again instead of kept: none, every:N (segments of N layers) or sqrt
    #[arg(long, value_name = "POLICY", default_value = "none")]
    checkpointing: Checkpointing,
    /// No progress on standard error
    #[arg(long)]
    quiet: bool,
}

/// How parameters change.
#[derive(clap::Args)]
struct OptimizerArgs {
    /// Learning rate after the warm-up
    #[arg(long, value_name = "F", default_value_t = 2e-4)]
    learning_rate: f64,
    /// Learning rate after the warm-up: cosine (to 0), linear (to 0) or constant
    #[arg(long, value_name = "KIND", default_value = "cosine")]
    schedule: ScheduleKind,
    /// Steps during which the learning rate rises from 0
    #[arg(long, value_name = "N", conflicts_with = "warmup_ratio")]
    warmup_steps: Option<usize>,
    /// Share of the run during which the learning rate rises, where --warmup-steps is not given
    #[arg(long, value_name = "F", default_value_t = 0.03)]
    warmup_ratio: f64,
    /// Decoupled weight decay of AdamW
    #[arg(long, value_name = "F", default_value_t = 0.01)]
    weight_decay: f32,
    /// Decay of AdamW's first moment
    #[arg(long, value_name = "F", default_value_t = 0.9)]
    beta1: f32,
    /// Decay of AdamW's second moment
    #[arg(long, value_name = "F", default_value_t = 0.999)]
    beta2: f32,
    /// Added to the root of AdamW's second moment
    #[arg(long, value_name = "F", default_value_t = 1e-8)]
    adam_eps: f32,
    /// Gradients with a larger norm are scaled down to it
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    max_grad_norm: f32,
}

impl From<Args> for TrainConfig {
    fn from(args: Args) -> Self {
        let OptimizerArgs { beta1, beta2, adam_eps: eps, weight_decay, .. } = args.optimizer;
        Self {
            model: args.model.model,
            data: args.data,
            output: args.output,
            method: args.method,
            adapter: args.adapter,
            dtype: args.model.dtype.into(),
            seed: args.seed,
            rank: args.rank,
            alpha: args.alpha,
            targets: args.targets,
            train_on: args.train_on,
            max_seq_len: args.max_seq_len,
            packing: args.packing,
            shuffle: args.shuffle,
            length: args.steps.map_or(RunLength::Epochs(args.epochs), RunLength::Steps),
            batch_size: args.batch_size,
            grad_accum: args.grad_accum,
            learning_rate: args.optimizer.learning_rate,
            schedule: args.optimizer.schedule,
            warmup: args.optimizer.warmup_steps.map_or(Warmup::Ratio(args.optimizer.warmup_ratio), Warmup::Steps),
            adamw: AdamWConfig { beta1, beta2, eps, weight_decay },
            max_grad_norm: Some(args.optimizer.max_grad_norm),
            checkpointing: args.checkpointing,
        }
    }
}

pub(crate) fn run(args: Args) -> Result<()> {
    let device = args.device.open()?;
    let quiet = args.quiet;
    let mut total_steps = 0;
    let summary = train(&device, &args.into(), &mut |event| {
        if let Event::Prepared(prepared) = &event {
            total_steps = prepared.total_steps;
        }
        if !quiet {
            report(event, total_steps);
        }
    })?;
    if !quiet {
        note(&describe_summary(&summary));
    }
    Ok(())
}

fn report(event: Event, total_steps: usize) {
    match event {
        Event::Prepared(prepared) => {
            note(&format!("{} (limit {} tokens)", describe(&prepared.data), prepared.max_seq_len));
            if let Some(sample) = &prepared.sample {
                note(&describe_sample(sample));
            }
            if !prepared.unused_tensors.is_empty() {
                note(&format!("warning: tensors without a place in the model: {}", prepared.unused_tensors.join(", ")));
            }
            note(&format!("training {} parameters for {} steps", prepared.num_trained, prepared.total_steps));
        }
        Event::Step(StepRecord { step, loss, lr, grad_norm, tokens_per_second, peak_bytes, .. }) => {
            let peak = peak_bytes as f64 / MEBIBYTE;
            note(&format!(
                "step {step}/{total_steps}  loss {loss:.4}  lr {lr:.3e}  grad norm {grad_norm:.4}  {tokens_per_second:.0} tokens/s  peak {peak:.0} MiB"
            ));
        }
    }
}

/// The first example, indented, with what is learnt in brackets.
fn describe_sample(sample: &Sample) -> String {
    let mut text = String::new();
    for piece in &sample.pieces {
        text += &if piece.is_trained { format!("[[{}]]", piece.text) } else { piece.text.clone() };
    }
    if sample.is_cut {
        text += " ..";
    }
    let mut shown = "first example, [[learnt]]:".to_owned();
    for line in text.lines() {
        // Data must not move the cursor or change colours.
        let line: String = line.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect();
        shown += "\n    ";
        shown += &line;
    }
    shown
}

const MEBIBYTE: f64 = 1024.0 * 1024.0;

fn describe_summary(summary: &Summary) -> String {
    let Summary { steps, first_loss, last_loss, tokens, elapsed, peak_bytes, output } = summary;
    format!(
        "done: {steps} steps, loss {first_loss:.4} -> {last_loss:.4}, {tokens} tokens in {:.1} s, peak {:.0} MiB; saved in {}",
        elapsed.as_secs_f64(),
        *peak_bytes as f64 / MEBIBYTE,
        output.display()
    )
}
