//! What [`unsloth_core::ops::adafactor`] has to show on a device that has it.

use unsloth_core::{
    Category, DType, Device, Result, Tensor,
    ops::{
        adafactor::{self, Averages, Buffers, Spec},
        adamw::StepState,
        elementwise,
    },
};

use super::{AWKWARD_LENGTHS, AWKWARD_ROWS, update};
use crate::{
    arith::{Arith, Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::{self, adamw::State},
    report::{self, Case, Checked},
};

const OP: &str = "adafactor";

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(OP, device, check(device));
}

const SPEC: Spec = Spec {
    learning_rate: 0.03,
    decay_rate: -0.8,
    eps: 1e-30,
    clip_threshold: 1.0,
    parameter_scale: None,
    weight_decay: 0.1,
};
/// The second scales every change down, and its eps is not small; of the others the parameter's size counts, or its least.
const SPECS: [Spec; 4] = [
    SPEC,
    Spec { learning_rate: 0.5, decay_rate: -0.5, eps: 0.1, clip_threshold: 0.25, weight_decay: 0.0, ..SPEC },
    Spec { parameter_scale: Some(1e-3), ..SPEC },
    Spec { parameter_scale: Some(100.0), learning_rate: 1e-3, ..SPEC },
];

type Hazard = fn(&Device, &Case) -> Checked;

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    let matrices = AWKWARD_ROWS.map(|(rows, columns)| vec![rows, columns]);
    for shape in AWKWARD_LENGTHS.map(|length| vec![length]).into_iter().chain(matrices) {
        for dtype in device.float_dtypes() {
            for spec in SPECS {
                let case = Case::new(device, OP, format!("{shape:?}, {dtype}, {spec:?}"));
                three_steps(device, &case, &spec, (&shape, dtype)).map_err(|failure| failure.within(&case))?;
            }
        }
    }
    let hazards: [(&str, Hazard); 2] = [("skips_a_bad_step", skips_a_bad_step), ("rejects", rejects)];
    for (name, hazard) in hazards {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

/// One parameter on a device.
struct OnDevice {
    param: Tensor,
    averages: Vec<Tensor>,
}

impl OnDevice {
    fn new(device: &Device, values: &[f64], (shape, dtype): (&[usize], DType)) -> Result<Self> {
        let shapes = match shape {
            &[rows, columns] => vec![[rows], [columns]],
            _ => vec![[values.len()]],
        };
        let zeros = |shape: [usize; 1]| device.zeros(shape, DType::F32, Category::Optimiser);
        let averages = shapes.into_iter().map(zeros).collect::<Result<_>>()?;
        let param = data::tensor(device, values, [values.len()], dtype)?;
        let param = match shape {
            &[rows, columns] => param.reshape([rows, columns])?,
            _ => param,
        };
        Ok(Self { param, averages })
    }

    fn step(&mut self, spec: &Spec, grad: &Tensor, state: &StepState) -> Result<()> {
        let averages = match self.averages.as_mut_slice() {
            [row, col] => Averages::Factored { row, col },
            [v] => Averages::Whole(v),
            _ => unreachable!("one average or two"),
        };
        adafactor::step(spec, Buffers { param: &mut self.param, grad, averages }, state)
    }

    fn same_bits(&self, case: &Case, what: &str, other: &Self) -> Checked {
        expect::same_bits(case, &format!("param, {what}"), &self.param, &other.param)?;
        self.averages.iter().zip(&other.averages).try_for_each(|(a, b)| expect::same_bits(case, what, a, b))
    }

    fn copy(&self) -> Result<Self> {
        let averages = self.averages.iter().map(elementwise::copy).collect::<Result<_>>()?;
        Ok(Self { param: elementwise::copy(&self.param)?, averages })
    }
}

/// Steps that averages are checked in, whose length depends on their number: the first, a prime, and one of many.
const STEPS: [u32; 3] = [1, 7, 1003];

/// Three steps against the formula, each from what the device holds, with gradients that are to be divided by four.
fn three_steps(device: &Device, case: &Case, spec: &Spec, (shape, dtype): (&[usize], DType)) -> Checked {
    let mut data = Data::new(97);
    let length = shape.iter().product();
    let start = data.normal(length, 1.0, dtype);
    let mut actual = OnDevice::new(device, &start, (shape, dtype))?;
    let mut again = OnDevice::new(device, &start, (shape, dtype))?;
    let columns = (shape.len() == 2).then(|| shape[1]);
    for steps in STEPS {
        let step_state = update::control_after(device, steps - 1, (4.0, true))?;
        let scaled = State { gradient_scale: 0.25, ..State::new(steps) };
        let grad = data.normal(length, 1.0, DType::F32);
        let exact = reference(&Exact, spec, (&actual, dtype), (&grad, &scaled), columns)?;
        let naive = reference(&Rounded(dtype), spec, (&actual, dtype), (&grad, &scaled), columns)?;
        let grad = data::tensor(device, &grad, [length], DType::F32)?.reshape(*actual.param.shape())?;
        actual.step(spec, &grad, &step_state)?;
        again.step(spec, &grad, &step_state)?;
        let tensors = std::iter::once(&actual.param).chain(&actual.averages);
        for (i, (tensor, (exact, naive))) in tensors.zip(exact.iter().zip(&naive)).enumerate() {
            let (name, dtype) = if i == 0 { ("param", dtype) } else { ("averages", DType::F32) };
            let expected = Expected { exact, naive, floor: Floor::Stored(dtype) };
            check_tensor(case, &format!("{name} {i} after step {steps}"), tensor, expected)?;
        }
    }
    actual.same_bits(case, "deterministic", &again)
}

/// The parameter and its averages behind a step.
fn reference<A: Arith>(
    arith: &A,
    spec: &Spec,
    (before, dtype): (&OnDevice, DType),
    grad: (&[f64], &State),
    columns: Option<usize>,
) -> Result<Vec<Vec<f64>>> {
    let mut param = data::read(&before.param)?;
    let mut averages = before.averages.iter().map(data::read).collect::<Result<Vec<_>>>()?;
    oracle::adafactor::step(arith, spec, (&mut param, dtype), grad, (&mut averages, columns));
    Ok(std::iter::once(param).chain(averages).collect())
}

/// A step to be skipped changes nothing, whatever the gradients hold.
fn skips_a_bad_step(device: &Device, case: &Case) -> Checked {
    for shape in [&[6][..], &[2, 3]] {
        let mut parameter = OnDevice::new(device, &[1.0, -2.0, 3.0, 0.5, 0.25, 1.0], (shape, DType::F32))?;
        let grad = |values: &[f64]| data::tensor(device, values, [6], DType::F32)?.reshape(*parameter.param.shape());
        let (good, bad) = (grad(&[1.0; 6])?, grad(&[f64::NAN; 6])?);
        parameter.step(&SPEC, &good, &update::control(device, 1.0, true)?)?;
        let before = parameter.copy()?;
        parameter.step(&SPEC, &bad, &update::control(device, 1.0, false)?)?;
        parameter.same_bits(case, "skipped", &before)?;
    }
    Ok(())
}

fn rejects(device: &Device, case: &Case) -> Checked {
    let step = update::control(device, 1.0, true)?;
    let grad = data::tensor(device, &[1.0; 6], [6], DType::F32)?.reshape([2, 3])?;
    let fresh = || OnDevice::new(device, &[1.0; 6], (&[2, 3], DType::F32));
    for (field, spec) in [
        ("learning_rate", Spec { learning_rate: -1.0, ..SPEC }),
        ("decay_rate", Spec { decay_rate: 0.0, ..SPEC }),
        ("eps", Spec { eps: 0.0, ..SPEC }),
        ("clip_threshold", Spec { clip_threshold: f32::NAN, ..SPEC }),
        ("parameter_scale", Spec { parameter_scale: Some(0.0), ..SPEC }),
        ("weight_decay", Spec { weight_decay: f32::INFINITY, ..SPEC }),
    ] {
        expect::rejects(case, Rejects::Spec(field), fresh()?.step(&spec, &grad, &step))?;
    }
    for (i, arg) in ["row", "col"].into_iter().enumerate() {
        let mut parameter = fresh()?;
        parameter.averages[i] = device.zeros([5], DType::F32, Category::Optimiser)?;
        expect::rejects(case, Rejects::Shape(arg), parameter.step(&SPEC, &grad, &step))?;
        let mut parameter = fresh()?;
        let _shared = parameter.averages[i].clone();
        expect::rejects(case, Rejects::Shared(arg), parameter.step(&SPEC, &grad, &step))?;
    }
    let mut whole = OnDevice { averages: vec![device.zeros([6], DType::F32, Category::Optimiser)?], ..fresh()? };
    expect::rejects(case, Rejects::Shape("v"), whole.step(&SPEC, &grad, &step))
}
