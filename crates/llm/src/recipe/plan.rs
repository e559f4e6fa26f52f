//! `unsloth plan`: the memory of a training run, by running it where nothing is computed.

use std::path::PathBuf;

use unsloth_core::{DType, Device, Usage, ops::cross_entropy::IGNORE_INDEX};
use unsloth_train::{
    AdamWConfig, Batch, Checkpointing, Document, LoraConfig, Schedule, ScheduleKind, Trainer, TrainerConfig,
};

use super::{
    Method, Offload,
    config::{DEFAULT_RANK, invalid, loss_scale},
};
use crate::{
    Error, Result,
    config::DecoderConfig,
    decoder::{Decoder, LoadOptions, Targets},
    hub::{self, Parts},
    packing::at_least,
    weights::ShapesOnly,
};

/// From the second step on, every step makes the same buffers and holds the first one's scalars besides.
const NUM_STEPS: usize = 2;

/// What of a training run its memory depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanConfig {
    /// Folder with `config.json`, or a name on the Hub ([`hub`]), from where weights are not fetched. Of weights, if there are any, only
    /// the headers are read.
    pub model: PathBuf,
    /// Type of activations.
    pub dtype: DType,
    /// Tokens of a sequence, at least 2. All but the last of them have a target.
    pub seq_len: usize,
    /// Sequences of a micro-batch, at least 1.
    pub batch_size: usize,
    /// What is trained.
    pub method: Method,
    /// Inner dimension of the adapters. `None`: 16.
    pub rank: Option<usize>,
    /// Share of the adapters' input that is zero in training, in `[0, 1)`. `None`: 0.
    pub dropout: Option<f32>,
    /// Layers that have adapters. `None`: every linear layer.
    pub targets: Option<Targets>,
    /// What is computed again in the backward pass instead of kept.
    pub checkpointing: Checkpointing,
    /// Where what it keeps waits.
    pub offload: Offload,
}

impl PlanConfig {
    /// The settings that `unsloth plan` has without options.
    pub fn new(model: PathBuf, seq_len: usize) -> Self {
        Self {
            model,
            dtype: DType::F32,
            seq_len,
            batch_size: 1,
            method: Method::Lora,
            rank: None,
            dropout: None,
            targets: None,
            checkpointing: Checkpointing::None,
            offload: Offload::None,
        }
    }

    /// # Errors
    /// [`Error::InvalidOption`] or [`unsloth_train::Error::InvalidConfig`], naming the field.
    pub fn validate(&self) -> Result<()> {
        at_least("seq_len", self.seq_len, 2)?;
        at_least("batch_size", self.batch_size, 1)?;
        let num_tokens = self.seq_len.saturating_mul(self.batch_size);
        if i32::try_from(num_tokens).is_err() {
            return invalid("batch_size * seq_len", num_tokens, "below 2^31");
        }
        self.method.check_adapter_settings(&[
            ("rank", self.rank.is_some()),
            ("dropout", self.dropout.is_some()),
            ("targets", self.targets.is_some()),
        ])?;
        self.offload.check(&self.checkpointing)?;
        Ok(self.adapter().validate()?)
    }

    /// The factor of the update takes no memory.
    fn adapter(&self) -> LoraConfig {
        let rank = self.rank.unwrap_or(DEFAULT_RANK);
        LoraConfig { dropout: self.dropout.unwrap_or(0.0), ..LoraConfig::new(rank, 1.0) }
    }

    fn model(&self, device: &Device) -> Result<Decoder> {
        let mut model = match self.method {
            Method::Lora => self.load(device, LoadOptions::frozen(self.dtype))?,
            Method::Full => self.load(device, LoadOptions::trainable(self.dtype))?,
            // Random numbers take no memory of the device.
            Method::Scratch => self.shapes_only(device, LoadOptions::trainable(self.dtype))?,
        };
        model.set_checkpointing(self.checkpointing.clone())?;
        model.set_offload(self.offload.open(device, &std::env::temp_dir())?);
        if self.method == Method::Lora {
            model.add_adapters(&self.adapter(), self.targets.as_ref().unwrap_or(&Targets::AllLinear), 0)?;
        }
        Ok(model)
    }

    fn load(&self, device: &Device, options: LoadOptions) -> Result<Decoder> {
        match Decoder::load(&self.model, device, options) {
            Err(Error::NoWeights { .. }) => self.shapes_only(device, options),
            loaded => loaded,
        }
    }

    fn shapes_only(&self, device: &Device, options: LoadOptions) -> Result<Decoder> {
        let source = ShapesOnly { dtype: DecoderConfig::stored_dtype(&self.model)? };
        Decoder::new(DecoderConfig::load(&self.model)?, &source, device, options)
    }

    fn batch(&self, device: &Device) -> Result<Batch> {
        let ids = vec![0; self.seq_len];
        let mut targets = vec![0; self.seq_len];
        targets[self.seq_len - 1] = IGNORE_INDEX;
        let documents = vec![Document { ids: &ids, targets: &targets }; self.batch_size];
        Ok(Batch::new(device, &documents)?)
    }
}

/// Loads the model, gives it adapters if they are what is trained, trains it for two steps and tells what was held: model, tape, trainer and optimiser are
/// those of [`super::train`]. `device` should have nothing on it. On one that only plans, no weight is read and nothing is
/// computed; on another one this measures.
///
/// # Errors
/// As [`PlanConfig::validate`]; whatever loading the model refuses; [`unsloth_core::Error::OutOfMemory`], naming what is held,
/// if the run does not fit the device's budget.
pub fn plan(device: &Device, config: &PlanConfig) -> Result<Usage> {
    config.validate()?;
    let config = &PlanConfig { model: hub::folder(&config.model, Parts::WithoutWeights)?, ..config.clone() };
    let schedule =
        Schedule { kind: ScheduleKind::Constant, learning_rate: 0.0, warmup_steps: 0, total_steps: NUM_STEPS };
    let adamw = AdamWConfig::default();
    let loss_scale = loss_scale(config.dtype);
    let trainer = TrainerConfig { adamw, schedule, max_grad_norm: Some(1.0), loss_scale, seed: 0 };
    let mut trainer = Trainer::new(config.model(device)?, trainer)?;
    for _ in 0..NUM_STEPS {
        trainer.step(&[config.batch(device)?])?;
    }
    trainer.finish()?;
    Ok(device.usage())
}
