//! Loss without training.

use unsloth_autograd::Tape;
use unsloth_core::{
    Category, DType,
    ops::{cross_entropy::LossSpec, elementwise},
};

use crate::{Batch, Error, Model, Result};

/// Mean loss over all targets of the batches. Nothing is recorded or kept for a backward pass.
///
/// # Errors
/// [`Error::NothingToEvaluate`] if no token has a target; whatever the model's operators refuse.
pub fn evaluate(model: &impl Model, batches: &[Batch]) -> Result<f32> {
    let num_targets = batches.iter().map(|batch| batch.num_targets).sum();
    if num_targets == 0 {
        return Err(Error::NothingToEvaluate);
    }
    let mut total = model.device().zeros([1], DType::F32, Category::Activations)?;
    for batch in batches {
        let loss = model.loss(&Tape::inference(), batch, LossSpec::mean(num_targets))?;
        total = elementwise::add(total, loss.tensor())?;
    }
    Ok(total.to_f32_vec()?[0])
}
