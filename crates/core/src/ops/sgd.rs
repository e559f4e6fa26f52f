//! Stochastic gradient descent with momentum.     Polyak 1964, doi:10.1016/0041-5553(64)90137-5; order of operations as PyTorch
//!
//! With `g = grad * gradient_scale + weight_decay * param`:
//! - `buf = momentum * buf + g`
//! - `param -= lr * (g + momentum * buf)` with Nesterov's momentum, else `param -= lr * buf`
//!
//! Without momentum there is no `buf`, and `param -= lr * g`. Nothing changes when the step is to be skipped ([`StepState`]).

use super::{adamw::StepState, check, cost::Cost};
use crate::{DType, Result, Tensor};

/// Hyper-parameters of one step for one group of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Learning rate of this step, 0 or more.
    pub learning_rate: f32,
    /// Share of the buffer that is kept, in `[0, 1)`; 0 where there is no buffer, and only there.
    pub momentum: f32,
    /// Whether a step looks ahead by one momentum.     Nesterov 1983
    pub nesterov: bool,
    /// Decay that is added to the gradient, 0 or more.
    pub weight_decay: f32,
}

impl Spec {
    fn validate(&self) -> Result<()> {
        check::not_negative("sgd", "learning_rate", self.learning_rate)?;
        check::share("sgd", "momentum", self.momentum)?;
        check::not_negative("sgd", "weight_decay", self.weight_decay)
    }
}

/// Buffers of one parameter.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// The parameter, any float type.
    pub param: &'a mut Tensor,
    /// Its gradient, f32.
    pub grad: &'a Tensor,
    /// Sum of past gradients, f32.
    pub buf: Option<&'a mut Tensor>,
}

impl Buffers<'_> {
    /// Cost of a step: the gradient in; parameter and buffer in and out.
    pub fn cost(&self) -> Cost {
        let buf = self.buf.as_deref().map_or(Cost::default(), |buf| Cost::of(&[buf], &[buf]));
        Cost::of(&[self.grad, self.param], &[self.param]) + buf
    }
}

/// Gradient descent of a backend.
pub trait Sgd {
    /// One step of one parameter.
    fn sgd(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()>;
}

/// One step of one parameter, steered by `state`.
///
/// # Errors
/// Shape, dtype or device mismatch; a field out of its range; [`crate::Error::Shared`] if a buffer to write is shared.
pub fn step(spec: &Spec, buffers: Buffers<'_>, state: &StepState) -> Result<()> {
    spec.validate()?;
    if buffers.buf.is_some() != (spec.momentum > 0.0) {
        return check::invalid("sgd", "momentum", spec.momentum, "above 0 with a buffer, and 0 without");
    }
    check::update("sgd", (buffers.param, buffers.grad), state)?;
    if let Some(buf) = &buffers.buf {
        check::tensor("sgd", "buf", buf, (buffers.grad.shape(), DType::F32, buffers.grad.device()))?;
    }
    let device = buffers.grad.device().clone();
    device.backend().sgd(spec, buffers, state.tensor())
}
