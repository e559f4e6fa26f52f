//! Adafactor.

use unsloth_core::{
    Category, DType, Device, Tensor,
    ops::{
        adafactor::{Averages, Buffers, Spec, step},
        adamw::StepState,
    },
};

use super::{Form, Part, Role, Rule, Slot};
use crate::Result;

/// Least root mean square of a parameter that a rate is relative to.
const MIN_SCALE: f32 = 1e-3;

/// Hyper-parameters of Adafactor with a learning rate of the schedule: averages that grow longer with the step, changes scaled down to a mean
/// square of 1, no first moment.                                       Shazeer & Stern 2018, arXiv:1804.04235
///
/// By default as transformers' `Trainer` uses its `Adafactor`, without `scale_parameter` and `relative_step`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdafactorConfig {
    /// Whether the rate of a parameter is relative to its root mean square, at least 0.001, as in `torch.optim.Adafactor`; not.
    pub scale_parameter: bool,
    /// Decoupled decay of matrices, 0 or more; 0.01.
    pub weight_decay: f32,
}

impl Default for AdafactorConfig {
    fn default() -> Self {
        Self { scale_parameter: false, weight_decay: 0.01 }
    }
}

impl AdafactorConfig {
    /// # Errors
    /// [`crate::Error::InvalidConfig`] for a field out of its range.
    pub fn validate(&self) -> Result<()> {
        super::config::check_decay(self.weight_decay)
    }

    fn spec(&self, learning_rate: f32, weight_decay: f32) -> Spec {
        let parameter_scale = self.scale_parameter.then_some(MIN_SCALE);
        Spec { learning_rate, decay_rate: -0.8, eps: 1e-30, clip_threshold: 1.0, parameter_scale, weight_decay }
    }
}

impl Rule for AdafactorConfig {
    fn parts(&self, value: &Tensor, _role: Role) -> Vec<Form> {
        match **value.shape() {
            [rows, columns] => vec![("row", [rows].into(), DType::F32), ("col", [columns].into(), DType::F32)],
            _ => vec![("v", *value.shape(), DType::F32)],
        }
    }

    fn step(&self, slot: &mut Slot, grad: &Tensor, (rate, state): (f32, &StepState)) -> unsloth_core::Result<()> {
        let spec = self.spec(rate, slot.weight_decay(self.weight_decay));
        let averages = match slot.parts.as_mut_slice() {
            [Part { tensor: row, .. }, Part { tensor: col, .. }] => Averages::Factored { row, col },
            [Part { tensor: v, .. }] => Averages::Whole(v),
            _ => unreachable!("Adafactor keeps one average or two"),
        };
        slot.parameter.update(|param| step(&spec, Buffers { param, grad, averages }, state))
    }

    /// By a step of a parameter without elements.
    fn check_device(&self, device: &Device) -> unsloth_core::Result<()> {
        let nothing = || device.zeros([0], DType::F32, Category::Workspace);
        let (mut param, grad, mut v) = (nothing()?, nothing()?, nothing()?);
        let buffers = Buffers { param: &mut param, grad: &grad, averages: Averages::Whole(&mut v) };
        step(&self.spec(0.0, 0.0), buffers, &StepState::new(device, 1)?)
    }
}
