//! What [`unsloth_core::ops::lion`] has to show on a device.

use unsloth_core::{
    DType, Device, Result, Tensor,
    ops::{
        adamw::StepState,
        lion::{self, Buffers, Spec},
    },
};

use super::update::{self, OnDevice, Rule};
use crate::{
    arith::Arith,
    data,
    expect::{self, Rejects},
    oracle::{self, adamw::State},
    report::{self, Case, Checked},
};

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(Spec::OP, device, check(device));
}

const SPEC: Spec = Spec { learning_rate: 0.03, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
const RULES: [Spec; 2] = [SPEC, Spec { learning_rate: 0.5, beta1: 0.5, beta2: 0.25, weight_decay: 0.0 }];

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    update::check(device, &RULES)?;
    for (name, hazard) in [
        ("a_direction_of_zero_does_not_move", a_direction_of_zero_does_not_move as fn(&Device, &Case) -> Checked),
        ("rejects_fields", rejects_fields),
    ] {
        let case = Case::new(device, Spec::OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

impl Rule for Spec {
    const OP: &'static str = "lion";

    fn state(&self) -> &'static [&'static str] {
        &["m"]
    }

    fn step(&self, param: &mut Tensor, grad: &Tensor, state: &mut [Tensor], step: &StepState) -> Result<()> {
        lion::step(self, Buffers { param, grad, m: &mut state[0] }, step)
    }

    fn reference<A: Arith>(
        &self,
        arith: &A,
        param: (&mut [f64], DType),
        grad: (&[f64], &State),
        state: &mut [Vec<f64>],
    ) {
        oracle::lion::step(arith, self, param, grad, &mut state[0]);
    }
}

/// What has no gradient and no momentum, such as the row of a table that no token reads, only decays.
fn a_direction_of_zero_does_not_move(device: &Device, case: &Case) -> Checked {
    let step = update::control(device, 1.0, true)?;
    let spec = Spec { weight_decay: 0.0, ..SPEC };
    let OnDevice { mut param, mut state } = OnDevice::new(device, &spec, &[1.0, -2.0], DType::F32)?;
    let grad = data::tensor(device, &[0.0, -0.0], [2], DType::F32)?;
    spec.step(&mut param, &grad, &mut state, &step)?;
    let after = data::read(&param)?;
    expect::holds(case, &format!("[1, -2] became {after:?}"), after == [1.0, -2.0])
}

fn rejects_fields(device: &Device, case: &Case) -> Checked {
    let step = update::control(device, 1.0, true)?;
    let grad = data::tensor(device, &[1.0; 3], [3], DType::F32)?;
    let OnDevice { mut param, mut state } = OnDevice::new(device, &SPEC, &[1.0; 3], DType::F32)?;
    let mut refuse = |field, spec: Spec| {
        expect::rejects(case, Rejects::Spec(field), spec.step(&mut param, &grad, &mut state, &step))
    };
    for bad in [-1e-3, f32::NAN, f32::INFINITY] {
        refuse("learning_rate", Spec { learning_rate: bad, ..SPEC })?;
        refuse("weight_decay", Spec { weight_decay: bad, ..SPEC })?;
    }
    for bad in [-0.1, 1.0, f32::NAN] {
        refuse("beta1", Spec { beta1: bad, ..SPEC })?;
        refuse("beta2", Spec { beta2: bad, ..SPEC })?;
    }
    Ok(())
}
