//! Lion.

use unsloth_core::{
    DType, Device, Tensor,
    ops::{
        adamw::StepState,
        lion::{Buffers, Spec, step},
    },
};

use super::{Form, Role, Rule, Slot};
use crate::Result;

/// Hyper-parameters of Lion; betas are those of the paper.            Chen et al. 2023, arXiv:2302.06675
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LionConfig {
    /// Weight of the momentum in the direction of a step, in `[0, 1)`; 0.9.
    pub beta1: f32,
    /// Decay of the momentum, in `[0, 1)`; 0.99.
    pub beta2: f32,
    /// Decoupled decay of matrices, 0 or more; 0.01.
    pub weight_decay: f32,
}

impl Default for LionConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99, weight_decay: 0.01 }
    }
}

impl LionConfig {
    /// # Errors
    /// [`crate::Error::InvalidConfig`] for a field out of its range.
    pub fn validate(&self) -> Result<()> {
        super::config::check_betas(self.beta1, self.beta2)?;
        super::config::check_decay(self.weight_decay)
    }
}

impl Rule for LionConfig {
    fn parts(&self, value: &Tensor, _role: Role) -> Vec<Form> {
        vec![("m", *value.shape(), DType::F32)]
    }

    fn step(&self, slot: &mut Slot, grad: &Tensor, (rate, state): (f32, &StepState)) -> unsloth_core::Result<()> {
        let &Self { beta1, beta2, weight_decay } = self;
        let spec = Spec { learning_rate: rate, beta1, beta2, weight_decay: slot.weight_decay(weight_decay) };
        let m = &mut slot.parts[0].tensor;
        slot.parameter.update(|param| step(&spec, Buffers { param, grad, m }, state))
    }

    fn check_device(&self, _device: &Device) -> unsloth_core::Result<()> {
        Ok(())
    }
}
