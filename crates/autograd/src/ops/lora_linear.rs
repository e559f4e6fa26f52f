//! Linear layer with a low-rank update; formula and gradient in [`core`].

use std::{cell::RefCell, rc::Rc};

use unsloth_core::{
    Error, Result, Tensor,
    ops::lora_linear::{self as core, Adapter, Backward, Dropout, ParameterGradients, RowDropout},
};

use super::linear::BaseParameters;
use crate::{Deferred, Matrix, Parameter, Tape, Var, Vector, saved::Saved};

/// A trained low-rank update `scale * B A`.
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    /// `[rank, in_features]`
    pub lora_a: Parameter,
    /// `[out_features, rank]`
    pub lora_b: Parameter,
    /// Factor of the update: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f32,
    /// Zeros in the update's input.
    pub dropout: Option<LoraDropout>,
}

/// Dropout of a call, and where each of its rows stands in the step.
#[derive(Clone, Debug)]
pub struct LoraDropout {
    /// What all rows have in common.
    pub dropout: Dropout,
    /// i32 `[rows]`: number of the row's sequence among all of the step.
    pub sequences: Tensor,
    /// i32 `[rows]`: place of the row in its sequence.
    pub positions: Tensor,
}

impl LoraDropout {
    fn borrowed(&self) -> RowDropout<'_> {
        RowDropout { dropout: self.dropout, sequences: &self.sequences, positions: &self.positions }
    }
}

impl LoraAdapter {
    /// Lets `work` see the adapter as operators take it.
    fn borrowed<R>(&self, work: impl FnOnce(Adapter<'_>) -> R) -> R {
        let (lora_a, lora_b) = (&self.lora_a.value(), &self.lora_b.value());
        work(Adapter { lora_a, lora_b, scale: self.scale, dropout: self.dropout.as_ref().map(LoraDropout::borrowed) })
    }
}

/// `y = x W^T + bias + scale * (drop(x) A^T) B^T`, `x`: `[rows, in_features]`. Keeps `x` and `drop(x) A^T`; what is dropped is
/// drawn again.
///
/// # Errors
/// As [`core::forward`]; [`Error::InvalidSpec`] if one parameter is both `lora_a` and `lora_b`; an input of another tape.
pub fn lora_linear(tape: &Tape, x: &Var, weight: &Matrix, bias: Option<&Vector>, adapter: &LoraAdapter) -> Result<Var> {
    deferred_lora_linear(tape, x, weight, bias, adapter)?.compute()
}

/// [`lora_linear`], computed when it is asked for. Where it is not, the backward pass makes `drop(x) A^T` itself.
///
/// # Errors
/// [`Error::InvalidSpec`] if one parameter is both `lora_a` and `lora_b`; an input of another tape.
pub fn deferred_lora_linear(
    tape: &Tape,
    x: &Var,
    weight: &Matrix,
    bias: Option<&Vector>,
    adapter: &LoraAdapter,
) -> Result<Deferred> {
    const OP: &str = "lora_linear";
    let LoraAdapter { lora_a, lora_b, .. } = adapter;
    if lora_a.id() == lora_b.id() {
        let value = lora_b.name().to_owned();
        return Err(Error::InvalidSpec { op: OP, field: "lora_b", value, rule: "another parameter than lora_a" });
    }
    let parameters = [weight.parameter(), bias.and_then(Vector::parameter), Some(lora_a), Some(lora_b)];
    let link = tape.link(OP, &[x], &parameters)?;
    let hidden = Rc::new(RefCell::new(None));
    let forward = {
        let (x, weight, bias) = (x.tensor().clone(), weight.clone(), bias.cloned());
        let (adapter, hidden) = (adapter.clone(), hidden.clone());
        move || {
            let (weight, bias) = (weight.weight()?, bias.as_ref().map(Vector::tensor));
            let core::Forward { y, h } =
                adapter.borrowed(|adapter| core::forward(&x, &weight, bias.as_ref(), adapter))?;
            hidden.replace(Some(h));
            Ok(y)
        }
    };
    let base = BaseParameters::new(x, weight, bias);
    let (to, x, weight, adapter) = (x.source(), Saved::of(x), weight.clone(), adapter.clone());
    Ok(link.deferred(forward, move |context, dy| {
        base.backward(context, &dy)?;
        let (weight, x, needs_dx) = (weight.weight()?, x.take()?, context.wants(to));
        let h = match hidden.take() {
            Some(h) => h,
            None => adapter.borrowed(|adapter| core::hidden(&x, &weight, adapter))?,
        };
        let (dlora_a, dlora_b) = context.gradient_pair(&adapter.lora_a, &adapter.lora_b);
        let dx = adapter.borrowed(|adapter| {
            let inputs = Backward { dy: &dy, x: &x, h: &h, weight: &weight, adapter, needs_dx };
            core::backward(inputs, ParameterGradients { dlora_a, dlora_b })
        })?;
        drop((dy, x, h));
        dx.map_or(Ok(()), |dx| context.send(to, dx))
    }))
}
