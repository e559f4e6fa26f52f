//! Softmax cross entropy over given logits; formula and gradient in [`core`].

use unsloth_core::{
    Result, Tensor,
    ops::{
        cross_entropy::{self as core, LossSpec},
        elementwise,
    },
};

use crate::{Tape, Var};

/// Loss, f32 `[1]`, of logits `[tokens, vocab_size]` against targets i32 `[tokens]`.
///
/// Keeps the logits, whose buffer becomes their gradient, and one f32 per token.
///
/// # Errors
/// As [`core::forward`]; an input of another tape.
pub fn cross_entropy(tape: &Tape, logits: Var, targets: &Tensor, loss: LossSpec) -> Result<Var> {
    let link = tape.link("cross_entropy", &[&logits], &[])?;
    let core::Forward { loss: value, lse } = core::forward(logits.tensor(), targets, loss)?;
    let (to, logits, targets) = (logits.source(), logits.into_tensor(), targets.clone());
    Ok(link.one(value, move |context, dloss| {
        let dlogits = core::backward(logits, &targets, &lse, loss)?;
        context.send(to, elementwise::scale_by(dlogits, &dloss)?)
    }))
}
