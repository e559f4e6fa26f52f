//! Output projection and cross entropy in one pass over chunks; formula and gradient in [`core`].

use unsloth_core::{
    Category, DType, Result, Tensor,
    ops::{cross_entropy::LossSpec, elementwise, linear_cross_entropy as core},
};

use crate::{Matrix, Tape, Var};

/// Loss, f32 `[1]`, of `x W^T`, `x`: `[tokens, hidden_size]`, against targets i32 `[tokens]`.
///
/// Gradients are made at once, from each chunk's logits, and kept instead of `x`: `dx` of its size, and for a trained head an
/// f32 gradient of the head's size. Inside [`crate::checkpoint`] that happens in the second run only.
///
/// # Errors
/// As [`core::forward`]; an input of another tape.
pub fn linear_cross_entropy(tape: &Tape, x: &Var, head: &Matrix, targets: &Tensor, loss: LossSpec) -> Result<Var> {
    let link = tape.link("linear_cross_entropy", &[x], &[head.parameter()])?;
    let weight = head.weight()?;
    let mut dweight = match head.parameter().filter(|_| link.saves()) {
        None => None,
        Some(parameter) => {
            let shape = [weight.out_features(), weight.in_features()];
            let buffer = weight.device().zeros(shape, DType::F32, Category::Gradients)?;
            Some((parameter.clone(), buffer))
        }
    };
    let needs_dx = link.saves() && x.requires_grad();
    let buffer = dweight.as_mut().map(|(_, buffer)| buffer);
    let core::Forward { loss: value, dx } = core::forward(x.tensor(), &weight, targets, loss, needs_dx, buffer)?;
    let to = x.source();
    Ok(link.one(value, move |context, dloss| {
        if let Some((parameter, buffer)) = dweight
            && let Some(dweight) = context.gradient(&parameter)
        {
            elementwise::accumulate(dweight, &elementwise::scale_by(buffer, &dloss)?)?;
        }
        match dx.filter(|_| context.wants(to)) {
            Some(dx) => context.send(to, elementwise::scale_by(dx, &dloss)?),
            None => Ok(()),
        }
    }))
}
