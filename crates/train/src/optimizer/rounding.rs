//! Steps of parameters in bf16 without a copy in a longer type: taken in f32, and rounded back at random.

use unsloth_autograd::Parameter;
use unsloth_core::{
    Category, DType, Device, Result,
    ops::{
        adamw::StepState,
        elementwise,
        stochastic_rounding::{Spec, round},
    },
    rng::Philox,
};

use super::{Change, Rule, Slot};

/// Streams of other purposes have other ids: "rnd0" in ASCII.
const STREAM: u32 = 0x726e_6430;

/// Which random numbers a step draws.
pub(super) fn spec(seed: u64, step: u32, tensor: usize) -> Spec {
    Spec { stream: Philox::new(seed, STREAM), step, tensor: tensor as u32 }
}

/// A step of one parameter. One that is skipped changes nothing: what bf16 holds stays as it is.
pub(super) fn step(
    rule: &dyn Rule,
    Change { slot, grad, rate }: Change<'_>,
    state: &StepState,
    spec: &Spec,
) -> Result<()> {
    let wide = elementwise::cast(&slot.parameter.value(), DType::F32)?;
    wide.retag(Category::Workspace);
    let parameter = Parameter::new(slot.parameter.name(), wide);
    let mut in_f32 = Slot { parameter, role: slot.role, parts: std::mem::take(&mut slot.parts), parked: Vec::new() };
    let stepped = rule.step(&mut in_f32, grad, (rate, state));
    slot.parts = in_f32.parts;
    stepped?;
    slot.parameter.update(|value| round(spec, &in_f32.parameter.value(), value))
}

/// Whether a device can round so, by rounding nothing.
///
/// # Errors
/// [`unsloth_core::Error::Unsupported`].
pub(super) fn check_device(device: &Device) -> Result<()> {
    let nothing = |dtype| device.zeros([0], dtype, Category::Workspace);
    round(&spec(0, 0, 0), &nothing(DType::F32)?, &mut nothing(DType::BF16)?)
}
