//! `unsloth eval`: the loss of a model over data files.

use std::path::PathBuf;

use serde::Serialize;
use unsloth_core::{DType, Device};
use unsloth_train::{Batch, Document, Model};

use super::{load_model, max_seq_len};
use crate::{
    Error, Result,
    dataset::{Dataset, ReadOptions, Report, TrainOn},
    decoder::Decoder,
    hub::{self, Parts},
    packing::at_least,
};

/// An evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalConfig {
    /// Folder with the model as Hugging Face has it, or its name there ([`hub`]).
    pub model: PathBuf,
    /// Folder of an adapter to apply.
    pub adapter: Option<PathBuf>,
    /// JSONL files, read one after another; at least one.
    pub data: Vec<PathBuf>,
    /// Which tokens are targets. `None`: answers of chats and completions, all of plain text; tokens bring their own labels.
    pub train_on: Option<TrainOn>,
    /// Type of activations.
    pub dtype: DType,
    /// Documents computed at once, at least 1; the result is the same up to rounding.
    pub batch_size: usize,
    /// Longer examples are cut to their first tokens. `None`: the model's limit or 2048, the smaller.
    pub max_seq_len: Option<usize>,
}

impl EvalConfig {
    /// # Errors
    /// [`Error::InvalidOption`], naming the field.
    pub fn validate(&self) -> Result<()> {
        at_least("data", self.data.len(), 1)?;
        at_least("batch_size", self.batch_size, 1)?;
        at_least("max_seq_len", self.max_seq_len.unwrap_or(1), 1)
    }
}

/// What an evaluation found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean loss over all targets.
    pub loss: f64,
    /// `exp(loss)`
    pub perplexity: f64,
    /// Number of targets.
    pub tokens: usize,
    /// What was read.
    #[serde(skip)]
    pub data: Report,
}

/// Mean loss over every target of the data, each once.
///
/// # Errors
/// As [`EvalConfig::validate`]; whatever loading model, adapter and data refuses; [`Error::NonFiniteLoss`].
pub fn evaluate(device: &Device, config: &EvalConfig) -> Result<Evaluation> {
    config.validate()?;
    let config = &EvalConfig { model: hub::folder(&config.model, Parts::All)?, ..config.clone() };
    let model = load_model(device, &config.model, config.adapter.as_deref(), config.dtype)?;
    let max_seq_len = max_seq_len(config.max_seq_len, model.config());
    let options = ReadOptions {
        model: &config.model,
        vocab_size: model.config().vocab_size,
        max_seq_len,
        train_on: config.train_on,
    };
    let dataset = Dataset::read(&config.data, options)?;
    let mut loss = MeanLoss::default();
    for first in (0..dataset.num_documents()).step_by(config.batch_size) {
        let last = dataset.num_documents().min(first.saturating_add(config.batch_size));
        loss.add(&model, &dataset, first..last)?;
    }
    let MeanLoss { num_targets: tokens, .. } = loss;
    let loss = loss.mean();
    Ok(Evaluation { loss, perplexity: loss.exp(), tokens, data: dataset.report() })
}

/// Mean loss over all targets so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MeanLoss {
    /// In f64: millions of targets would lose the small differences in f32.
    sum: f64,
    num_targets: usize,
}

impl MeanLoss {
    /// Adds documents, which are computed at once.
    ///
    /// # Errors
    /// [`Error::NonFiniteLoss`]; whatever the model's operators refuse.
    pub(super) fn add(
        &mut self,
        model: &Decoder,
        dataset: &Dataset,
        documents: impl IntoIterator<Item = usize>,
    ) -> Result<()> {
        let documents: Vec<Document<'_>> = documents.into_iter().map(|index| dataset.document(index)).collect();
        let batch = Batch::new(model.device(), &documents)?;
        let num_targets = batch.num_targets;
        self.sum += f64::from(unsloth_train::evaluate(model, &[batch])?) * num_targets as f64;
        self.num_targets += num_targets;
        if !self.sum.is_finite() {
            return Err(Error::NonFiniteLoss { num_targets: self.num_targets, loss: self.mean() });
        }
        Ok(())
    }

    /// NaN before the first documents.
    pub(super) fn mean(&self) -> f64 {
        self.sum / self.num_targets as f64
    }
}
