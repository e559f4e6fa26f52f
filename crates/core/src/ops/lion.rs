//! Lion: steps of one size, in the direction of a sign.                Chen et al. 2023, arXiv:2302.06675, algorithm 2
//!
//! With `g = grad * gradient_scale`:
//! - `c = beta1 * m + (1 - beta1) * g`
//! - `param = param * (1 - lr * weight_decay) - lr * sign(c)`, where `sign(0) = 0`
//! - `m = beta2 * m + (1 - beta2) * g`
//!
//! Nothing changes when the step is to be skipped ([`StepState`]).

use super::{adamw::StepState, check, cost::Cost};
use crate::{DType, Result, Tensor};

/// Hyper-parameters of one step for one group of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Learning rate of this step, 0 or more.
    pub learning_rate: f32,
    /// Weight of the momentum in the direction of a step, in `[0, 1)`.
    pub beta1: f32,
    /// Decay of the momentum, in `[0, 1)`.
    pub beta2: f32,
    /// Decoupled weight decay, 0 or more.
    pub weight_decay: f32,
}

impl Spec {
    fn validate(&self) -> Result<()> {
        check::not_negative("lion", "learning_rate", self.learning_rate)?;
        check::share("lion", "beta1", self.beta1)?;
        check::share("lion", "beta2", self.beta2)?;
        check::not_negative("lion", "weight_decay", self.weight_decay)
    }
}

/// Buffers of one parameter.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// The parameter, any float type.
    pub param: &'a mut Tensor,
    /// Its gradient, f32.
    pub grad: &'a Tensor,
    /// Momentum, f32.
    pub m: &'a mut Tensor,
}

impl Buffers<'_> {
    /// Cost of a step: the gradient in; parameter and momentum in and out.
    pub fn cost(&self) -> Cost {
        Cost::of(&[self.grad, self.param, self.m], &[self.param, self.m])
    }
}

/// Lion of a backend.
pub trait Lion {
    /// One step of one parameter.
    fn lion(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()>;
}

/// One step of one parameter, steered by `state`.
///
/// # Errors
/// Shape, dtype or device mismatch; a field out of its range; [`crate::Error::Shared`] if a buffer to write is shared.
pub fn step(spec: &Spec, buffers: Buffers<'_>, state: &StepState) -> Result<()> {
    spec.validate()?;
    check::update("lion", (buffers.param, buffers.grad), state)?;
    check::tensor("lion", "m", buffers.m, (buffers.grad.shape(), DType::F32, buffers.grad.device()))?;
    let device = buffers.grad.device().clone();
    device.backend().lion(spec, buffers, state.tensor())
}
