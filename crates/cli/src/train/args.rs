//! Options of `unsloth train`.

use std::path::PathBuf;

use anyhow::Result;
use clap::ArgAction;
use unsloth_rs::{
    ByteSize,
    core::DType,
    llm::dataset::TrainOn,
    recipe::{Method, Offload, OneOrMany, Policy, TrainOptions},
    train::{AdjustLr, OptimizerKind, ScheduleKind},
};

use crate::{
    adapter_args::AdapterArgs,
    args::{DeviceArgs, FloatType},
};

/// Options of `unsloth train`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// TOML file with options as keys, dashes as underscores; a flag wins over the file
    #[arg(long, value_name = "FILE.toml")]
    pub(super) config: Option<PathBuf>,
    /// Folder of the model: config.json and safetensors, as Hugging Face has them
    #[arg(long, value_name = "DIR", required_unless_present = "config")]
    model: Option<PathBuf>,
    /// JSONL file of chats, instructions, prompts and completions, texts or tokens; may be given several times
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    data: Option<Vec<PathBuf>>,
    /// Folder for the adapter or the model, the tokenizer's files, config.toml, metrics.jsonl, loss.svg and checkpoints
    #[arg(long, value_name = "DIR", required_unless_present = "config")]
    output: Option<PathBuf>,
    /// What is trained: lora (adapters), full (every weight) or scratch (every weight, from random ones; of the model's folder,
    /// config.json and the tokenizer's files are read) [default: lora]
    #[arg(long, value_name = "METHOD")]
    method: Option<Method>,
    /// Folder of an adapter to go on from
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Type of activations [default: f32]
    #[arg(long, value_enum, value_name = "TYPE")]
    dtype: Option<FloatType>,
    /// Keep trained matrices in bf16 alone, without an f32 master copy, rounding up or down at random behind a step; with --dtype bf16
    /// and --method full or scratch, on the CPU
    #[arg(long)]
    stochastic_rounding: bool,
    /// Seed of the order of the data, of new adapters, of random weights, of dropout, of rounding and of what is held out
    /// [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    #[command(flatten)]
    adapters: AdapterArgs,
    /// Tokens to learn: answers (of chats, and completions) or all [default: answers, all for plain text, labels for tokens]
    #[arg(long, value_name = "answers|all")]
    train_on: Option<TrainOn>,
    /// Longer examples are cut to this many tokens [default: the model's limit or 2048, the smaller]
    #[arg(long, value_name = "N")]
    max_seq_len: Option<usize>,
    /// Put as many documents into a sequence as fit; they do not see each other [default: true]
    #[arg(long, value_name = "true|false", action = ArgAction::Set)]
    packing: Option<bool>,
    /// Another order of the data in each epoch [default: true]
    #[arg(long, value_name = "true|false", action = ArgAction::Set)]
    shuffle: Option<bool>,
    /// Optimiser steps to take
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<usize>,
    /// Passes over the data, where --steps is not given [default: 1]
    #[arg(long, value_name = "F")]
    epochs: Option<f64>,
    /// Sequences in a micro-batch [default: 1]
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Micro-batches in a step [default: 1]
    #[arg(long, value_name = "N")]
    grad_accum: Option<usize>,
    #[command(flatten)]
    optimizer: OptimizerArgs,
    /// What is computed again in the backward pass instead of kept: none, every:N (segments of N layers), sqrt, layers:A,B,..
    /// (from 0), selective (norms and gated units), selective:norm, selective:glu or auto (what --memory takes) [default: none]
    #[arg(long, value_name = "POLICY")]
    checkpointing: Option<Policy>,
    /// Tokens that the feed-forward part of a layer takes at a time, forward and, computed again, backward: long sequences then
    /// hold its large results for that many tokens only [default: all of a micro-batch]
    #[arg(long, value_name = "N")]
    mlp_tile: Option<usize>,
    /// Where inputs of layers that are computed again wait: none (on the device), host (its memory; gains nothing on the CPU) or
    /// disk (files in OUTPUT that vanish with the run) [default: none]
    #[arg(long, value_name = "PLACE")]
    offload: Option<Offload>,
    /// Where what the optimiser keeps waits between steps: none (on the device), host or disk, as for --offload
    /// [default: none]
    #[arg(long, value_name = "PLACE")]
    offload_optimizer: Option<Offload>,
    /// Most memory that the run may hold on the device, such as 12GiB: one that would not fit is refused before it begins
    /// [default: what the device has]
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    #[command(flatten)]
    run: RunArgs,
}

