//! What [`unsloth_core::ops::sgd`] has to show on a device.

use unsloth_core::{
    DType, Device, Result, Tensor,
    ops::{
        adamw::StepState,
        sgd::{self, Buffers, Spec},
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

const SPEC: Spec = Spec { learning_rate: 0.03, momentum: 0.9, nesterov: false, weight_decay: 0.1 };
const RULES: [Spec; 3] = [
    SPEC,
    Spec { learning_rate: 0.5, momentum: 0.5, nesterov: true, weight_decay: 0.0 },
    Spec { learning_rate: 0.1, momentum: 0.0, nesterov: false, weight_decay: 0.5 },
];

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    update::check(device, &RULES)?;
    let case = Case::new(device, Spec::OP, "rejects_fields");
    rejects_fields(device, &case).map_err(|failure| failure.within(&case))
}

impl Rule for Spec {
    const OP: &'static str = "sgd";

    fn state(&self) -> &'static [&'static str] {
        if self.momentum > 0.0 { &["buf"] } else { &[] }
    }

    fn step(&self, param: &mut Tensor, grad: &Tensor, state: &mut [Tensor], step: &StepState) -> Result<()> {
        sgd::step(self, Buffers { param, grad, buf: state.first_mut() }, step)
    }

    fn reference<A: Arith>(
        &self,
        arith: &A,
        param: (&mut [f64], DType),
        grad: (&[f64], &State),
        state: &mut [Vec<f64>],
    ) {
        oracle::sgd::step(arith, self, param, grad, state.first_mut().map(Vec::as_mut_slice));
    }
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
        refuse("momentum", Spec { momentum: bad, ..SPEC })?;
    }
    // A buffer where none is used, and none where one is.
    refuse("momentum", Spec { momentum: 0.0, ..SPEC })?;
    let none = SPEC.step(&mut param, &grad, &mut [], &step);
    expect::rejects(case, Rejects::Spec("momentum"), none)
}
