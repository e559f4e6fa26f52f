//! Training, evaluation and memory plans from files to files.

mod adapter;
mod check_grad;
mod checkpoint;
mod config;
mod curve;
mod error;
mod evaluate;
mod fit;
mod merge;
mod method;
mod metrics;
mod offload;
mod options;
mod output;
mod plan;
mod policy;
pub mod quickstart;
mod train;

use std::path::Path;

pub use adapter::AdapterSettings;
pub use check_grad::{CheckGradConfig, CheckedGradient, GradientReport, Reference, check_grad};
pub use config::{EvalSource, RunLength, Start, TrainConfig, Warmup};
pub use error::{Damage, RunError};
pub use evaluate::{EvalConfig, Evaluation, evaluate};
pub use fit::{Command, Fitted, OverBudget, Planner, Suggestion};
pub use merge::{MergeConfig, merge};
pub use method::Method;
pub use metrics::{Best, EvalRecord, StepRecord};
pub use offload::{Offload, Offloaded};
pub use options::{OneOrMany, TrainOptions};
pub use plan::{MemoryPlan, plan};
pub use policy::Policy;
pub use train::{End, EvalReport, Event, Prepared, Resumed, Summary, train};
use unsloth_core::{DType, Device};

use crate::{
    Result,
    config::DecoderConfig,
    decoder::{Decoder, LoadOptions},
    peft,
};

/// Examples are cut to this many tokens where neither the user nor the model asks for less.
const DEFAULT_MAX_SEQ_LEN: usize = 2048;

/// A model with, if a folder is given, its adapter, ready to compute in `dtype`.
///
/// # Errors
/// As [`Decoder::load`] and [`peft::load`].
pub fn load_model(device: &Device, model: &Path, adapter: Option<&Path>, dtype: DType) -> Result<Decoder> {
    let mut decoder = Decoder::load(model, device, LoadOptions::frozen(dtype))?;
    if let Some(adapter) = adapter {
        peft::load(adapter, &mut decoder)?;
    }
    Ok(decoder)
}

/// The limit asked for, or the model's or [`DEFAULT_MAX_SEQ_LEN`], the smaller.
fn max_seq_len(asked: Option<usize>, model: &DecoderConfig) -> usize {
    asked.unwrap_or_else(|| model.max_position_embeddings.min(DEFAULT_MAX_SEQ_LEN))
}
