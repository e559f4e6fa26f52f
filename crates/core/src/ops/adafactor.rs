//! Adafactor with a rate from outside and no first moment.           Shazeer & Stern 2018, arXiv:1804.04235
//!
//! With `g = grad * gradient_scale`, `t` completed steps, this one included, and `beta = 1 - t^decay_rate`:
//! - of a matrix: `row_i = beta * row_i + (1 - beta) * mean_j(g_ij^2 + eps)`, `col_j` likewise over `i`, and
//!   `u_ij = g_ij / sqrt(row_i / mean(row) * col_j)`
//! - of anything else: `v = beta * v + (1 - beta) * (g^2 + eps)`, and `u = g / sqrt(v)`
//! - `param = param * (1 - lr * weight_decay) - alpha * u / max(1, rms(u) / clip_threshold)`
//!
//! where `alpha = lr`, as transformers' `Adafactor` has it without `scale_parameter`, or `alpha = lr * max(scale, rms(param))`, as
//! `torch.optim.Adafactor` has it for rates below `1 / sqrt(t)`. Nothing changes when the step is to be skipped ([`StepState`]).

use super::{adamw::StepState, check, cost::Cost};
use crate::{DType, Result, Tensor};

/// Hyper-parameters of one step for one group of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Learning rate of this step, 0 or more.
    pub learning_rate: f32,
    /// Power of the number of steps by which averages grow longer, below 0; -0.8 in the paper.
    pub decay_rate: f32,
    /// Added to the square of a gradient, positive.
    pub eps: f32,
    /// Root mean square that a change is scaled down to, before the learning rate; positive.
    pub clip_threshold: f32,
    /// Whether the rate is relative to the root mean square of the parameter, and the least that this counts as; positive.
    pub parameter_scale: Option<f32>,
    /// Decoupled weight decay, 0 or more.
    pub weight_decay: f32,
}

impl Spec {
    fn validate(&self) -> Result<()> {
        const OP: &str = "adafactor";
        check::not_negative(OP, "learning_rate", self.learning_rate)?;
        if !(self.decay_rate < 0.0 && self.decay_rate.is_finite()) {
            return check::invalid(OP, "decay_rate", self.decay_rate, "below 0 and finite");
        }
        check::positive(OP, "eps", self.eps)?;
        check::positive(OP, "clip_threshold", self.clip_threshold)?;
        check::positive(OP, "parameter_scale", self.parameter_scale.unwrap_or(1.0))?;
        check::not_negative(OP, "weight_decay", self.weight_decay)
    }
}

/// Averages of squared gradients.
#[derive(Debug)]
pub enum Averages<'a> {
    /// Of the rows and the columns of a matrix, f32.
    Factored {
        /// `[rows]`
        row: &'a mut Tensor,
        /// `[columns]`
        col: &'a mut Tensor,
    },
    /// Of each element, f32 of the parameter's shape.
    Whole(&'a mut Tensor),
}

/// Buffers of one parameter.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// The parameter, any float type.
    pub param: &'a mut Tensor,
    /// Its gradient, f32.
    pub grad: &'a Tensor,
    /// What is kept of earlier gradients.
    pub averages: Averages<'a>,
}

impl Buffers<'_> {
    /// Cost of a step: the gradient in; parameter and averages in and out.
    pub fn cost(&self) -> Cost {
        let averages = match &self.averages {
            Averages::Factored { row, col } => Cost::of(&[&**row, &**col], &[&**row, &**col]),
            Averages::Whole(v) => Cost::of(&[&**v], &[&**v]),
        };
        Cost::of(&[self.grad, self.param], &[self.param]) + averages
    }
}

/// Adafactor of a backend.
pub trait Adafactor {
    /// One step of one parameter.
    fn adafactor(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()>;
}

/// One step of one parameter, steered by `state`. Averages are factored exactly where the parameter is a matrix.
///
/// # Errors
/// Shape, dtype or device mismatch; a field out of its range; [`crate::Error::Shared`] if a buffer to write is shared.
pub fn step(spec: &Spec, buffers: Buffers<'_>, state: &StepState) -> Result<()> {
    const OP: &str = "adafactor";
    spec.validate()?;
    check::update(OP, (buffers.param, buffers.grad), state)?;
    let (shape, device) = (buffers.grad.shape(), buffers.grad.device().clone());
    match &buffers.averages {
        Averages::Factored { row, col } => {
            check::rank(OP, "param", buffers.param, 2, "[rows, columns]")?;
            check::tensor(OP, "row", row, (&shape[..1], DType::F32, &device))?;
            check::tensor(OP, "col", col, (&shape[1..], DType::F32, &device))?;
        }
        Averages::Whole(v) => check::tensor(OP, "v", v, (shape, DType::F32, &device))?,
    }
    device.backend().adafactor(spec, buffers, state.tensor())
}
