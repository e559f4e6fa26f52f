//! What [`unsloth_core::ops::adamw`] has to show on a device.

use unsloth_core::{
    Category, DType, Device, Tensor,
    ops::{
        adamw::{self, Buffers, ControlSpec, Spec, StepState},
        elementwise,
    },
};

use super::AWKWARD_LENGTHS;
use crate::{
    arith::{Exact, Rounded},
    budget::{self, Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::adamw::{Parameter, State},
    report::{self, Case, Checked},
};

const OP: &str = "adamw";

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(OP, device, check(device));
}

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    for dtype in device.float_dtypes() {
        for length in AWKWARD_LENGTHS {
            for (control, spec) in CONFIGS {
                let case = Case::new(device, OP, format!("{length} elements, {dtype}, {spec:?}, {control:?}"));
                five_steps(device, &case, (length, dtype), (control, spec)).map_err(|failure| failure.within(&case))?;
            }
        }
    }
    for (name, hazard) in HAZARDS {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

type Hazard = fn(&Device, &Case) -> Checked;

const HAZARDS: [(&str, Hazard); 10] = [
    ("many_at_once_are_as_one_by_one", many_at_once_are_as_one_by_one),
    ("skips_a_bad_step", skips_a_bad_step),
    ("sticky_skips_all_later_steps", sticky_skips_all_later_steps),
    ("continues_from_a_step_count", continues_from_a_step_count),
    ("learning_rate_zero_keeps_the_parameter", learning_rate_zero_keeps_the_parameter),
    ("large_bf16_inputs", large_bf16_inputs),
    ("rejects_fields", rejects_fields),
    ("rejects_control_fields", rejects_control_fields),
    ("rejects_operands", rejects_operands),
    ("rejects_shared", rejects_shared),
];

const SPEC: Spec = Spec { learning_rate: 0.03, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
const CONTROL: ControlSpec = ControlSpec { max_grad_norm: Some(1.0), loss_scale: 1.0, sticky: true };

const CONFIGS: [(ControlSpec, Spec); 3] = [
    (CONTROL, SPEC),
    (
        ControlSpec { max_grad_norm: None, loss_scale: 1024.0, sticky: false },
        Spec { learning_rate: 0.01, beta1: 0.5, beta2: 0.75, eps: 0.1, weight_decay: 0.0 },
    ),
    // Gradients small against eps, decay that would stand out if it were coupled to the gradient.
    (
        ControlSpec { max_grad_norm: Some(1e3), loss_scale: 0.5, sticky: false },
        Spec { learning_rate: 0.1, beta1: 0.0, beta2: 0.9, eps: 1.0, weight_decay: 2.0 },
    ),
];

/// One parameter on a device.
struct OnDevice {
    param: Tensor,
    m: Tensor,
    v: Tensor,
}

impl OnDevice {
    fn new(device: &Device, values: &[f64], dtype: DType) -> unsloth_core::Result<Self> {
        let zeros = || device.zeros([values.len()], DType::F32, Category::Optimiser);
        Ok(Self { param: data::tensor(device, values, [values.len()], dtype)?, m: zeros()?, v: zeros()? })
    }

    fn step(&mut self, spec: &Spec, grad: &Tensor, state: &StepState) -> unsloth_core::Result<()> {
        adamw::step(spec, &mut [self.buffers(grad)], state)
    }

    fn buffers<'a>(&'a mut self, grad: &'a Tensor) -> Buffers<'a> {
        Buffers { param: &mut self.param, grad, m: &mut self.m, v: &mut self.v }
    }

    fn read(&self) -> unsloth_core::Result<Parameter> {
        let dtype = self.param.dtype();
        Ok(Parameter { param: data::read(&self.param)?, m: data::read(&self.m)?, v: data::read(&self.v)?, dtype })
    }

    fn copy(&self) -> unsloth_core::Result<Self> {
        let copy = elementwise::copy;
        Ok(Self { param: copy(&self.param)?, m: copy(&self.m)?, v: copy(&self.v)? })
    }

    fn same_bits(&self, case: &Case, what: &str, other: &Self) -> Checked {
        expect::same_bits(case, &format!("param, {what}"), &self.param, &other.param)?;
        expect::same_bits(case, &format!("m, {what}"), &self.m, &other.m)?;
        expect::same_bits(case, &format!("v, {what}"), &self.v, &other.v)
    }
}

fn scalar(device: &Device, value: f32) -> unsloth_core::Result<Tensor> {
    device.from_slice(&[value], [1], Category::Activations)
}

fn control(
    device: &Device,
    spec: &ControlSpec,
    (norm, finite): (f32, bool),
    state: &mut StepState,
) -> unsloth_core::Result<()> {
    adamw::control(spec, &scalar(device, norm)?, &scalar(device, f32::from(u8::from(finite)))?, state)
}

/// The state is what the references say: counts exactly, scalars within budget.
fn check_state(case: &Case, state: &StepState, (exact, naive): (&State, &State)) -> Checked {
    let actual = data::read(state.tensor())?;
    let counts = (actual[StepState::SKIP], actual[StepState::STEPS]);
    let expected = (f64::from(u8::from(exact.skip)), f64::from(exact.steps));
    expect::holds(case, &format!("skip and steps are {counts:?}, expected {expected:?}"), counts == expected)?;
    if exact.skip {
        return Ok(());
    }
    for (name, slot, exact, naive) in [
        ("grad_norm", StepState::GRAD_NORM, exact.grad_norm, naive.grad_norm),
        ("gradient_scale", StepState::GRADIENT_SCALE, exact.gradient_scale, naive.gradient_scale),
    ] {
        let expected = Expected { exact: &[exact], naive: &[naive], floor: Floor::Stored(DType::F32) };
        budget::check(case, name, &actual[slot..=slot], expected)?;
    }
    Ok(())
}

/// Five steps against the formula, the first with learning rate 0 as under warm-up, with norms on both sides of the limit.
/// Each starts from what the device holds: otherwise the roundings of all steps would add up, in one reference by luck
/// less than on the device.
fn five_steps(
    device: &Device,
    case: &Case,
    (length, dtype): (usize, DType),
    (control_spec, spec): (ControlSpec, Spec),
) -> Checked {
    let mut data = Data::new(71);
    let start = data.normal(length, 1.0, dtype);
    let (mut exact_state, mut naive_state) = (State::new(0), State::new(0));
    let mut actual = OnDevice::new(device, &start, dtype)?;
    let mut again = OnDevice::new(device, &start, dtype)?;
    let mut state = StepState::new(device, 0)?;
    for (index, norm) in [0.4f32, 7.0, 0.1, 30.0, 1.0].into_iter().enumerate() {
        let spec = Spec { learning_rate: if index == 0 { 0.0 } else { spec.learning_rate }, ..spec };
        let norm = norm * control_spec.loss_scale;
        let grad = data.normal(length, 0.2 * f64::from(control_spec.loss_scale), DType::F32);
        exact_state = exact_state.next(&Exact, &control_spec, f64::from(norm), true);
        naive_state = naive_state.next(&Rounded(dtype), &control_spec, f64::from(norm), true);
        control(device, &control_spec, (norm, true), &mut state)?;
        check_state(case, &state, (&exact_state, &naive_state))?;

        let (mut exact, mut naive) = (actual.read()?, actual.read()?);
        exact.step(&Exact, &spec, &grad, &exact_state);
        naive.step(&Rounded(dtype), &spec, &grad, &naive_state);
        let grad = data::tensor(device, &grad, [length], DType::F32)?;
        actual.step(&spec, &grad, &state)?;
        again.step(&spec, &grad, &state)?;
        for (name, tensor, exact, naive, dtype) in [
            ("m", &actual.m, &exact.m, &naive.m, DType::F32),
            ("v", &actual.v, &exact.v, &naive.v, DType::F32),
            ("param", &actual.param, &exact.param, &naive.param, dtype),
        ] {
            let name = format!("{name} after step {}", index + 1);
            check_tensor(case, &name, tensor, Expected { exact, naive, floor: Floor::Stored(dtype) })?;
        }
    }
    actual.same_bits(case, "deterministic", &again)
}

/// More parameters than a device may take in one launch, of every type and of lengths that vectors divide and that they do not: the
/// same bits as one after the other.
fn many_at_once_are_as_one_by_one(device: &Device, case: &Case) -> Checked {
    let dtypes = device.float_dtypes();
    let mut data = Data::new(75);
    let (mut together, mut alone, mut grads) = (Vec::new(), Vec::new(), Vec::new());
    for (index, length) in AWKWARD_LENGTHS.into_iter().cycle().take(23).enumerate() {
        let dtype = dtypes[index % dtypes.len()];
        let values = data.normal(length, 1.0, dtype);
        together.push(OnDevice::new(device, &values, dtype)?);
        alone.push(OnDevice::new(device, &values, dtype)?);
        grads.push(data::tensor(device, &data.normal(length, 0.2, DType::F32), [length], DType::F32)?);
    }
    let mut state = StepState::new(device, 3)?;
    control(device, &CONTROL, (0.5, true), &mut state)?;
    let mut buffers: Vec<Buffers<'_>> = together.iter_mut().zip(&grads).map(|(p, grad)| p.buffers(grad)).collect();
    adamw::step(&SPEC, &mut buffers, &state)?;
    adamw::step(&SPEC, &mut [], &state)?;
    for (index, ((together, alone), grad)) in together.iter().zip(&mut alone).zip(&grads).enumerate() {
        alone.step(&SPEC, grad, &state)?;
        together.same_bits(case, &format!("parameter {index}"), alone)?;
    }
    Ok(())
}

/// A step with an infinite or NaN norm, or with the finite flag down, changes nothing, whatever the gradients hold; the
/// next good one goes on as if it had not been.
fn skips_a_bad_step(device: &Device, case: &Case) -> Checked {
    let spec = ControlSpec { sticky: false, ..CONTROL };
    for dtype in device.float_dtypes() {
        for (norm, finite) in [(f32::NAN, true), (f32::INFINITY, true), (1.0, false), (f32::NAN, false)] {
            let mut parameter = OnDevice::new(device, &[1.0, -2.0, 3.0], dtype)?;
            let mut without = parameter.copy()?;
            let grad = data::tensor(device, &[0.5, 0.25, -1.0], [3], DType::F32)?;
            let (mut state, mut state_without) = (StepState::new(device, 0)?, StepState::new(device, 0)?);
            for state in [&mut state, &mut state_without] {
                control(device, &spec, (0.5, true), state)?;
            }
            parameter.step(&SPEC, &grad, &state)?;
            without.step(&SPEC, &grad, &state_without)?;
            let before = parameter.copy()?;
            control(device, &spec, (norm, finite), &mut state)?;
            let skipped = State { skip: true, steps: 1, ..State::new(0) };
            check_state(case, &state, (&skipped, &skipped))?;
            let bad = data::tensor(device, &[f64::NAN, f64::INFINITY, 1.0], [3], DType::F32)?;
            parameter.step(&SPEC, &bad, &state)?;
            parameter.same_bits(case, &format!("skipped for norm {norm}, finite {finite}"), &before)?;

            for state in [&mut state, &mut state_without] {
                control(device, &spec, (0.5, true), state)?;
            }
            parameter.step(&SPEC, &grad, &state)?;
            without.step(&SPEC, &grad, &state_without)?;
            parameter.same_bits(case, "after a skipped step", &without)?;
        }
    }
    Ok(())
}

/// Without a loss scaler the last good state is kept until the host has seen the failure.
fn sticky_skips_all_later_steps(device: &Device, case: &Case) -> Checked {
    let mut parameter = OnDevice::new(device, &[1.0, -2.0, 3.0], DType::F32)?;
    let before = parameter.copy()?;
    let grad = data::tensor(device, &[0.5, 0.25, -1.0], [3], DType::F32)?;
    let mut state = StepState::new(device, 4)?;
    for (norm, finite) in [(f32::NAN, true), (0.5, true), (0.5, true)] {
        control(device, &CONTROL, (norm, finite), &mut state)?;
        let skipped = State { skip: true, steps: 4, ..State::new(0) };
        check_state(case, &state, (&skipped, &skipped))?;
        parameter.step(&SPEC, &grad, &state)?;
    }
    parameter.same_bits(case, "sticky", &before)
}

/// A resumed run: bias corrections are those of the next step, not of the first.
fn continues_from_a_step_count(device: &Device, case: &Case) -> Checked {
    let (grad, m, v) = ([0.5, -0.25, 1.0], [0.125, 0.5, -0.25], [0.0625, 0.5, 0.25]);
    for steps in [1, 9, 1000] {
        let mut actual = OnDevice::new(device, &[1.0, -2.0, 3.0], DType::F32)?;
        actual.m.write(&m.map(|m| m as f32))?;
        actual.v.write(&v.map(|v| v as f32))?;
        let mut state = StepState::new(device, steps)?;
        control(device, &CONTROL, (0.5, true), &mut state)?;
        actual.step(&SPEC, &data::tensor(device, &grad, [3], DType::F32)?, &state)?;
        let reference = Parameter { param: vec![1.0, -2.0, 3.0], m: m.into(), v: v.into(), dtype: DType::F32 };
        let (mut exact, mut naive) = (reference.clone(), reference);
        exact.step(&Exact, &SPEC, &grad, &State { steps: steps + 1, ..State::new(0) });
        naive.step(&Rounded(DType::F32), &SPEC, &grad, &State { steps: steps + 1, ..State::new(0) });
        let expected = Expected { exact: &exact.param, naive: &naive.param, floor: Floor::Stored(DType::F32) };
        check_tensor(case, &format!("param after step {}", steps + 1), &actual.param, expected)?;
    }
    Ok(())
}

fn learning_rate_zero_keeps_the_parameter(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let values = Data::new(72).normal(65, 1.0, dtype);
        let mut parameter = OnDevice::new(device, &values, dtype)?;
        let before = parameter.copy()?;
        let mut state = StepState::new(device, 0)?;
        control(device, &CONTROL, (0.5, true), &mut state)?;
        let grad = data::tensor(device, &Data::new(73).normal(65, 1.0, DType::F32), [65], DType::F32)?;
        parameter.step(&Spec { learning_rate: 0.0, ..SPEC }, &grad, &state)?;
        expect::same_bits(case, "param", &parameter.param, &before.param)?;
        let moved = data::read(&parameter.m)?.iter().all(|&m| m != 0.0);
        expect::holds(case, "the moments move with learning rate 0", moved)?;
    }
    Ok(())
}

/// Parameters beyond f16, and gradients whose square is beyond it.
fn large_bf16_inputs(device: &Device, case: &Case) -> Checked {
    let dtype = super::wide_dtype(device);
    let mut data = Data::new(74);
    let (start, grad) = (data.normal(65, 1e30, dtype), data.normal(65, 1e15, DType::F32));
    let zeros = vec![0.0; 65];
    let reference = Parameter { param: start.clone(), m: zeros.clone(), v: zeros, dtype };
    let (mut exact, mut naive) = (reference.clone(), reference);
    let mut actual = OnDevice::new(device, &start, dtype)?;
    let mut state = StepState::new(device, 0)?;
    let spec = ControlSpec { max_grad_norm: None, ..CONTROL };
    control(device, &spec, (1e16, true), &mut state)?;
    let reference_state = State::new(0).next(&Exact, &spec, 1e16, true);
    exact.step(&Exact, &SPEC, &grad, &reference_state);
    naive.step(&Rounded(dtype), &SPEC, &grad, &reference_state);
    actual.step(&SPEC, &data::tensor(device, &grad, [65], DType::F32)?, &state)?;
    for (name, tensor, exact, naive, dtype) in [
        ("m", &actual.m, &exact.m, &naive.m, DType::F32),
        ("v", &actual.v, &exact.v, &naive.v, DType::F32),
        ("param", &actual.param, &exact.param, &naive.param, dtype),
    ] {
        check_tensor(case, name, tensor, Expected { exact, naive, floor: Floor::Stored(dtype) })?;
    }
    Ok(())
}

fn rejects_fields(device: &Device, case: &Case) -> Checked {
    let state = StepState::new(device, 1)?;
    let grad = device.zeros([3], DType::F32, Category::Gradients)?;
    let mut parameter = OnDevice::new(device, &[1.0; 3], DType::F32)?;
    let mut refuse =
        |field, spec: Spec| expect::rejects(case, Rejects::Spec(field), parameter.step(&spec, &grad, &state));
    for bad in [-1e-3, f32::NAN, f32::INFINITY] {
        refuse("learning_rate", Spec { learning_rate: bad, ..SPEC })?;
        refuse("weight_decay", Spec { weight_decay: bad, ..SPEC })?;
    }
    for bad in [-0.1, 1.0, f32::NAN] {
        refuse("beta1", Spec { beta1: bad, ..SPEC })?;
        refuse("beta2", Spec { beta2: bad, ..SPEC })?;
    }
    for bad in [0.0, -1e-8, f32::NAN, f32::INFINITY] {
        refuse("eps", Spec { eps: bad, ..SPEC })?;
    }
    Ok(())
}

fn rejects_control_fields(device: &Device, case: &Case) -> Checked {
    let mut state = StepState::new(device, 0)?;
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let scale = ControlSpec { loss_scale: bad, ..CONTROL };
        let max = ControlSpec { max_grad_norm: Some(bad), ..CONTROL };
        expect::rejects(case, Rejects::Spec("loss_scale"), control(device, &scale, (1.0, true), &mut state))?;
        expect::rejects(case, Rejects::Spec("max_grad_norm"), control(device, &max, (1.0, true), &mut state))?;
    }
    let (one, two) = (scalar(device, 1.0)?, device.zeros([2], DType::F32, Category::Activations)?);
    expect::rejects(case, Rejects::Shape("norm"), adamw::control(&CONTROL, &two, &one, &mut state))?;
    expect::rejects(case, Rejects::Shape("finite"), adamw::control(&CONTROL, &one, &two, &mut state))
}

