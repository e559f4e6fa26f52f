//! LayerNorm, with a fused residual add; formula and gradient in [`core`].

use std::rc::Rc;

use unsloth_core::{
    Error, Result, Tensor,
    ops::layer_norm::{self as core, Affine, Backward, ParameterGradients},
};

use crate::{Parameter, Tape, Var, Vector, backward::Context, saved::Again, tape::Link};

/// Weight and bias of a norm, each frozen or trained, and the number added to the variance.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// `[hidden_size]`
    pub weight: Vector,
    /// `[hidden_size]`, of the type of `weight`.
    pub bias: Option<Vector>,
    /// Positive.
    pub eps: f32,
}

impl LayerNorm {
    fn parameters(&self) -> Result<[Option<&Parameter>; 2]> {
        let (weight, bias) = (self.weight.parameter(), self.bias.as_ref().and_then(Vector::parameter));
        if let (Some(weight), Some(bias)) = (weight, bias)
            && weight.id() == bias.id()
        {
            let value = bias.name().to_owned();
            let rule = "another parameter than the weight";
            return Err(Error::InvalidSpec { op: "layer_norm", field: "bias", value, rule });
        }
        Ok([weight, bias])
    }

    fn forward(&self, x: Tensor, residual: Option<&Tensor>) -> Result<core::Forward> {
        let (weight, bias) = (self.weight.tensor(), self.bias.as_ref().map(Vector::tensor));
        core::forward(x, residual, Affine { weight: &weight, bias: bias.as_ref() }, self.eps)
    }
}

/// What the backward pass reads.
struct Saved {
    normalised: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm: LayerNorm,
}

impl Saved {
    fn backward(&self, context: &mut Context<'_>, dout: Tensor, dsum: Option<&Tensor>) -> Result<Tensor> {
        let (sum, weight) = (&self.normalised, &self.norm.weight.tensor());
        let inputs = Backward { dout, dsum, sum, weight, mean: &self.mean, rstd: &self.rstd };
        let [weight, bias] = self.norm.parameters()?;
        let (dweight, dbias) = match (weight, bias) {
            (Some(weight), Some(bias)) => context.gradient_pair(weight, bias),
            (Some(weight), None) => (context.gradient(weight), None),
            (None, Some(bias)) => (None, context.gradient(bias)),
            (None, None) => (None, None),
        };
        core::backward(inputs, ParameterGradients { dweight, dbias }, self.norm.eps)
    }

    /// The norm's result from what it keeps, where that is asked for.
    fn again(&self, link: &Link<'_>, tape: &Tape) -> Option<Rc<Again>> {
        (tape.recompute().norms && link.saves()).then(|| {
            let (x, norm) = (self.normalised.clone(), self.norm.clone());
            Again::new(move || Ok(norm.forward(x, None)?.out))
        })
    }
}

/// Normalised rows of `x`, `[rows, hidden_size]`. Keeps `x` and two f32 per row.
///
/// # Errors
/// As [`core::forward`]; [`Error::InvalidSpec`] for a bias that is the same parameter as the weight; an input of another tape.
pub fn layer_norm(tape: &Tape, x: &Var, norm: &LayerNorm) -> Result<Var> {
    let link = tape.link("layer_norm", &[x], &norm.parameters()?)?;
    let core::Forward { out, mean, rstd, .. } = norm.forward(x.tensor().clone(), None)?;
    let saved = Saved { normalised: x.tensor().clone(), mean, rstd, norm: norm.clone() };
    let (to, again) = (x.source(), saved.again(&link, tape));
    let out = link.one(out, move |context, dout| {
        let dx = saved.backward(context, dout, None)?;
        drop(saved);
        context.send(to, dx)
    });
    Ok(out.with_again(again))
}

/// `sum = x + residual` and its normalised rows: `(out, sum)`. `x` is reused for the sum where nothing else holds it.
///
/// Keeps the sum and two f32 per row.
///
/// # Errors
/// As [`layer_norm`].
pub fn add_layer_norm(tape: &Tape, x: Var, residual: &Var, norm: &LayerNorm) -> Result<(Var, Var)> {
    let link = tape.link("add_layer_norm", &[&x, residual], &norm.parameters()?)?;
    let (to_x, to_residual) = (x.source(), residual.source());
    let core::Forward { out, sum, mean, rstd } = norm.forward(x.into_tensor(), Some(residual.tensor()))?;
    let Some(sum) = sum else {
        panic!("a norm with a residual gives the sum");
    };
    let saved = Saved { normalised: sum.clone(), mean, rstd, norm: norm.clone() };
    let again = saved.again(&link, tape);
    let (out, sum) = link.two((out, sum), move |context, dout, dsum| {
        let dx = match (dout, dsum) {
            (Some(dout), dsum) => saved.backward(context, dout, dsum.as_ref())?,
            // Only the residual stream is read further on: the norm and its parameters take no part.
            (None, Some(dsum)) => dsum,
            (None, None) => return Ok(()),
        };
        drop(saved);
        context.send(to_x, dx.clone())?;
        context.send(to_residual, dx)
    });
    Ok((out.with_again(again), sum))
}
