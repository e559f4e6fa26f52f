//! Linear layer with a low-rank update; formula and gradient in [`core`].

use unsloth_core::{
    Error, Result,
    ops::lora_linear::{self as core, Adapter, Backward, ParameterGradients},
};

use super::linear::BaseParameters;
use crate::{Matrix, Parameter, Tape, Var, Vector};

/// A trained low-rank update `scale * B A`.
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    /// `[rank, in_features]`
    pub lora_a: Parameter,
    /// `[out_features, rank]`
    pub lora_b: Parameter,
    /// Factor of the update: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f32,
}

/// `y = x W^T + bias + scale * (x A^T) B^T`, `x`: `[rows, in_features]`. Keeps `x` and `x A^T`.
///
/// # Errors
/// As [`core::forward`]; [`Error::InvalidSpec`] if one parameter is both `lora_a` and `lora_b`; an input of another tape.
pub fn lora_linear(tape: &Tape, x: &Var, weight: &Matrix, bias: Option<&Vector>, adapter: &LoraAdapter) -> Result<Var> {
    const OP: &str = "lora_linear";
    let LoraAdapter { lora_a, lora_b, scale } = adapter.clone();
    if lora_a.id() == lora_b.id() {
        let value = lora_b.name().to_owned();
        return Err(Error::InvalidSpec { op: OP, field: "lora_b", value, rule: "another parameter than lora_a" });
    }
    let parameters = [weight.parameter(), bias.and_then(Vector::parameter), Some(&lora_a), Some(&lora_b)];
    let link = tape.link(OP, &[x], &parameters)?;
    let update = Adapter { lora_a: &lora_a.value(), lora_b: &lora_b.value(), scale };
    let core::Forward { y, h } =
        core::forward(x.tensor(), &weight.weight()?, bias.map(Vector::tensor).as_ref(), update)?;
    let base = BaseParameters::new(x.tensor(), weight, bias);
    let (to, x, weight) = (x.source(), x.tensor().clone(), weight.clone());
    Ok(link.one(y, move |context, dy| {
        base.backward(context, &dy)?;
        let (weight, needs_dx) = (weight.weight()?, context.wants(to));
        let adapter = Adapter { lora_a: &lora_a.value(), lora_b: &lora_b.value(), scale };
        let inputs = Backward { dy: &dy, x: &x, h: &h, weight: &weight, adapter, needs_dx };
        let (dlora_a, dlora_b) = context.gradient_pair(&lora_a, &lora_b);
        let dx = core::backward(inputs, ParameterGradients { dlora_a, dlora_b })?;
        drop((dy, x, h));
        dx.map_or(Ok(()), |dx| context.send(to, dx))
    }))
}
