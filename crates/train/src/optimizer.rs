//! AdamW over all parameters of a run.

use unsloth_autograd::{GradStore, Parameter};
use unsloth_core::{
    Category, DType, Device, Tensor,
    ops::{
        adamw::{self, Buffers, ControlSpec, Spec, StepState},
        reduce,
    },
};

use crate::{ParameterState, Result, Unscaled, error::invalid};

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
        for (field, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return invalid(field, value, "in [0, 1)");
            }
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return invalid("eps", self.eps, "positive and finite");
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return invalid("weight_decay", self.weight_decay, "0 or more and finite");
        }
        Ok(())
    }
}

struct Slot {
    parameter: Parameter,
    decays: bool,
    m: Tensor,
    v: Tensor,
}

/// AdamW with f32 moments. Norm, clip factor, skip decision and step count stay on the device in a [`StepState`].
pub struct AdamW {
    config: AdamWConfig,
    /// In the order of `ParameterId`.
    slots: Vec<Slot>,
    state: StepState,
}

impl AdamW {
    /// Zero moments for every parameter. A parameter listed twice counts once.
    ///
    /// # Errors
    /// As [`AdamWConfig::validate`]; [`unsloth_core::Error::OutOfMemory`].
    pub fn new(device: &Device, parameters: &[Parameter], config: AdamWConfig) -> Result<Self> {
        config.validate()?;
        let mut parameters = parameters.to_vec();
        parameters.sort_by_key(Parameter::id);
        parameters.dedup_by_key(|parameter| parameter.id());
        let slot = |parameter: Parameter| -> Result<Slot> {
            let shape = *parameter.value().shape();
            let moment = || device.zeros(shape, DType::F32, Category::Optimiser);
            Ok(Slot { m: moment()?, v: moment()?, decays: shape.len() > 1, parameter })
        };
        let slots = parameters.into_iter().map(slot).collect::<Result<Vec<_>>>()?;
        Ok(Self { config, slots, state: StepState::new(device, 0)? })
    }

    /// The parameters, in the order of their ids.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.slots.iter().map(|slot| &slot.parameter)
    }

    /// First and second moment of a parameter, f32 of its shape.
    pub fn moments(&self, parameter: &Parameter) -> Option<(&Tensor, &Tensor)> {
        let index = self.slots.binary_search_by_key(&parameter.id(), |slot| slot.parameter.id()).ok()?;
        Some((&self.slots[index].m, &self.slots[index].v))
    }

    /// Scalars of the latest step.
    pub fn state(&self) -> &StepState {
        &self.state
    }

    /// Every parameter with its two moments.
    pub(crate) fn slots(&self) -> impl Iterator<Item = (&Parameter, &Tensor, &Tensor)> {
        self.slots.iter().map(|slot| (&slot.parameter, &slot.m, &slot.v))
    }

    /// Sets value and moments of a parameter that is among [`AdamW::parameters`].
    pub(crate) fn restore(&mut self, parameter: &Parameter, state: ParameterState) -> Result<()> {
        if let Ok(index) = self.slots.binary_search_by_key(&parameter.id(), |slot| slot.parameter.id()) {
            let slot = &mut self.slots[index];
            parameter.update(|value| replace("value", value, state.value))?;
            replace("m", &mut slot.m, state.m)?;
            replace("v", &mut slot.v, state.v)?;
        }
        Ok(())
    }

    /// Counts from this many completed steps on.
    pub(crate) fn set_num_steps(&mut self, device: &Device, num_steps: u32) -> Result<()> {
        self.state = StepState::new(device, num_steps)?;
        Ok(())
    }

    /// Decides on the device about the next [`AdamW::step`]: the factor that unscales gradients and clips them to
    /// `max_grad_norm`, and whether to skip because `norm`, that of the gradients as they are, or anything of `checked` is not
    /// finite. A loss scaler has checked that already; without one, once a step is skipped, all later ones are.
    ///
    /// # Errors
    /// Device mismatch; a `max_grad_norm` that is not positive; [`unsloth_core::Error::OutOfMemory`].
    pub fn control(
        &mut self,
        unscaled: Unscaled,
        (norm, checked): (&Tensor, &[&Tensor]),
        max_grad_norm: Option<f32>,
    ) -> unsloth_core::Result<()> {
        let Unscaled { loss_scale, finite } = unscaled;
        let sticky = finite.is_none();
        let finite = finite.map_or_else(|| reduce::all_finite(checked), Ok)?;
        adamw::control(&ControlSpec { max_grad_norm, loss_scale, sticky }, norm, &finite, &mut self.state)
    }

    /// Changes every parameter by its gradient as [`AdamW::control`] decided, or none if the step is skipped.
    ///
    /// # Errors
    /// A learning rate out of its range; a parameter without a gradient buffer; [`unsloth_core::Error::Shared`] if someone
    /// holds on to a parameter's value.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f32) -> unsloth_core::Result<()> {
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.config;
        for Slot { parameter, decays, m, v } in &mut self.slots {
            let weight_decay = if *decays { weight_decay } else { 0.0 };
            let spec = Spec { learning_rate, beta1, beta2, eps, weight_decay };
            let Some(grad) = gradients.get(parameter) else {
                return Err(unsloth_core::Error::InvalidSpec {
                    op: "adamw",
                    field: "gradients",
                    value: parameter.name().to_owned(),
                    rule: "a store that has a gradient for every parameter",
                });
            };
            let state = &self.state;
            parameter.update(|param| adamw::step(&spec, Buffers { param, grad, m, v }, state))?;
        }
        Ok(())
    }
}

/// Puts `new` in the place of `current`, and into its memory category.
fn replace(arg: &'static str, current: &mut Tensor, new: Tensor) -> unsloth_core::Result<()> {
    use unsloth_core::Error;
    let op = "restore";
    if new.shape() != current.shape() {
        return Err(Error::Shape { op, arg, expected: current.shape().to_string(), actual: *new.shape() });
    }
    if new.dtype() != current.dtype() {
        return Err(Error::DType { op, arg, expected: current.dtype().to_string(), actual: new.dtype() });
    }
    if new.device() != current.device() {
        return Err(Error::Device { op, arg, expected: current.device().name(), actual: new.device().name() });
    }
    new.retag(current.buffer().category());
    *current = new;
    Ok(())
}
