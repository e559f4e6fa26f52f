//! What can be trained.

use unsloth_autograd::{Parameter, Tape, Var};
use unsloth_core::{Device, Result, ops::cross_entropy::LossSpec};

use crate::{Batch, Role};

/// A function of a batch with parameters to train.
pub trait Model {
    /// Loss of the batch, f32 `[1]`: the sum over its targets divided by `loss.num_targets`, which counts the targets of the
    /// whole accumulated step. The model may add what belongs to it, such as a softcap, to `loss`. What it draws at random
    /// depends on [`Batch::draw`] and the places of rows alone; it draws nothing without.
    ///
    /// # Errors
    /// Whatever its operators refuse, such as an id outside the vocabulary; [`unsloth_core::Error::OutOfMemory`].
    fn loss(&self, tape: &Tape, batch: &Batch, loss: LossSpec) -> Result<Var>;

    /// The parameters to train; frozen weights are not among them.
    fn parameters(&self) -> Vec<Parameter>;

    /// What a parameter is, where that gives it a learning rate of its own.
    fn role(&self, _parameter: &Parameter) -> Role {
        Role::Weight
    }

    /// Where the model lives.
    fn device(&self) -> &Device;
}
