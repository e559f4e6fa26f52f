//! What [`unsloth_core::ops::muon`] has to show on a device.

use unsloth_core::{
    Category, DType, Device, Result, Tensor,
    ops::{
        adamw::StepState,
        elementwise,
        muon::{self, Buffers, Spec},
    },
};

use super::{AWKWARD_ROWS, update};
use crate::{
    arith::{Arith, Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::{self, adamw::State},
    report::{self, Case, Checked},
};

const OP: &str = "muon";

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(OP, device, check(device));
}

const SPEC: Spec =
    Spec { learning_rate: 0.1, adjustment: 1.5, momentum: 0.95, nesterov: true, eps: 1e-7, weight_decay: 0.5 };
/// Norms of the last one are below its eps.
const SPECS: [Spec; 3] = [
    SPEC,
    Spec { momentum: 0.5, nesterov: false, weight_decay: 0.0, ..SPEC },
    Spec { eps: 1e3, learning_rate: 1.0, ..SPEC },
];

type Hazard = fn(&Device, &Case) -> Checked;

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    for shape in AWKWARD_ROWS {
        for dtype in device.float_dtypes() {
            for spec in SPECS {
                let case = Case::new(device, OP, format!("{shape:?}, {dtype}, {spec:?}"));
                three_steps(device, &case, &spec, (shape, dtype)).map_err(|failure| failure.within(&case))?;
            }
        }
    }
    let hazards: [(&str, Hazard); 3] =
        [("skips_a_bad_step", skips_a_bad_step), ("zero_gradients", zero_gradients), ("rejects", rejects)];
    for (name, hazard) in hazards {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

/// One matrix on a device.
struct OnDevice {
    param: Tensor,
    buf: Tensor,
}

fn matrix(device: &Device, values: &[f64], (rows, columns): (usize, usize), dtype: DType) -> Result<Tensor> {
    data::tensor(device, values, [rows, columns], dtype)
}

impl OnDevice {
    fn new(device: &Device, values: &[f64], (shape, dtype): ((usize, usize), DType)) -> Result<Self> {
        let buf = device.zeros([shape.0, shape.1], DType::F32, Category::Optimiser)?;
        Ok(Self { param: matrix(device, values, shape, dtype)?, buf })
    }

    fn step(&mut self, spec: &Spec, grad: &Tensor, state: &StepState) -> Result<()> {
        muon::step(spec, Buffers { param: &mut self.param, grad, buf: &mut self.buf }, state)
    }

    fn same_bits(&self, case: &Case, what: &str, other: &Self) -> Checked {
        expect::same_bits(case, &format!("param, {what}"), &self.param, &other.param)?;
        expect::same_bits(case, &format!("buf, {what}"), &self.buf, &other.buf)
    }

    fn copy(&self) -> Result<Self> {
        Ok(Self { param: elementwise::copy(&self.param)?, buf: elementwise::copy(&self.buf)? })
    }
}

/// Three steps against the formula, each from what the device holds, with gradients that are to be divided by four.
fn three_steps(device: &Device, case: &Case, spec: &Spec, (shape, dtype): ((usize, usize), DType)) -> Checked {
    let mut data = Data::new(98);
    let length = shape.0 * shape.1;
    let start = data.normal(length, 1.0, dtype);
    let mut actual = OnDevice::new(device, &start, (shape, dtype))?;
    let mut again = OnDevice::new(device, &start, (shape, dtype))?;
    let (step_state, scaled) = (update::control(device, 4.0, true)?, State { gradient_scale: 0.25, ..State::new(4) });
    for index in 0..3 {
        let grad = data.normal(length, 1.0, DType::F32);
        let exact = reference(&Exact, spec, (&actual, dtype), (&grad, &scaled), shape.1)?;
        let naive = reference(&Rounded(dtype), spec, (&actual, dtype), (&grad, &scaled), shape.1)?;
        let grad = matrix(device, &grad, shape, DType::F32)?;
        actual.step(spec, &grad, &step_state)?;
        again.step(spec, &grad, &step_state)?;
        let expected = Expected { exact: &exact.0, naive: &naive.0, floor: Floor::Stored(dtype) };
        check_tensor(case, &format!("param after step {}", index + 1), &actual.param, expected)?;
        let expected = Expected { exact: &exact.1, naive: &naive.1, floor: Floor::Stored(DType::F32) };
        check_tensor(case, &format!("buf after step {}", index + 1), &actual.buf, expected)?;
    }
    actual.same_bits(case, "deterministic", &again)
}

/// The parameter and the buffer behind a step.
fn reference<A: Arith>(
    arith: &A,
    spec: &Spec,
    (before, dtype): (&OnDevice, DType),
    grad: (&[f64], &State),
    columns: usize,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut param, mut buf) = (data::read(&before.param)?, data::read(&before.buf)?);
    oracle::muon::step(arith, spec, (&mut param, dtype), grad, (&mut buf, columns));
    Ok((param, buf))
}

