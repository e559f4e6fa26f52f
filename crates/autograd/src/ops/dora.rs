//! Linear layer whose rows have trained lengths; formula and gradient in [`core`].

use unsloth_core::{
    Error, Result,
    ops::dora::{self as core, Lengths},
};

use super::{LoraAdapter, linear::BaseParameters, lora_linear};
use crate::{Matrix, Parameter, Tape, Var, Vector};

/// `y = magnitude / |W + scale * B A| * (x W^T + scale * (drop(x) A^T) B^T) + bias`, `x`: `[rows, in_features]`. Keeps what
/// [`lora_linear`] keeps, its result, and the lengths.
///
/// # Errors
/// As [`lora_linear`], [`core::norms`] and [`core::forward`]; [`Error::InvalidSpec`] for a magnitude that is another parameter
/// of the layer.
pub fn dora(
    tape: &Tape,
    x: &Var,
    (weight, bias): (&Matrix, Option<&Vector>),
    adapter: &LoraAdapter,
    magnitude: &Parameter,
) -> Result<Var> {
    const OP: &str = "dora";
    let bias_parameter = bias.and_then(Vector::parameter);
    if bias_parameter.is_some_and(|bias| bias.id() == magnitude.id()) {
        let value = magnitude.name().to_owned();
        return Err(Error::InvalidSpec { op: OP, field: "magnitude", value, rule: "another parameter than the bias" });
    }
    let t = lora_linear(tape, x, weight, None, adapter)?;
    let (lora_a, lora_b) = (adapter.lora_a.value(), adapter.lora_b.value());
    let norms = core::norms(&weight.weight()?, &lora_a, &lora_b, adapter.scale)?;
    let link = tape.link(OP, &[&t], &[bias_parameter, Some(magnitude)])?;
    let lengths = Lengths { magnitude: &magnitude.value(), norms: &norms };
    let y = core::forward(t.tensor(), lengths, bias.map(Vector::tensor).as_ref())?;
    let base = BaseParameters::of_bias(bias);
    let (to, t, magnitude) = (t.source(), t.into_tensor(), magnitude.clone());
    Ok(link.one(y, move |context, dy| {
        base.backward(context, &dy)?;
        let lengths = Lengths { magnitude: &magnitude.value(), norms: &norms };
        let dt = core::backward(dy, &t, lengths, context.gradient(&magnitude))?;
        drop((t, norms));
        context.send(to, dt)
    }))
}
