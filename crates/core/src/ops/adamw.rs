//! AdamW, and the device scalars that steer a step.     Loshchilov & Hutter 2017, arXiv:1711.05101; order of operations as PyTorch
//!
//! With `g = grad * gradient_scale` and `t` the number of completed steps, this one included:
//! - `param *= 1 - lr * weight_decay`
//! - `m = beta1 * m + (1 - beta1) * g`, `v = beta2 * v + (1 - beta2) * g^2`
//! - `param -= lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)`
//!
//! Nothing changes when the step is to be skipped. The decision, the clip factor and `t` stay on the device in a
//! [`StepState`]; the host reads them when it likes.

use super::{check, cost::Cost};
use crate::{Category, DType, Device, Result, Tensor};

/// Hyper-parameters of one step for one group of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Learning rate of this step, 0 or more.
    pub learning_rate: f32,
    /// Decay of the first moment, in `[0, 1)`.
    pub beta1: f32,
    /// Decay of the second moment, in `[0, 1)`.
    pub beta2: f32,
    /// Added to the root of the second moment; positive.
    pub eps: f32,
    /// Decoupled weight decay, 0 or more.
    pub weight_decay: f32,
}

impl Spec {
    pub(super) fn validate(&self, op: &'static str) -> Result<()> {
        check::not_negative(op, "learning_rate", self.learning_rate)?;
        check::share(op, "beta1", self.beta1)?;
        check::share(op, "beta2", self.beta2)?;
        check::positive(op, "eps", self.eps)?;
        check::not_negative(op, "weight_decay", self.weight_decay)
    }
}

/// How a step is steered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ControlSpec {
    /// Gradients are scaled down to this norm if theirs is larger: factor `min(1, max / (norm + 1e-6))`, as PyTorch.
    pub max_grad_norm: Option<f32>,
    /// What gradients were multiplied by; they are divided by it before anything else.
    pub loss_scale: f32,
    /// Whether one bad step stops all later ones: on without a loss scaler, so that the last good state is kept until the
    /// host has seen the failure.
    pub sticky: bool,
}

/// Scalars of a step, f32 `[4]` on the device.
#[derive(Debug)]
pub struct StepState(Tensor);

impl StepState {
    /// Slot of the gradient norm, unscaled, before clipping.
    pub const GRAD_NORM: usize = 0;
    /// Slot of the factor that gradients are multiplied by: clip factor over loss scale.
    pub const GRADIENT_SCALE: usize = 1;
    /// Slot that is 1 if the step is skipped, else 0.
    pub const SKIP: usize = 2;
    /// Slot of the number of completed steps, this one included unless skipped.
    pub const STEPS: usize = 3;

    /// The state before the first step, or after `steps` completed ones.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(device: &Device, steps: u32) -> Result<Self> {
        Ok(Self(device.from_slice(&[0.0, 1.0, 0.0, steps as f32], [4], Category::Optimiser)?))
    }

    /// The four scalars.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }
}

/// Buffers of one parameter.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// The parameter, any float type.
    pub param: &'a mut Tensor,
    /// Its gradient, f32.
    pub grad: &'a Tensor,
    /// First moment, f32.
    pub m: &'a mut Tensor,
    /// Second moment, f32.
    pub v: &'a mut Tensor,
}

impl Buffers<'_> {
    /// Cost of a step: the gradient in; parameter and moments in and out.
    pub fn cost(&self) -> Cost {
        Cost::of(&[self.grad, self.param, self.m, self.v], &[self.param, self.m, self.v])
    }
}

/// AdamW of a backend.
pub trait AdamW {
    /// Fills the state for the next step from the norm of the scaled gradients (f32 `[1]`) and whether all is finite (f32
    /// `[1]`, 1 or 0). The step is skipped if not finite, if the norm is not, or (sticky) if the last one was.
    fn step_control(&self, spec: &ControlSpec, norm: &Tensor, finite: &Tensor, state: &mut Tensor) -> Result<()>;
    /// One step of parameters, in as few launches as the device admits.
    fn adamw(&self, spec: &Spec, parameters: &mut [Buffers<'_>], state: &Tensor) -> Result<()>;
}

/// Decides about the next step on the device. See [`AdamW::step_control`].
///
/// # Errors
/// Shape, dtype or device mismatch; a field out of its range.
pub fn control(spec: &ControlSpec, norm: &Tensor, finite: &Tensor, state: &mut StepState) -> Result<()> {
    let device = state.0.device().clone();
    check::tensor("step_control", "norm", norm, (&[1], DType::F32, &device))?;
    check::tensor("step_control", "finite", finite, (&[1], DType::F32, &device))?;
    check::positive("step_control", "loss_scale", spec.loss_scale)?;
    if let Some(max) = spec.max_grad_norm {
        check::positive("step_control", "max_grad_norm", max)?;
    }
    device.backend().step_control(spec, norm, finite, &mut state.0)
}

/// One AdamW step of parameters of one device, steered by `state`.
///
/// # Errors
/// Shape, dtype or device mismatch; a field out of its range; [`crate::Error::Shared`] if a buffer to write is shared.
pub fn step(spec: &Spec, parameters: &mut [Buffers<'_>], state: &StepState) -> Result<()> {
    spec.validate("adamw")?;
    for Buffers { param, grad, m, v } in &*parameters {
        check::update("adamw", (param, grad), state)?;
        let like = (&**grad.shape(), DType::F32, grad.device());
        check::tensor("adamw", "m", m, like)?;
        check::tensor("adamw", "v", v, like)?;
    }
    let device = state.0.device().clone();
    device.backend().adamw(spec, parameters, &state.0)
}
