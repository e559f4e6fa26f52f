//! Optimisers over all parameters of a run.
//!
//! A rule of change is one operator of `unsloth_core::ops`, or several by the shape of a parameter. What it keeps of a parameter
//! from step to step are tensors with names, its parts: with the number of steps they are all that a run needs to go on.

mod adafactor;
mod adamw;
mod config;
mod lion;
mod muon;
mod paging;
mod rounding;
mod sgd;

use std::rc::Rc;

use unsloth_autograd::{GradStore, Parameter};
use unsloth_core::{
    Category, DType, Device, Error, Shape, Tensor,
    ops::{
        adamw::{ControlSpec, StepState, control},
        reduce,
    },
};

pub(crate) use self::paging::Parked;
pub use self::{
    adafactor::AdafactorConfig,
    adamw::{AdamWConfig, MIN_8BIT_SIZE},
    config::{OptimizerConfig, OptimizerKind},
    lion::LionConfig,
    muon::{AdjustLr, MuonConfig},
    paging::Paging,
    sgd::SgdConfig,
};
use crate::{Result, StateTensor, Unscaled, trainer::Contents};

/// What of a model a parameter belongs to, as far as it has a learning rate of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Everything that is nothing else.
    #[default]
    Weight,
    /// The embedding table and the head.
    Embedding,
    /// `B` of an adapter, and the vectors that are trained with adapters, as PEFT groups them for LoRA+.
    LoraB,
}

/// Learning rates of a step, by [`Role`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Of [`Role::Weight`].
    pub weight: f32,
    /// Of [`Role::Embedding`].
    pub embedding: f32,
    /// Of [`Role::LoraB`].
    pub lora_b: f32,
}

impl Rates {
    /// One rate for everything.
    pub const fn same(rate: f32) -> Self {
        Self { weight: rate, embedding: rate, lora_b: rate }
    }

    fn of(self, role: Role) -> f32 {
        match role {
            Role::Weight => self.weight,
            Role::Embedding => self.embedding,
            Role::LoraB => self.lora_b,
        }
    }
}

/// What a rule keeps of a parameter.
struct Part {
    name: &'static str,
    tensor: Tensor,
}

/// A parameter and what is kept of it.
struct Slot {
    parameter: Parameter,
    role: Role,
    parts: Vec<Part>,
    /// The parts between steps, where they wait elsewhere.
    parked: Vec<Rc<Parked>>,
}

impl Slot {
    /// Parameters of one dimension, which are norms and biases, do not decay, as in transformers' `Trainer`.
    fn weight_decay(&self, weight_decay: f32) -> f32 {
        if self.parameter.value().shape().len() > 1 { weight_decay } else { 0.0 }
    }
}

/// Name, shape and type of a part.
type Form = (&'static str, Shape, DType);

/// What changes one parameter in a step.
struct Change<'a> {
    slot: &'a mut Slot,
    grad: &'a Tensor,
    rate: f32,
}

/// How parameters change. A rule keeps nothing itself.
trait Rule {
    /// The parts that it keeps of a parameter with this value, all zero before the first step.
    fn parts(&self, value: &Tensor, role: Role) -> Vec<Form>;
    /// Changes one parameter by its gradient.
    fn step(&self, slot: &mut Slot, grad: &Tensor, step: (f32, &StepState)) -> unsloth_core::Result<()>;
    /// Changes all parameters of a step, in their order unless the rule has a launch for several.
    fn step_all(&self, changes: Vec<Change<'_>>, state: &StepState) -> unsloth_core::Result<()> {
        changes.into_iter().try_for_each(|Change { slot, grad, rate }| self.step(slot, grad, (rate, state)))
    }
    /// Whether this device can take its steps.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    fn check_device(&self, device: &Device) -> unsloth_core::Result<()>;
}

/// An optimiser with what it keeps. Norm, clip factor, skip decision and step count stay on the device in a [`StepState`].
pub struct Optimizer {
    config: OptimizerConfig,
    /// In the order of `ParameterId`.
    slots: Vec<Slot>,
    state: StepState,
    /// Of the run, where parameters in bf16 are rounded at random.
    rounding: Option<u64>,
    /// Where parts wait between steps; `None`: on the device.
    paging: Option<Paging>,
}

impl Optimizer {
    /// An optimiser of these parameters before its first step, which keeps zeros of each. A parameter listed twice counts once.
    ///
    /// # Errors
    /// As [`OptimizerConfig::validate`]; [`Error::Unsupported`] on a device that cannot take its steps;
    /// [`Error::OutOfMemory`].
    pub fn new(device: &Device, parameters: &[(Parameter, Role)], config: OptimizerConfig) -> Result<Self> {
        Self::with_paging(device, parameters, config, None)
    }