/// How parameters change.
#[derive(clap::Args)]
struct OptimizerArgs {
    /// Learning rate after the warm-up [default: 0.0002]
    #[arg(long, value_name = "F")]
    learning_rate: Option<f64>,
    /// Learning rate after the warm-up: cosine (to 0), linear (to 0), constant, polynomial (to --end-learning-rate) or wsd
    /// (constant, then to 0 over --decay-steps) [default: cosine]
    #[arg(long, value_name = "KIND")]
    schedule: Option<ScheduleKind>,
    /// Steps during which the learning rate rises from 0
    #[arg(long, value_name = "N", conflicts_with = "warmup_ratio")]
    warmup_steps: Option<usize>,
    /// Share of the run during which the learning rate rises, where --warmup-steps is not given [default: 0.03]
    #[arg(long, value_name = "F")]
    warmup_ratio: Option<f64>,
    /// Learning rate at the end of the schedule polynomial [default: 0.0000001]
    #[arg(long, value_name = "F")]
    end_learning_rate: Option<f64>,
    /// Power of the schedule polynomial [default: 1]
    #[arg(long, value_name = "F")]
    power: Option<f64>,
    /// Steps at the end over which the schedule wsd falls to 0 [default: a tenth of the run]
    #[arg(long, value_name = "N")]
    decay_steps: Option<usize>,
    /// Learning rate of the embedding table and the head, where they are trained [default: --learning-rate]
    #[arg(long, value_name = "F")]
    embedding_learning_rate: Option<f64>,
    /// LoRA+: learning rate of B of adapters, and of biases and lengths trained with them, over that of A [default: 1]
    #[arg(long, value_name = "F")]
    loraplus_lr_ratio: Option<f64>,
    /// How parameters change: adamw, adamw8bit (moments in 8 bits), sgd (with momentum), lion, adafactor or muon
    /// (momentum of matrices made orthogonal; AdamW for everything else) [default: adamw]
    #[arg(long, value_name = "NAME")]
    optimizer: Option<OptimizerKind>,
    /// Weight decay of matrices: decoupled, but added to the gradient by sgd [default: 0.01]
    #[arg(long, value_name = "F")]
    weight_decay: Option<f64>,
    /// Decay of AdamW's first moment; weight of lion's momentum in a step [default: 0.9]
    #[arg(long, value_name = "F")]
    beta1: Option<f64>,
    /// Decay of AdamW's second moment; of lion's momentum, 0.99 if not given [default: 0.999]
    #[arg(long, value_name = "F")]
    beta2: Option<f64>,
    /// Momentum of sgd, 0: none; of muon, 0.95 if not given [default: 0.9]
    #[arg(long, value_name = "F")]
    momentum: Option<f64>,
    /// Nesterov's momentum for sgd; muon has it
    #[arg(long)]
    nesterov: bool,
    /// Make the learning rate of adafactor relative to the size of each parameter
    #[arg(long)]
    scale_parameter: bool,
    /// How muon's learning rate depends on a matrix's shape: original (sqrt(max(1, rows / columns))), match_rms_adamw (rates
    /// as for adamw) or spectral_unclamped (sqrt(rows / columns)) [default: original]
    #[arg(long, value_name = "RULE")]
    adjust_lr: Option<AdjustLr>,
    /// Added to the root of AdamW's second moment [default: 0.00000001]
    #[arg(long, value_name = "F")]
    adam_eps: Option<f64>,
    /// Gradients with a larger norm are scaled down to it; inf: never [default: 1]
    #[arg(long, value_name = "F")]
    max_grad_norm: Option<f64>,
}

/// What happens besides training.
#[derive(clap::Args)]
struct RunArgs {
    /// Save a checkpoint every N steps, in OUTPUT/checkpoints; Ctrl-C saves one in any case
    #[arg(long, value_name = "N")]
    save_every: Option<usize>,
    /// Checkpoints to keep, the newest [default: 2]
    #[arg(long, value_name = "N")]
    keep_last: Option<usize>,
    /// Keep the checkpoint with the smallest evaluation loss besides, and end with its model in OUTPUT; needs --eval-data or
    /// --eval-split
    #[arg(long)]
    keep_best: bool,
    /// Evaluate every N steps, besides behind the last one; needs --eval-data or --eval-split
    #[arg(long, value_name = "N")]
    eval_every: Option<usize>,
    /// JSONL file to evaluate on; may be given several times
    #[arg(long, value_name = "FILE", conflicts_with = "eval_split")]
    eval_data: Option<Vec<PathBuf>>,
    /// Share of the examples, picked by the seed, to evaluate on instead of training on them
    #[arg(long, value_name = "F")]
    eval_split: Option<f64>,
    /// Look at every result within a step, and name where the first infinity or NaN comes from; slow
    #[arg(long)]
    trace_nan: bool,
    /// Go on from the newest whole checkpoint in OUTPUT, with the options that the run has had
    #[arg(long)]
    resume: bool,
    /// Remove the run that OUTPUT holds, as this one takes its place
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// No progress on standard error
    #[arg(long)]
    quiet: bool,
}