fn rejects_operands(device: &Device, case: &Case) -> Checked {
    let state = StepState::new(device, 1)?;
    let floats = |length| device.zeros([length], DType::F32, Category::Gradients);
    let step = |param: &mut Tensor, grad: &Tensor, m: &mut Tensor, v: &mut Tensor| {
        adamw::step(&SPEC, &mut [Buffers { param, grad, m, v }], &state)
    };
    let mut ids = data::integers(device, &[1, 2, 3])?;
    let (x, m, v) = (&mut floats(3)?, &mut floats(3)?, &mut floats(3)?);
    expect::rejects(case, Rejects::DType("param"), step(&mut ids, &floats(3)?, m, v))?;
    expect::rejects(case, Rejects::DType("grad"), step(x, &ids, m, v))?;
    expect::rejects(case, Rejects::DType("m"), step(x, &floats(3)?, &mut ids, v))?;
    expect::rejects(case, Rejects::Shape("param"), step(&mut floats(4)?, &floats(3)?, m, v))?;
    expect::rejects(case, Rejects::Shape("m"), step(x, &floats(3)?, &mut floats(4)?, v))?;
    expect::rejects(case, Rejects::Shape("v"), step(x, &floats(3)?, m, &mut floats(4)?))
}

/// Nothing is changed by a refused step.
fn rejects_shared(device: &Device, case: &Case) -> Checked {
    let mut state = StepState::new(device, 0)?;
    control(device, &CONTROL, (0.5, true), &mut state)?;
    let grad = data::tensor(device, &[1.0; 3], [3], DType::F32)?;
    for arg in ["param", "m", "v"] {
        let mut parameter = OnDevice::new(device, &[1.0; 3], DType::F32)?;
        let before = parameter.copy()?;
        let _shared = match arg {
            "param" => parameter.param.clone(),
            "m" => parameter.m.clone(),
            _ => parameter.v.clone(),
        };
        expect::rejects(case, Rejects::Shared(arg), parameter.step(&SPEC, &grad, &state))?;
        parameter.same_bits(case, &format!("shared {arg}"), &before)?;
    }
    Ok(())
}
