//! AdamW, with moments in f32 or in 8 bits.

use unsloth_autograd::Parameter;
use unsloth_core::{
    DType, Device, Tensor,
    ops::{
        adamw::{Buffers, Spec, StepState, step},
        adamw8bit,
    },
};

use super::{Change, Form, Part, Role, Rule, Slot};
use crate::{Result, error::invalid};

/// Parameters with fewer elements than this keep their moments in f32: they need little, and few blocks tell small from large
/// badly. That of bitsandbytes.
pub const MIN_8BIT_SIZE: usize = 4096;

/// Hyper-parameters of AdamW; defaults are those of PyTorch.        Loshchilov & Hutter 2017, arXiv:1711.05101
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment, in `[0, 1)`; 0.9.
    pub beta1: f32,
    /// Decay of the second moment, in `[0, 1)`; 0.999.
    pub beta2: f32,
    /// Added to the root of the second moment, positive; 1e-8.
    pub eps: f32,
    /// Decoupled decay of matrices, 0 or more; 0.01. Parameters of one dimension, which are norms and biases, do not decay,
    /// as in transformers' `Trainer`.
    pub weight_decay: f32,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

impl AdamWConfig {
    /// # Errors
    /// [`crate::Error::InvalidConfig`] for a field out of its range.
    pub fn validate(&self) -> Result<()> {
        super::config::check_betas(self.beta1, self.beta2)?;
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return invalid("eps", self.eps, "positive and finite");
        }
        super::config::check_decay(self.weight_decay)
    }

    fn spec(&self, slot: &Slot, learning_rate: f32) -> Spec {
        let &Self { beta1, beta2, eps, weight_decay } = self;
        Spec { learning_rate, beta1, beta2, eps, weight_decay: slot.weight_decay(weight_decay) }
    }
}

impl Rule for AdamWConfig {
    fn parts(&self, value: &Tensor, _role: Role) -> Vec<Form> {
        ["m", "v"].map(|name| (name, *value.shape(), DType::F32)).into()
    }

    fn step(&self, slot: &mut Slot, grad: &Tensor, (rate, state): (f32, &StepState)) -> unsloth_core::Result<()> {
        self.step_all(vec![Change { slot, grad, rate }], state)
    }

    /// Together, what has one decay and one rate.
    fn step_all(&self, changes: Vec<Change<'_>>, state: &StepState) -> unsloth_core::Result<()> {
        let mut others = changes.into_iter();
        while let Some(first) = others.next() {
            let spec = self.spec(first.slot, first.rate);
            let (mut alike, rest): (Vec<_>, Vec<_>) =
                others.partition(|other| self.spec(other.slot, other.rate) == spec);
            alike.push(first);
            step_alike(&spec, alike, state)?;
            others = rest.into_iter();
        }
        Ok(())
    }

    fn check_device(&self, _device: &Device) -> unsloth_core::Result<()> {
        Ok(())
    }
}

fn step_alike(spec: &Spec, changes: Vec<Change<'_>>, state: &StepState) -> unsloth_core::Result<()> {
    let split = |Change { slot, grad, .. }| {
        let Slot { parameter, parts, .. } = slot;
        let [Part { tensor: m, .. }, Part { tensor: v, .. }] = parts.as_mut_slice() else {
            unreachable!("AdamW keeps two moments");
        };
        (&*parameter, (grad, m, v))
    };
    let (parameters, moments): (Vec<_>, Vec<_>) = changes.into_iter().map(split).unzip();
    Parameter::update_all(parameters, |values| {
        let buffers = |(param, (grad, m, v))| Buffers { param, grad, m, v };
        let mut all: Vec<_> = values.into_iter().zip(moments).map(buffers).collect();
        step(spec, &mut all, state)
    })
}

/// AdamW whose moments are kept in 8 bits where that pays.            Dettmers et al. 2021, arXiv:2110.02861
pub(super) struct EightBit<'a>(pub(super) &'a AdamWConfig);

impl Rule for EightBit<'_> {
    fn parts(&self, value: &Tensor, role: Role) -> Vec<Form> {
        let len = value.num_elements();
        if len < MIN_8BIT_SIZE {
            return self.0.parts(value, role);
        }
        let (num_codes, blocks) = adamw8bit::lengths(len);
        let codes = |name| (name, [num_codes].into(), DType::I32);
        let absmax = |name| (name, [blocks].into(), DType::F32);
        vec![codes("m_codes"), absmax("m_absmax"), codes("v_codes"), absmax("v_absmax")]
    }

    fn step(&self, slot: &mut Slot, grad: &Tensor, (rate, state): (f32, &StepState)) -> unsloth_core::Result<()> {
        let spec = self.0.spec(slot, rate);
        let [m_codes, m_absmax, v_codes, v_absmax] = slot.parts.as_mut_slice() else {
            return self.0.step(slot, grad, (rate, state));
        };
        slot.parameter.update(|param| {
            let (m_codes, m_absmax) = (&mut m_codes.tensor, &mut m_absmax.tensor);
            let (v_codes, v_absmax) = (&mut v_codes.tensor, &mut v_absmax.tensor);
            let buffers = adamw8bit::Buffers { param, grad, m_codes, m_absmax, v_codes, v_absmax };
            adamw8bit::step(&spec, buffers, state)
        })
    }

    /// Together, what has moments in f32.
    fn step_all(&self, changes: Vec<Change<'_>>, state: &StepState) -> unsloth_core::Result<()> {
        let (in_f32, in_codes): (Vec<_>, Vec<_>) = changes.into_iter().partition(|change| change.slot.parts.len() == 2);
        self.0.step_all(in_f32, state)?;
        in_codes.into_iter().try_for_each(|Change { slot, grad, rate }| self.step(slot, grad, (rate, state)))
    }

    /// By a step of a parameter without elements.
    fn check_device(&self, device: &Device) -> unsloth_core::Result<()> {
        use unsloth_core::Category::Workspace;
        let nothing = |dtype| device.zeros([0], dtype, Workspace);
        let buffers = adamw8bit::Buffers {
            param: &mut nothing(DType::F32)?,
            grad: &nothing(DType::F32)?,
            m_codes: &mut nothing(DType::I32)?,
            m_absmax: &mut nothing(DType::F32)?,
            v_codes: &mut nothing(DType::I32)?,
            v_absmax: &mut nothing(DType::F32)?,
        };
        let AdamWConfig { beta1, beta2, eps, weight_decay } = *self.0;
        let spec = Spec { learning_rate: 0.0, beta1, beta2, eps, weight_decay };
        adamw8bit::step(&spec, buffers, &StepState::new(device, 1)?)
    }
}