/// A step to be skipped changes nothing, whatever the gradients hold.
fn skips_a_bad_step(device: &Device, case: &Case) -> Checked {
    for shape in [(2, 3), (3, 2)] {
        let mut parameter = OnDevice::new(device, &[1.0, -2.0, 3.0, 0.5, 0.25, 1.0], (shape, DType::F32))?;
        let (good, bad) =
            (matrix(device, &[1.0; 6], shape, DType::F32)?, matrix(device, &[f64::NAN; 6], shape, DType::F32)?);
        parameter.step(&SPEC, &good, &update::control(device, 1.0, true)?)?;
        let before = parameter.copy()?;
        parameter.step(&SPEC, &bad, &update::control(device, 1.0, false)?)?;
        parameter.same_bits(case, "skipped", &before)?;
    }
    Ok(())
}

/// A matrix that no gradient reaches decays, and is not divided by 0.
fn zero_gradients(device: &Device, case: &Case) -> Checked {
    let mut parameter = OnDevice::new(device, &[1.0, -2.0, 4.0, 0.5, 0.25, 1.0], ((2, 3), DType::F32))?;
    let spec = Spec { learning_rate: 0.5, weight_decay: 1.0, ..SPEC };
    parameter.step(&spec, &matrix(device, &[0.0; 6], (2, 3), DType::F32)?, &update::control(device, 1.0, true)?)?;
    let left = data::read(&parameter.param)?;
    expect::holds(case, &format!("{left:?} is left"), left == [0.5, -1.0, 2.0, 0.25, 0.125, 0.5])
}

fn rejects(device: &Device, case: &Case) -> Checked {
    let step = update::control(device, 1.0, true)?;
    let grad = matrix(device, &[1.0; 6], (2, 3), DType::F32)?;
    let fresh = || OnDevice::new(device, &[1.0; 6], ((2, 3), DType::F32));
    for (field, spec) in [
        ("learning_rate", Spec { learning_rate: -1.0, ..SPEC }),
        ("adjustment", Spec { adjustment: 0.0, ..SPEC }),
        ("momentum", Spec { momentum: 1.0, ..SPEC }),
        ("eps", Spec { eps: 0.0, ..SPEC }),
        ("weight_decay", Spec { weight_decay: f32::INFINITY, ..SPEC }),
    ] {
        expect::rejects(case, Rejects::Spec(field), fresh()?.step(&spec, &grad, &step))?;
    }
    let vector = data::tensor(device, &[1.0; 6], [6], DType::F32)?;
    expect::rejects(case, Rejects::Shape("grad"), fresh()?.step(&SPEC, &vector, &step))?;
    let zeros = |rows| device.zeros([rows, 3], DType::F32, Category::Optimiser);
    expect::rejects(case, Rejects::Shape("buf"), OnDevice { buf: zeros(3)?, ..fresh()? }.step(&SPEC, &grad, &step))?;
    expect::rejects(
        case,
        Rejects::Shape("param"),
        OnDevice { param: zeros(3)?, ..fresh()? }.step(&SPEC, &grad, &step),
    )?;
    let mut parameter = fresh()?;
    let shared = parameter.param.clone();
    expect::rejects(case, Rejects::Shared("param"), parameter.step(&SPEC, &grad, &step))?;
    drop(shared);
    let _shared = parameter.buf.clone();
    expect::rejects(case, Rejects::Shared("buf"), parameter.step(&SPEC, &grad, &step))
}
