//! What [`unsloth_core::ops::adamw8bit`] has to show on a device.

use unsloth_core::{
    DType, Device, Result, Tensor,
    ops::{
        adamw::{Spec, StepState},
        adamw8bit::{self, BLOCK_SIZE, Buffers, Moment},
        elementwise,
    },
};

use super::{AWKWARD_LENGTHS, update};
use crate::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::{
        adamw::{Parameter, State},
        adamw8bit::{Which, absmax},
    },
    report::{self, Case, Checked},
};

const OP: &str = "adamw8bit";

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(OP, device, check(device));
}

const SPEC: Spec = Spec { learning_rate: 0.03, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
const SPECS: [Spec; 2] = [SPEC, Spec { learning_rate: 0.1, beta1: 0.5, beta2: 0.9, eps: 0.1, weight_decay: 0.0 }];
/// Around one and two blocks, besides the usual ones.
const LENGTHS: [usize; 5] = [255, 256, 257, 511, 20_000];

type Hazard = fn(&Device, &Case) -> Checked;

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    for dtype in device.float_dtypes() {
        for length in AWKWARD_LENGTHS.into_iter().chain(LENGTHS) {
            for spec in SPECS {
                let case = Case::new(device, OP, format!("{length} elements, {dtype}, {spec:?}"));
                five_steps(device, &case, &spec, (length, dtype)).map_err(|failure| failure.within(&case))?;
            }
        }
    }
    let hazards: [(&str, Hazard); 3] =
        [("skips_a_bad_step", skips_a_bad_step), ("blocks_are_apart", blocks_are_apart), ("rejects", rejects)];
    for (name, hazard) in hazards {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

/// One parameter on a device.
struct OnDevice {
    param: Tensor,
    m: Moment,
    v: Moment,
}

impl OnDevice {
    fn new(device: &Device, values: &[f64], dtype: DType) -> Result<Self> {
        let moment = || Moment::zeros(device, values.len());
        Ok(Self { param: data::tensor(device, values, [values.len()], dtype)?, m: moment()?, v: moment()? })
    }

    fn step(&mut self, spec: &Spec, grad: &Tensor, state: &StepState) -> Result<()> {
        let (m, v) = (&mut self.m, &mut self.v);
        let buffers = Buffers {
            param: &mut self.param,
            grad,
            m_codes: &mut m.codes,
            m_absmax: &mut m.absmax,
            v_codes: &mut v.codes,
            v_absmax: &mut v.absmax,
        };
        adamw8bit::step(spec, buffers, state)
    }

    fn read(&self) -> Result<Parameter> {
        let decode = |which: Which, moment: &Moment| {
            let absmax = data::read(&moment.absmax)?;
            Ok::<_, unsloth_core::Error>(which.decode(&moment.codes.to_vec()?, &absmax, self.param.num_elements()))
        };
        let (m, v) = (decode(Which::First, &self.m)?, decode(Which::Second, &self.v)?);
        Ok(Parameter { param: data::read(&self.param)?, m, v, dtype: self.param.dtype() })
    }

    fn tensors(&self) -> [&Tensor; 5] {
        [&self.param, &self.m.codes, &self.m.absmax, &self.v.codes, &self.v.absmax]
    }
}

/// Five steps, each from what the codes on the device stand for: the parameter is held to the budget of AdamW, magnitudes are the
/// largest of their blocks, and each code is as near as any other to the moment that it stands for.
fn five_steps(device: &Device, case: &Case, spec: &Spec, (length, dtype): (usize, DType)) -> Checked {
    let mut data = Data::new(91);
    let start = data.normal(length, 1.0, dtype);
    let mut actual = OnDevice::new(device, &start, dtype)?;
    let mut again = OnDevice::new(device, &start, dtype)?;
    for index in 0..5 {
        // `control` counts from three completed steps.
        let (step_state, reference) =
            (update::control(device, 4.0, true)?, State { gradient_scale: 0.25, ..State::new(4) });
        let grad = data.normal(length, 1.0, DType::F32);
        let (mut exact, mut naive) = (actual.read()?, actual.read()?);
        exact.step(&Exact, spec, &grad, &reference);
        naive.step(&Rounded(dtype), spec, &grad, &reference);
        let grad = data::tensor(device, &grad, [length], DType::F32)?;
        actual.step(spec, &grad, &step_state)?;
        again.step(spec, &grad, &step_state)?;
        let expected = Expected { exact: &exact.param, naive: &naive.param, floor: Floor::Stored(dtype) };
        check_tensor(case, &format!("param after step {}", index + 1), &actual.param, expected)?;
        let decoded = actual.read()?;
        for (name, which, moment, exact, naive, decoded) in [
            ("m", Which::First, &actual.m, &exact.m, &naive.m, &decoded.m),
            ("v", Which::Second, &actual.v, &exact.v, &naive.v, &decoded.v),
        ] {
            let (of_exact, of_naive) = (absmax(exact), absmax(naive));
            let expected = Expected { exact: &of_exact, naive: &of_naive, floor: Floor::Stored(DType::F32) };
            check_tensor(case, &format!("absmax of {name}"), &moment.absmax, expected)?;
            for (i, nearest) in which.nearest(exact, &of_exact).into_iter().enumerate() {
                let distance = (decoded[i] - exact[i]).abs();
                let what =
                    format!("{name}[{i}] is {:e}, encoded {:e}; the nearest is {nearest:e} away", exact[i], decoded[i]);
                // Near a border rounding decides which of two codes it is.
                expect::holds(case, &what, distance <= nearest + 1e-5 * of_exact[i / BLOCK_SIZE])?;
            }
        }
    }
    for (a, b) in actual.tensors().into_iter().zip(again.tensors()) {
        expect::same_bits(case, "deterministic", a, b)?;
    }
    Ok(())
}

/// A step to be skipped changes nothing, whatever the gradients hold.
fn skips_a_bad_step(device: &Device, case: &Case) -> Checked {
    let mut parameter = OnDevice::new(device, &[1.0, -2.0, 3.0], DType::F32)?;
    let good = data::tensor(device, &[0.5, 0.25, -1.0], [3], DType::F32)?;
    parameter.step(&SPEC, &good, &update::control(device, 1.0, true)?)?;
    let before = parameter.tensors().map(elementwise::copy);
    let bad = data::tensor(device, &[f64::NAN, f64::INFINITY, 1.0], [3], DType::F32)?;
    parameter.step(&SPEC, &bad, &update::control(device, 1.0, false)?)?;
    for (before, after) in before.into_iter().zip(parameter.tensors()) {
        expect::same_bits(case, "skipped", &before?, after)?;
    }
    Ok(())
}

/// A large gradient costs precision in its own block alone.
fn blocks_are_apart(device: &Device, case: &Case) -> Checked {
    let grad: Vec<f64> = (0..2 * BLOCK_SIZE).map(|i| if i == 0 { 1e6 } else { 1e-3 }).collect();
    let mut parameter = OnDevice::new(device, &vec![1.0; grad.len()], DType::F32)?;
    let step = update::control(device, 1.0, true)?;
    parameter.step(&SPEC, &data::tensor(device, &grad, [grad.len()], DType::F32)?, &step)?;
    let m = parameter.read()?.m;
    let share = m[BLOCK_SIZE] / (0.1 * 1e-3);
    expect::holds(case, &format!("the second block holds {share} of its moment"), (share - 1.0).abs() < 1e-5)?;
    expect::holds(case, "the first block cannot tell small from large", m[1] == 0.0)
}

fn rejects(device: &Device, case: &Case) -> Checked {
    let step = update::control(device, 1.0, true)?;
    let grad = data::tensor(device, &[1.0; 3], [3], DType::F32)?;
    let fresh = || OnDevice::new(device, &[1.0; 3], DType::F32);
    for (field, spec) in [
        ("learning_rate", Spec { learning_rate: -1.0, ..SPEC }),
        ("beta1", Spec { beta1: 1.0, ..SPEC }),
        ("beta2", Spec { beta2: f32::NAN, ..SPEC }),
        ("eps", Spec { eps: 0.0, ..SPEC }),
        ("weight_decay", Spec { weight_decay: f32::INFINITY, ..SPEC }),
    ] {
        expect::rejects(case, Rejects::Spec(field), fresh()?.step(&spec, &grad, &step))?;
    }
    type Part = fn(&mut OnDevice) -> &mut Tensor;
    let parts: [(&'static str, Part); 4] = [
        ("m_codes", |parameter| &mut parameter.m.codes),
        ("m_absmax", |parameter| &mut parameter.m.absmax),
        ("v_codes", |parameter| &mut parameter.v.codes),
        ("v_absmax", |parameter| &mut parameter.v.absmax),
    ];
    for (arg, part) in parts {
        let (mut parameter, mut longer) = (fresh()?, OnDevice::new(device, &[1.0; BLOCK_SIZE + 1], DType::F32)?);
        std::mem::swap(part(&mut parameter), part(&mut longer));
        expect::rejects(case, Rejects::Shape(arg), parameter.step(&SPEC, &grad, &step))?;
        let mut parameter = fresh()?;
        let _shared = part(&mut parameter).clone();
        expect::rejects(case, Rejects::Shared(arg), parameter.step(&SPEC, &grad, &step))?;
    }
    Ok(())
}
