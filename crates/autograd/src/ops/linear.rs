//! Matrix product with a weight; formula and gradient in [`core`].

use unsloth_core::{Result, Tensor, ops::linear as core};

use crate::{Deferred, Matrix, Parameter, Tape, Var, Vector, backward::Context, saved::Saved};

/// `y = x W^T + bias`, `x`: `[rows, in_features]`. Keeps `x` only if the matrix is trained.
///
/// # Errors
/// As [`core::forward`]; an input of another tape.
pub fn linear(tape: &Tape, x: &Var, weight: &Matrix, bias: Option<&Vector>) -> Result<Var> {
    deferred_linear(tape, x, weight, bias)?.compute()
}

/// [`linear`], computed when it is asked for.
///
/// # Errors
/// An input of another tape.
pub fn deferred_linear(tape: &Tape, x: &Var, weight: &Matrix, bias: Option<&Vector>) -> Result<Deferred> {
    let link = tape.link("linear", &[x], &[weight.parameter(), bias.and_then(Vector::parameter)])?;
    let forward = {
        let (x, weight, bias) = (x.tensor().clone(), weight.clone(), bias.cloned());
        move || core::forward(&x, &weight.weight()?, bias.as_ref().map(Vector::tensor).as_ref())
    };
    let parameters = BaseParameters::new(x, weight, bias);
    let (to, weight) = (x.source(), weight.clone());
    Ok(link.deferred(forward, move |context, dy| {
        parameters.backward(context, &dy)?;
        if context.wants(to) {
            let dx = core::input_gradient(&dy, &weight.weight()?)?;
            drop(dy);
            context.send(to, dx)?;
        }
        Ok(())
    }))
}

/// The trained parts of a linear layer without its adapter.
pub(super) struct BaseParameters {
    /// The matrix, and the layer's input, which only its gradient reads.
    weight: Option<(Parameter, Saved)>,
    bias: Option<Parameter>,
}

impl BaseParameters {
    pub(super) fn new(x: &Var, weight: &Matrix, bias: Option<&Vector>) -> Self {
        Self {
            weight: weight.parameter().map(|parameter| (parameter.clone(), Saved::of(x))),
            bias: bias.and_then(Vector::parameter).cloned(),
        }
    }

    /// Of a layer whose matrix is another operator's.
    pub(super) fn of_bias(bias: Option<&Vector>) -> Self {
        Self { weight: None, bias: bias.and_then(Vector::parameter).cloned() }
    }

    /// Adds to the gradients of those that are registered.
    pub(super) fn backward(self, context: &mut Context<'_>, dy: &Tensor) -> Result<()> {
        if let Some((parameter, x)) = self.weight
            && let Some(dweight) = context.gradient(&parameter)
        {
            core::weight_gradient(dy, &x.take()?, dweight)?;
        }
        if let Some(parameter) = self.bias
            && let Some(dbias) = context.gradient(&parameter)
        {
            core::bias_gradient(dy, dbias)?;
        }
        Ok(())
    }
}
