//! What a training run is told.

use std::path::PathBuf;

use unsloth_core::DType;
use unsloth_train::{Checkpointing, OptimizerConfig, Precision, Schedule, ScheduleKind, TrainerConfig};

use super::{AdapterSettings, Method, Offload, Policy};
use crate::{
    Error, Result,
    dataset::TrainOn,
    packing::{BatchOptions, Batches, at_least},
};

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RunLength {
    /// Optimiser steps, at least 1.
    Steps(usize),
    /// Passes over the data, above 0, rounded up to whole steps.
    Epochs(f64),
}

/// How long the learning rate rises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// Optimiser steps.
    Steps(usize),
    /// Share of the run in `[0, 1]`, rounded up to whole steps.
    Ratio(f64),
}

impl Warmup {
    /// Warm-up steps of a run.
    pub fn num_steps(self, total_steps: usize) -> usize {
        match self {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => (total_steps as f64 * ratio).ceil() as usize,
        }
    }
}

/// What a run does with an output folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// Begins, in a folder that holds no run.
    #[default]
    New,
    /// Begins, and removes the run that the folder holds when the new one takes its first step.
    Overwrite,
    /// Goes on from the newest whole checkpoint in the folder.
    Resume,
}

/// What the loss is computed over besides the training data.
#[derive(Clone, Debug, PartialEq)]
pub enum EvalSource {
    /// JSONL files, read one after another; at least one.
    Files(Vec<PathBuf>),
    /// Share of the training examples, in (0, 1), picked by the seed and not trained on; at least one is, and one is not.
    Split(f64),
}

/// A training run.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// Folder with the model as Hugging Face has it, or its name there ([`crate::hub`]); its weights are not read with
    /// [`Method::Scratch`].
    pub model: PathBuf,
    /// JSONL files, read one after another; at least one.
    pub data: Vec<PathBuf>,
    /// Folder for the adapter or the model, and the metrics; made if it is not there. A model is not written
    /// into its own folder.
    pub output: PathBuf,
    /// What is trained.
    pub method: Method,
    /// Folder of an adapter to go on from; a new one is made without.
    pub adapter: Option<PathBuf>,
    /// Type of activations, and of matrices as they are read; see [`Precision`].
    pub dtype: DType,
    /// Whether trained matrices are bf16 without an f32 master copy, rounded up or down at random behind a step: with bf16 activations, and
    /// for every weight. See [`Precision::PURE_BF16`].
    pub stochastic_rounding: bool,
    /// Of the order of the data, of new adapters, of random weights and of dropout.
    pub seed: u64,
    /// The adapters, and what is trained beside them.
    pub adapters: AdapterSettings,
    /// Which tokens are learnt. `None`: answers of chats and completions, all of plain text; tokens bring their own labels.
    pub train_on: Option<TrainOn>,
    /// Longer examples are cut to their first tokens. `None`: the model's limit or 2048, the smaller.
    pub max_seq_len: Option<usize>,
    /// Whether a sequence takes as many documents as fit, instead of one.
    pub packing: bool,
    /// Whether each epoch has its own order, instead of the data's.
    pub shuffle: bool,
    /// How long the run is.
    pub length: RunLength,
    /// Sequences of a micro-batch, at least 1.
    pub batch_size: usize,
    /// Micro-batches of a step, at least 1.
    pub grad_accum: usize,
    /// The full learning rate, 0 or more.
    pub learning_rate: f64,
    /// What follows the warm-up.
    pub schedule: ScheduleKind,
    /// How long the learning rate rises.
    pub warmup: Warmup,
    /// Where a polynomial schedule ends, below the full rate.
    pub end_learning_rate: f64,
    /// Power of a polynomial schedule, positive.
    pub power: f64,
    /// Steps at the end over which the schedule `wsd` falls. `None`: a tenth of the run, rounded up.
    pub decay_steps: Option<usize>,
    /// The full rate of embedding table and head where they are trained. `None`: that of everything else.
    pub embedding_learning_rate: Option<f64>,
    /// The rate of `B` of adapters, and of biases and lengths trained with them, over that of `A`. `None`: 1.
    pub loraplus_lr_ratio: Option<f64>,
    /// The optimiser.
    pub optimizer: OptimizerConfig,
    /// Gradients with a larger norm are scaled down to it; positive. `None`: never.
    pub max_grad_norm: Option<f32>,
    /// What is computed again in the backward pass instead of kept.
    pub checkpointing: Policy,
    /// Tokens that a feed-forward part takes at a time, at least 1. `None`: all of a micro-batch.
    pub mlp_tile: Option<usize>,
    /// Where the inputs wait that it keeps.
    pub offload: Offload,
    /// Where what the optimiser keeps waits between steps.
    pub offload_optimizer: Offload,
    /// Most bytes that the run may hold on the device. `None`: what the device gives.
    pub memory_bytes: Option<u64>,
    /// Whether every result within a step is looked at, to tell where a first infinity or NaN comes from; slow.
    pub trace_nan: bool,
    /// What happens to a run that the output folder holds.
    pub start: Start,
    /// Steps between checkpoints of the run, at least 1. `None`: only when it is stopped.
    pub save_every: Option<usize>,
    /// Checkpoints to keep, the newest, at least 1.
    pub keep_last: usize,
    /// Whether the checkpoint with the smallest evaluation loss is kept besides, and its model is what a run gives that is done.
    pub keep_best: bool,
    /// Data to evaluate on.
    pub eval: Option<EvalSource>,
    /// Steps between evaluations, at least 1. `None`: only behind the last step.
    pub eval_every: Option<usize>,
}