    /// The same, where what is kept waits outside of the device's memory between steps if that is wanted: a step then brings what is kept of
    /// some parameters at a time, and puts it back. It has the same bits.
    ///
    /// # Errors
    /// As [`Optimizer::new`]; as [`unsloth_core::TensorStore::put`].
    pub fn with_paging(
        device: &Device,
        parameters: &[(Parameter, Role)],
        config: OptimizerConfig,
        paging: Option<Paging>,
    ) -> Result<Self> {
        config.validate()?;
        let rule = config.rule();
        rule.check_device(device)?;
        let mut parameters = parameters.to_vec();
        parameters.sort_by_key(|(parameter, _)| parameter.id());
        parameters.dedup_by_key(|(parameter, _)| parameter.id());
        let slot = |(parameter, role): (Parameter, Role)| -> Result<Slot> {
            let part = |(name, shape, dtype): Form| -> Result<Part> {
                Ok(Part { name, tensor: device.zeros(shape, dtype, Category::Optimiser)? })
            };
            let forms = rule.parts(&parameter.value(), role);
            let parts = forms.into_iter().map(part).collect::<Result<_>>()?;
            let mut slot = Slot { parameter, role, parts, parked: Vec::new() };
            if let Some(Paging { store, .. }) = &paging {
                slot.park(store)?;
            }
            Ok(slot)
        };
        let slots = parameters.into_iter().map(slot).collect::<Result<Vec<_>>>()?;
        paging.iter().try_for_each(Paging::settle)?;
        drop(rule);
        Ok(Self { config, slots, state: StepState::new(device, 0)?, rounding: None, paging })
    }

    /// From now on parameters in bf16 are changed in f32 and rounded up or down at random, by this seed; to nearest, without.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a device that cannot; [`Error::OutOfMemory`].
    pub fn round_stochastically(&mut self, seed: u64) -> unsloth_core::Result<()> {
        rounding::check_device(self.state.tensor().device())?;
        self.rounding = Some(seed);
        Ok(())
    }

    /// The parameters, in the order of their ids.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.slots.iter().map(|slot| &slot.parameter)
    }

    /// Where what is kept waits between steps; `None`: on the device.
    pub fn paging(&self) -> Option<&Paging> {
        self.paging.as_ref()
    }

    /// What is kept of a parameter on the device under this name, such as `m`.
    pub fn part(&self, parameter: &Parameter, name: &str) -> Option<&Tensor> {
        let index = self.slots.binary_search_by_key(&parameter.id(), |slot| slot.parameter.id()).ok()?;
        self.slots[index].parts.iter().find(|part| part.name == name).map(|part| &part.tensor)
    }

    /// Scalars of the latest step.
    pub fn state(&self) -> &StepState {
        &self.state
    }

    /// Value and parts of every parameter, with their names; the value is [`crate::PARAMETER`].
    pub(crate) fn tensors(&self) -> Vec<StateTensor> {
        let tensors = |slot: &Slot| {
            let value = (crate::PARAMETER, Contents::Here(slot.parameter.value()));
            let parts = slot.parts.iter().map(|part| (part.name, Contents::Here(part.tensor.clone())));
            let parts = parts.chain(slot.parked.iter().map(|parked| (parked.name, Contents::Away(parked.clone()))));
            let named = |(part, contents)| StateTensor { parameter: slot.parameter.clone(), part, contents };
            std::iter::once(value).chain(parts).map(named).collect::<Vec<_>>()
        };
        self.slots.iter().flat_map(tensors).collect()
    }

    /// Sets the value and every part of each parameter to what `tensor_of` returns; the value has the name
    /// [`crate::PARAMETER`].
    pub(crate) fn restore<E: From<crate::Error>>(
        &mut self,
        mut tensor_of: impl FnMut(&Parameter, &'static str, (Shape, DType)) -> Result<Tensor, E>,
    ) -> Result<(), E> {
        for slot in &mut self.slots {
            slot.bring().map_err(crate::Error::from)?;
            let Slot { parameter, parts, .. } = slot;
            set_value(parameter, |form| tensor_of(parameter, crate::PARAMETER, form))?;
            for Part { name, tensor } in parts {
                let new = tensor_of(parameter, name, (*tensor.shape(), tensor.dtype()))?;
                replace(name, tensor, new).map_err(crate::Error::from)?;
            }
            if let Some(Paging { store, .. }) = &self.paging {
                slot.park(store).map_err(crate::Error::from)?;
            }
        }
        Ok(self.paging.iter().try_for_each(Paging::settle).map_err(crate::Error::from)?)
    }

    /// Counts from this many completed steps on.
    pub(crate) fn set_num_steps(&mut self, device: &Device, num_steps: u32) -> Result<()> {
        self.state = StepState::new(device, num_steps)?;
        Ok(())
    }

    /// Decides on the device about the next [`Optimizer::step`]: the factor that unscales gradients and clips them to
    /// `max_grad_norm`, and whether to skip because `norm`, that of the gradients as they are, or anything of `checked` is not
    /// finite. A loss scaler has checked that already; without one, once a step is skipped, all later ones are.
    ///
    /// # Errors
    /// Device mismatch; a `max_grad_norm` that is not positive; [`Error::OutOfMemory`].
    pub fn control(
        &mut self,
        unscaled: Unscaled,
        (norm, checked): (&Tensor, &[&Tensor]),
        max_grad_norm: Option<f32>,
    ) -> unsloth_core::Result<()> {
        let Unscaled { loss_scale, finite } = unscaled;
        let sticky = finite.is_none();
        let finite = finite.map_or_else(|| reduce::all_finite(checked), Ok)?;
        control(&ControlSpec { max_grad_norm, loss_scale, sticky }, norm, &finite, &mut self.state)
    }

    /// Changes every parameter by its gradient as [`Optimizer::control`] decided, or none if the step is skipped. `index` is the number of
    /// the step, from 0, which what is rounded at random depends on.
    ///
    /// # Errors
    /// A learning rate out of its range; a parameter without a gradient buffer; [`Error::Shared`] if someone
    /// holds on to a parameter's value.
    pub fn step(&mut self, gradients: &GradStore, rates: Rates, index: u32) -> unsloth_core::Result<()> {
        let Self { config, slots, state, rounding, paging } = self;
        let step =
            Step { rule: &*config.rule(), gradients, rates, state, rounding: rounding.map(|seed| (seed, index)) };
        let Some(paging) = paging else { return step.take(slots, 0) };
        let mut first = 0;
        for group in paging::groups(slots, paging.group_bytes) {
            group.iter_mut().try_for_each(Slot::bring)?;
            step.take(group, first)?;
            group.iter_mut().try_for_each(|slot| slot.park(&paging.store))?;
            first += group.len();
        }
        paging.settle()
    }
}