impl Args {
    /// The options given, and those of the file.
    pub(super) fn options(self) -> Result<TrainOptions> {
        let file = self.config.as_deref().map(TrainOptions::read).transpose()?.unwrap_or_default();
        Ok(self.flags().or(&file)?)
    }

    fn flags(self) -> TrainOptions {
        let Self { optimizer, run, .. } = self;
        TrainOptions {
            model: self.model,
            data: self.data.map(OneOrMany::Many),
            output: self.output,
            method: self.method,
            adapter: self.adapter,
            device: self.device.device,
            threads: self.device.threads,
            dtype: self.dtype.map(|dtype| DType::from(dtype).to_string()),
            stochastic_rounding: self.stochastic_rounding.then_some(true),
            seed: self.seed,
            train_on: self.train_on.map(|train_on| train_on.to_string()),
            max_seq_len: self.max_seq_len,
            packing: self.packing,
            shuffle: self.shuffle,
            steps: self.steps,
            epochs: self.epochs,
            batch_size: self.batch_size,
            grad_accum: self.grad_accum,
            learning_rate: optimizer.learning_rate,
            schedule: optimizer.schedule,
            warmup_steps: optimizer.warmup_steps,
            warmup_ratio: optimizer.warmup_ratio,
            end_learning_rate: optimizer.end_learning_rate,
            power: optimizer.power,
            decay_steps: optimizer.decay_steps,
            embedding_learning_rate: optimizer.embedding_learning_rate,
            loraplus_lr_ratio: optimizer.loraplus_lr_ratio,
            optimizer: optimizer.optimizer,
            momentum: optimizer.momentum,
            nesterov: optimizer.nesterov.then_some(true),
            scale_parameter: optimizer.scale_parameter.then_some(true),
            adjust_lr: optimizer.adjust_lr,
            weight_decay: optimizer.weight_decay,
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            adam_eps: optimizer.adam_eps,
            max_grad_norm: optimizer.max_grad_norm,
            checkpointing: self.checkpointing.map(|policy| policy.to_string()),
            mlp_tile: self.mlp_tile,
            offload: self.offload,
            offload_optimizer: self.offload_optimizer,
            memory: self.memory.map(|ByteSize(bytes)| bytes.to_string()),
            trace_nan: run.trace_nan.then_some(true),
            save_every: run.save_every,
            keep_last: run.keep_last,
            keep_best: run.keep_best.then_some(true),
            eval_every: run.eval_every,
            eval_data: run.eval_data.map(OneOrMany::Many),
            eval_split: run.eval_split,
            resume: run.resume.then_some(true),
            overwrite: run.overwrite.then_some(true),
            quiet: run.quiet.then_some(true),
            ..self.adapters.options()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};
    use unsloth_rs::recipe::TrainConfig;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    /// Names of all options with what `--help` says of them.
    fn flags() -> Vec<(String, String)> {
        let command = Command::command();
        let arguments = command.get_arguments().filter(|argument| argument.get_id() != "help");
        arguments.map(|a| (a.get_id().to_string(), a.get_help().map(ToString::to_string).unwrap_or_default())).collect()
    }

    /// The keys that a file may have, as the error about another one lists them.
    fn keys() -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        std::fs::write(&path, "no_such_key = 1\n").unwrap();
        let message = TrainOptions::read(&path).unwrap_err().to_string();
        let (_, list) = message.split_once("expected one of ").unwrap();
        list.split(", ").map(|name| name.trim_matches('`').to_owned()).collect()
    }

    #[test]
    fn every_flag_is_a_key_and_every_key_a_flag() {
        let mut flags: Vec<String> =
            flags().into_iter().map(|(name, _)| name).filter(|name| name != "config").collect();
        let mut keys = keys();
        flags.sort();
        keys.sort();
        assert_eq!(flags, keys);
    }

    #[test]
    fn help_tells_the_defaults() {
        let config = TrainConfig::new("m".into(), vec!["d".into()], "o".into());
        let defaults: toml::Table = TrainOptions::of(&config, "cpu").to_toml().unwrap().parse().unwrap();
        let paths = ["model", "data", "output"];
        for (name, help) in flags().into_iter().filter(|(name, _)| !paths.contains(&name.as_str())) {
            let Some(value) = defaults.get(&name) else { continue };
            let value = value
                .as_str()
                .map_or_else(|| value.as_float().map_or(value.to_string(), |f| f.to_string()), str::to_owned);
            assert!(help.ends_with(&format!("[default: {value}]")), "{name}: {help}, not {value}");
        }
    }
}