impl TrainConfig {
    /// The settings that `unsloth train` has without options.
    pub fn new(model: PathBuf, data: Vec<PathBuf>, output: PathBuf) -> Self {
        Self {
            model,
            data,
            output,
            method: Method::Lora,
            adapter: None,
            dtype: DType::F32,
            stochastic_rounding: false,
            seed: 0,
            adapters: AdapterSettings::default(),
            train_on: None,
            max_seq_len: None,
            packing: true,
            shuffle: true,
            length: RunLength::Epochs(1.0),
            batch_size: 1,
            grad_accum: 1,
            learning_rate: 2e-4,
            schedule: ScheduleKind::Cosine,
            warmup: Warmup::Ratio(0.03),
            end_learning_rate: Schedule::default().end_learning_rate,
            power: Schedule::default().power,
            decay_steps: None,
            embedding_learning_rate: None,
            loraplus_lr_ratio: None,
            optimizer: OptimizerConfig::default(),
            max_grad_norm: Some(1.0),
            checkpointing: Checkpointing::None.into(),
            mlp_tile: None,
            offload: Offload::None,
            offload_optimizer: Offload::None,
            memory_bytes: None,
            trace_nan: false,
            start: Start::New,
            save_every: None,
            keep_last: 2,
            keep_best: false,
            eval: None,
            eval_every: None,
        }
    }

    /// Checks what needs neither the model nor the data, so that a typing error does not cost the time to load them.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] or [`unsloth_train::Error::InvalidConfig`], naming the field.
    pub fn validate(&self) -> Result<()> {
        at_least("data", self.data.len(), 1)?;
        if self.checkpointing == Policy::Auto && self.memory_bytes.is_none() {
            self.checkpointing.given()?;
        }
        self.validate_training()?;
        self.validate_evaluation()
    }

    /// The types of the run.
    ///
    /// # Errors
    /// [`Error::ActivationDType`] for a type that activations cannot have.
    pub fn precision(&self) -> Result<Precision> {
        match self.stochastic_rounding {
            true => Ok(Precision::PURE_BF16),
            false => Precision::with_activations(self.dtype).ok_or(Error::ActivationDType { dtype: self.dtype }),
        }
    }

    fn validate_rounding(&self) -> Result<()> {
        const FIELD: &str = "stochastic_rounding";
        match self.stochastic_rounding {
            true if self.dtype != DType::BF16 => invalid("dtype", self.dtype, &format!("bf16 with {FIELD}")),
            true if self.method == Method::Lora => {
                invalid("method", self.method, &format!("full or scratch with {FIELD}: adapters are f32"))
            }
            _ => Ok(()),
        }
    }

