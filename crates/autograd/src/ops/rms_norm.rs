//! Root-mean-square normalisation, with a fused residual add; formula and gradient in [`core`].

use std::rc::Rc;

use unsloth_core::{
    Result, Tensor,
    ops::rms_norm::{self as core, Backward},
};

use crate::{Parameter, Tape, Var, Vector, backward::Context, saved::Again, tape::Link};

/// What a model chooses about its norms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormOptions {
    /// Added to the mean square; positive.
    pub eps: f32,
    /// Added to every weight: 0 for Llama, 1 for Gemma.
    pub weight_offset: f32,
}

/// What the backward pass reads.
struct Saved {
    normalised: Tensor,
    rstd: Tensor,
    weight: Vector,
    options: NormOptions,
}

impl Saved {
    fn backward(&self, context: &mut Context<'_>, dout: Tensor, dsum: Option<&Tensor>) -> Result<Tensor> {
        let weight = self.weight.tensor();
        let inputs = Backward { dout, dsum, sum: &self.normalised, weight: &weight, rstd: &self.rstd };
        let dweight = self.weight.parameter().and_then(|parameter: &Parameter| context.gradient(parameter));
        core::backward(inputs, dweight, self.options.eps, self.options.weight_offset)
    }

    /// The norm's result from what it keeps, where that is asked for.
    fn again(&self, link: &Link<'_>, tape: &Tape) -> Option<Rc<Again>> {
        (tape.recompute().norms && link.saves()).then(|| {
            let (x, weight, NormOptions { eps, weight_offset }) =
                (self.normalised.clone(), self.weight.clone(), self.options);
            Again::new(move || Ok(core::forward(x, None, &weight.tensor(), eps, weight_offset)?.out))
        })
    }
}

/// Normalised rows of `x`, `[rows, hidden_size]`. Keeps `x` and one f32 per row.
///
/// # Errors
/// As [`core::forward`]; an input of another tape.
pub fn rms_norm(tape: &Tape, x: &Var, weight: &Vector, options: NormOptions) -> Result<Var> {
    let link = tape.link("rms_norm", &[x], &[weight.parameter()])?;
    let forward = core::forward(x.tensor().clone(), None, &weight.tensor(), options.eps, options.weight_offset)?;
    let saved = Saved { normalised: x.tensor().clone(), rstd: forward.rstd, weight: weight.clone(), options };
    let (to, again) = (x.source(), saved.again(&link, tape));
    let out = link.one(forward.out, move |context, dout| {
        let dx = saved.backward(context, dout, None)?;
        drop(saved);
        context.send(to, dx)
    });
    Ok(out.with_again(again))
}

/// `sum = x + residual` and its normalised rows: `(out, sum)`. `x` is reused for the sum where nothing else holds it.
///
/// Keeps the sum and one f32 per row.
///
/// # Errors
/// As [`core::forward`]; an input of another tape.
pub fn add_rms_norm(tape: &Tape, x: Var, residual: &Var, weight: &Vector, options: NormOptions) -> Result<(Var, Var)> {
    let link = tape.link("add_rms_norm", &[&x, residual], &[weight.parameter()])?;
    let (to_x, to_residual) = (x.source(), residual.source());
    let forward =
        core::forward(x.into_tensor(), Some(residual.tensor()), &weight.tensor(), options.eps, options.weight_offset)?;
    let Some(sum) = forward.sum else {
        panic!("a norm with a residual gives the sum");
    };
    let saved = Saved { normalised: sum.clone(), rstd: forward.rstd, weight: weight.clone(), options };
    let again = saved.again(&link, tape);
    let (out, sum) = link.two((forward.out, sum), move |context, dout, dsum| {
        let dx = match (dout, dsum) {
            (Some(dout), dsum) => saved.backward(context, dout, dsum.as_ref())?,
            // Only the residual stream is read further on: the norm and its weight take no part.
            (None, Some(dsum)) => dsum,
            (None, None) => return Ok(()),
        };
        drop(saved);
        context.send(to_x, dx.clone())?;
        context.send(to_residual, dx)
    });
    Ok((out.with_again(again), sum))
}
