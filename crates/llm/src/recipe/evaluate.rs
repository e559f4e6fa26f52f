//! `unsloth eval`: the loss of a model over data files.

use std::path::PathBuf;

use serde::Serialize;
use unsloth_core::{DType, Device};
use unsloth_train::{Batch, Document};

use super::{load_model, max_seq_len};
use crate::{
    Error, Result,
    dataset::{Dataset, ReadOptions, Report, TrainOn},
    packing::at_least,
};

/// An evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalConfig {
    /// Folder with the model as Hugging Face has it.
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
    let model = load_model(device, &config.model, config.adapter.as_deref(), config.dtype)?;
    let max_seq_len = max_seq_len(config.max_seq_len, &model);
    let options = ReadOptions {
        model: &config.model,
        vocab_size: model.config().vocab_size,
        max_seq_len,
        train_on: config.train_on,
    };
    let dataset = Dataset::read(&config.data, options)?;
    // Summed in f64 on the host: millions of targets would lose the small differences in f32.
    let mut sum = 0.0f64;
    let mut tokens = 0usize;
    for first in (0..dataset.num_documents()).step_by(config.batch_size) {
        let last = dataset.num_documents().min(first.saturating_add(config.batch_size));
        let documents: Vec<Document<'_>> = (first..last).map(|index| dataset.document(index)).collect();
        let batch = Batch::new(device, &documents)?;
        let num_targets = batch.num_targets;
        sum += f64::from(unsloth_train::evaluate(&model, &[batch])?) * num_targets as f64;
        tokens += num_targets;
        if !sum.is_finite() {
            return Err(Error::NonFiniteLoss { num_targets: tokens, loss: sum / tokens as f64 });
        }
    }
    let loss = sum / tokens as f64;
    Ok(Evaluation { loss, perplexity: loss.exp(), tokens, data: dataset.report() })
}