    /// Checks what does not concern the data.
    pub(super) fn validate_training(&self) -> Result<()> {
        let own = [("adapter", self.adapter.is_some()), ("loraplus_lr_ratio", self.loraplus_lr_ratio.is_some())];
        self.method.check_adapter_settings(&own)?;
        self.method.check_adapter_settings(&self.adapters.given())?;
        self.validate_rounding()?;
        self.adapters.new_adapter().validate()?;
        at_least("max_seq_len", self.max_seq_len.unwrap_or(1), 1)?;
        match self.length {
            RunLength::Steps(steps) => at_least("steps", steps, 1)?,
            RunLength::Epochs(epochs) if !(epochs > 0.0 && epochs.is_finite()) => {
                return invalid("epochs", epochs, "above 0 and finite");
            }
            RunLength::Epochs(_) => {}
        }
        at_least("batch_size", self.batch_size, 1)?;
        at_least("grad_accum", self.grad_accum, 1)?;
        match self.warmup {
            Warmup::Ratio(ratio) if !(0.0..=1.0).contains(&ratio) => {
                return invalid("warmup_ratio", ratio, "in [0, 1]");
            }
            _ => {}
        }
        at_least("save_every", self.save_every.unwrap_or(1), 1)?;
        at_least("keep_last", self.keep_last, 1)?;
        at_least("mlp_tile", self.mlp_tile.unwrap_or(1), 1)?;
        if let Policy::Given(checkpointing) = &self.checkpointing {
            self.offload.check_inputs(checkpointing)?;
        }
        self.offload_optimizer.check_optimizer(&self.optimizer)?;
        self.trainer(1)?.validate()?;
        Ok(())
    }

    fn validate_evaluation(&self) -> Result<()> {
        if self.keep_best && self.eval.is_none() {
            return invalid("keep_best", true, "used with eval_data or eval_split");
        }
        at_least("eval_every", self.eval_every.unwrap_or(1), 1)?;
        match (&self.eval, self.eval_every) {
            (Some(EvalSource::Files(files)), _) => at_least("eval_data", files.len(), 1),
            (Some(EvalSource::Split(share)), _) if !(*share > 0.0 && *share < 1.0) => {
                invalid("eval_split", share, "above 0 and below 1")
            }
            (None, Some(steps)) => invalid("eval_every", steps, "used with eval_data or eval_split"),
            _ => Ok(()),
        }
    }

    pub(super) fn batch_options(&self, max_seq_len: usize) -> BatchOptions {
        let &Self { packing, shuffle, seed, batch_size, grad_accum, .. } = self;
        BatchOptions { packing, shuffle, seed, max_seq_len, batch_size, grad_accum }
    }

    pub(super) fn num_steps(&self, batches: &Batches) -> Result<usize> {
        match self.length {
            RunLength::Steps(steps) => Ok(steps),
            RunLength::Epochs(epochs) => batches.num_steps(epochs),
        }
    }

    /// # Errors
    /// As [`TrainConfig::precision`].
    pub(super) fn trainer(&self, total_steps: usize) -> Result<TrainerConfig> {
        let precision = self.precision()?;
        let warmup_steps = self.warmup.num_steps(total_steps);
        let &Self { schedule: kind, learning_rate, end_learning_rate, power, optimizer, max_grad_norm, seed, .. } =
            self;
        let decay_steps = self.decay_steps.unwrap_or(total_steps.div_ceil(10));
        let schedule =
            Schedule { kind, learning_rate, warmup_steps, total_steps, end_learning_rate, power, decay_steps };
        Ok(TrainerConfig {
            optimizer,
            schedule,
            embedding_learning_rate: self.embedding_learning_rate,
            loraplus_lr_ratio: self.loraplus_lr_ratio,
            max_grad_norm,
            loss_scale: precision.loss_scale(),
            stochastic_rounding: precision.rounds_stochastically(),
            seed,
        })
    }
}

