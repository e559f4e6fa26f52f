//! Gradient descent with momentum.

use unsloth_core::{
    DType, Device, Tensor,
    ops::{
        adamw::StepState,
        sgd::{Buffers, Spec, step},
    },
};

use super::{Form, Role, Rule, Slot};
use crate::{Result, error::invalid};

/// Hyper-parameters of stochastic gradient descent, as `torch.optim.SGD` without dampening.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdConfig {
    /// Share of the sum of past gradients that is kept, in `[0, 1)`; 0.9. Without, nothing is kept of a parameter.
    pub momentum: f32,
    /// Whether a step looks ahead by one momentum, which must be above 0 then.
    pub nesterov: bool,
    /// Decay of matrices that is added to the gradient, 0 or more; 0.01.
    pub weight_decay: f32,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self { momentum: 0.9, nesterov: false, weight_decay: 0.01 }
    }
}

impl SgdConfig {
    /// # Errors
    /// [`crate::Error::InvalidConfig`] for a field out of its range.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.momentum) {
            return invalid("momentum", self.momentum, "in [0, 1)");
        }
        if self.nesterov && self.momentum == 0.0 {
            return invalid("momentum", self.momentum, "above 0 with nesterov");
        }
        super::config::check_decay(self.weight_decay)
    }
}

impl Rule for SgdConfig {
    fn parts(&self, value: &Tensor, _role: Role) -> Vec<Form> {
        if self.momentum > 0.0 { vec![("momentum", *value.shape(), DType::F32)] } else { Vec::new() }
    }

    fn step(&self, slot: &mut Slot, grad: &Tensor, (rate, state): (f32, &StepState)) -> unsloth_core::Result<()> {
        let &Self { momentum, nesterov, weight_decay } = self;
        let spec = Spec { learning_rate: rate, momentum, nesterov, weight_decay: slot.weight_decay(weight_decay) };
        let buf = slot.parts.first_mut().map(|part| &mut part.tensor);
        slot.parameter.update(|param| step(&spec, Buffers { param, grad, buf }, state))
    }

    fn check_device(&self, _device: &Device) -> unsloth_core::Result<()> {
        Ok(())
    }
}