/// What is the same for every parameter of a step.
struct Step<'a> {
    rule: &'a dyn Rule,
    gradients: &'a GradStore,
    rates: Rates,
    state: &'a StepState,
    /// The seed and the number of the step, where parameters in bf16 are rounded at random.
    rounding: Option<(u64, u32)>,
}

impl Step<'_> {
    /// Changes the parameters of slots that begin with number `first`.
    fn take(&self, slots: &mut [Slot], first: usize) -> unsloth_core::Result<()> {
        let &Self { rule, gradients, rates, state, rounding } = self;
        let mut changes = Vec::with_capacity(slots.len());
        for (i, slot) in slots.iter_mut().enumerate() {
            let Some(grad) = gradients.get(&slot.parameter) else {
                return Err(Error::InvalidSpec {
                    op: "optimizer",
                    field: "gradients",
                    value: slot.parameter.name().to_owned(),
                    rule: "a store that has a gradient for every parameter",
                });
            };
            let rate = rates.of(slot.role);
            let change = Change { slot, grad, rate };
            match rounding.filter(|_| change.slot.parameter.value().dtype() == DType::BF16) {
                Some((seed, index)) => rounding::step(rule, change, state, &rounding::spec(seed, index, first + i))?,
                None => changes.push(change),
            }
        }
        rule.step_all(changes, state)
    }
}

/// Sets the value of a parameter to what `tensor_of` returns for its shape and type, in the memory category that it has.
///
/// # Errors
/// Those of `tensor_of`; a tensor of another shape, type or device.
pub fn set_value<E: From<crate::Error>>(
    parameter: &Parameter,
    tensor_of: impl FnOnce((Shape, DType)) -> Result<Tensor, E>,
) -> Result<(), E> {
    let value = parameter.value();
    let form = (*value.shape(), value.dtype());
    // Freed as soon as the new one takes its place.
    drop(value);
    let new = tensor_of(form)?;
    Ok(parameter.update(|value| replace(crate::PARAMETER, value, new)).map_err(crate::Error::from)?)
}

/// Puts `new` in the place of `current`, and into its memory category.
fn replace(arg: &'static str, current: &mut Tensor, new: Tensor) -> unsloth_core::Result<()> {
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