pub(super) fn invalid<T>(field: &'static str, value: impl std::fmt::Display, rule: &str) -> Result<T> {
    Err(Error::InvalidOption { field, value: value.to_string(), rule: rule.to_owned() })
}

#[cfg(test)]
mod tests {
    use unsloth_train::{AdamWConfig, SgdConfig};

    use super::*;

    fn config() -> TrainConfig {
        TrainConfig::new("model".into(), vec!["data.jsonl".into()], "out".into())
    }

    #[test]
    fn defaults_are_valid() {
        config().validate().unwrap();
    }

    #[test]
    fn every_field_is_checked() {
        type Spoil = fn(&mut TrainConfig);
        let cases: [(&str, Spoil); 32] = [
            ("data", |c| c.data.clear()),
            ("rank", |c| c.adapters.rank = Some(0)),
            ("alpha", |c| c.adapters.alpha = Some(f32::NAN)),
            ("dropout", |c| c.adapters.dropout = Some(1.0)),
            ("max_seq_len", |c| c.max_seq_len = Some(0)),
            ("steps", |c| c.length = RunLength::Steps(0)),
            ("epochs", |c| c.length = RunLength::Epochs(f64::NAN)),
            ("batch_size", |c| c.batch_size = 0),
            ("grad_accum", |c| c.grad_accum = 0),
            ("warmup_ratio", |c| c.warmup = Warmup::Ratio(1.5)),
            ("learning_rate", |c| c.learning_rate = -1.0),
            ("weight_decay", |c| c.optimizer = AdamWConfig { weight_decay: -0.1, ..AdamWConfig::default() }.into()),
            ("beta2", |c| c.optimizer = AdamWConfig { beta2: 1.0, ..AdamWConfig::default() }.into()),
            ("eps", |c| c.optimizer = AdamWConfig { eps: 0.0, ..AdamWConfig::default() }.into()),
            ("momentum", |c| c.optimizer = OptimizerConfig::Sgd(SgdConfig { momentum: 1.0, ..SgdConfig::default() })),
            ("embedding_learning_rate", |c| c.embedding_learning_rate = Some(f64::NAN)),
            ("loraplus_lr_ratio", |c| c.loraplus_lr_ratio = Some(0.0)),
            ("dtype", |c| (c.stochastic_rounding, c.method) = (true, Method::Full)),
            ("method", |c| (c.stochastic_rounding, c.dtype) = (true, DType::BF16)),
            ("end_learning_rate", |c| (c.schedule, c.end_learning_rate) = (ScheduleKind::Polynomial, 1.0)),
            ("power", |c| (c.schedule, c.power) = (ScheduleKind::Polynomial, 0.0)),
            ("max_grad_norm", |c| c.max_grad_norm = Some(0.0)),
            ("save_every", |c| c.save_every = Some(0)),
            ("keep_last", |c| c.keep_last = 0),
            ("mlp_tile", |c| c.mlp_tile = Some(0)),
            ("offload", |c| c.offload = Offload::Disk),
            ("offload_optimizer", |c| {
                c.offload_optimizer = Offload::Host;
                c.optimizer = OptimizerConfig::Sgd(SgdConfig { momentum: 0.0, ..SgdConfig::default() });
            }),
            ("checkpointing", |c| c.checkpointing = Policy::Auto),
            ("eval_data", |c| c.eval = Some(EvalSource::Files(vec![]))),
            ("eval_split", |c| c.eval = Some(EvalSource::Split(1.0))),
            ("eval_every", |c| c.eval_every = Some(5)),
            ("keep_best", |c| c.keep_best = true),
        ];
        for (field, spoil) in cases {
            let mut config = config();
            spoil(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(&format!("{field} = ")), "{field}: {message}");
        }
    }

    #[test]
    fn warm_up_rounds_up() {
        assert_eq!([Warmup::Ratio(0.03), Warmup::Ratio(0.0), Warmup::Steps(7)].map(|w| w.num_steps(20)), [1, 0, 7]);
    }
}
