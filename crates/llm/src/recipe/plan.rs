//! `unsloth plan`: the memory of a training run, by running it where nothing is computed.

use std::path::Path;

use unsloth_core::{Device, Usage, ops::cross_entropy::IGNORE_INDEX};
use unsloth_train::{Batch, Document};

use super::{
    Offloaded, TrainConfig,
    config::invalid,
    max_seq_len,
    train::{Loading, prepare_model, prepare_trainer},
};
use crate::{
    Error, Result,
    config::DecoderConfig,
    decoder::{Decoder, LoadOptions},
    hub::{self, Parts},
    packing::at_least,
    weights::ShapesOnly,
};

/// From the second step on, every step makes the same buffers and holds the first one's scalars besides.
const NUM_STEPS: usize = 2;

/// What a run holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryPlan {
    /// On the device.
    pub usage: Usage,
    /// Outside of it.
    pub elsewhere: Offloaded,
}

/// Loads the model, makes ready what is trained, takes two steps and tells what was held: everything is done as by [`super::train`]. Of
/// the configuration, the data, the output and the length of the run make no difference; a micro-batch is `batch_size` documents
/// of `max_seq_len` tokens, all but the last of them with a target. `device` should have nothing on it. On one that only plans, no
/// weight is read, there need be none, and nothing is computed; on another one this measures.
///
/// # Errors
/// As [`TrainConfig::validate`]; whatever loading the model refuses; [`unsloth_core::Error::OutOfMemory`], naming what is held,
/// if the run does not fit the device's budget.
pub fn plan(device: &Device, config: &TrainConfig) -> Result<MemoryPlan> {
    config.validate_training()?;
    let model = hub::folder(&config.model, Parts::WithoutWeights)?;
    let config = &TrainConfig { model, output: std::env::temp_dir(), ..config.clone() };
    let model = prepare_model(device, config, Loading::Shapes)?;
    let documents = Documents::new(config, model.config())?;
    let mut trainer = prepare_trainer(model, config, NUM_STEPS)?;
    for _ in 0..NUM_STEPS {
        trainer.step(&[documents.batch(device)?])?;
    }
    trainer.finish()?;
    Ok(MemoryPlan { usage: device.usage(), elsewhere: Offloaded::of(&trainer) })
}

/// A micro-batch.
struct Documents {
    ids: Vec<i32>,
    targets: Vec<i32>,
    count: usize,
}

impl Documents {
    fn new(config: &TrainConfig, model: &DecoderConfig) -> Result<Self> {
        let (seq_len, count) = (max_seq_len(config.max_seq_len, model), config.batch_size);
        at_least("seq_len", seq_len, 2)?;
        let num_tokens = seq_len.saturating_mul(count);
        if i32::try_from(num_tokens).is_err() {
            return invalid("batch_size * seq_len", num_tokens, "below 2^31");
        }
        let mut targets = vec![0; seq_len];
        targets[seq_len - 1] = IGNORE_INDEX;
        Ok(Self { ids: vec![0; seq_len], targets, count })
    }

    fn batch(&self, device: &Device) -> Result<Batch> {
        let Self { ids, targets, count } = self;
        Ok(Batch::new(device, &vec![Document { ids, targets }; *count])?)
    }
}

/// A model of a folder's shapes, or of its weights where there are some: of them, a device that only plans reads the headers.
pub(super) fn load_shapes(folder: &Path, device: &Device, options: LoadOptions) -> Result<Decoder> {
    match Decoder::load(folder, device, options) {
        Err(Error::NoWeights { .. }) => shapes_only(folder, device, options),
        loaded => loaded,
    }
}

/// A model of a folder's shapes, whatever weights there are.
pub(super) fn shapes_only(folder: &Path, device: &Device, options: LoadOptions) -> Result<Decoder> {
    let source = ShapesOnly { dtype: DecoderConfig::stored_dtype(folder)? };
    Decoder::new(DecoderConfig::load(folder)?, &source, device, options)
}
