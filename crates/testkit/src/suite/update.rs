//! What optimisers whose state is some f32 tensors of the parameter's shape have to show, the same for each.

use unsloth_core::{
    Category, DType, Device, Result, Tensor,
    ops::{
        adamw::{self, ControlSpec, StepState},
        elementwise,
    },
};

use super::AWKWARD_LENGTHS;
use crate::{
    arith::{Arith, Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::adamw::State,
    report::{Case, Checked},
};

/// An optimiser with its hyper-parameters.
pub(super) trait Rule: std::fmt::Debug {
    const OP: &'static str;
    /// Names of the state that this one has.
    fn state(&self) -> &'static [&'static str];
    /// One step on a device.
    fn step(&self, param: &mut Tensor, grad: &Tensor, state: &mut [Tensor], step: &StepState) -> Result<()>;
    /// One step of the reference.
    fn reference<A: Arith>(
        &self,
        arith: &A,
        param: (&mut [f64], DType),
        grad: (&[f64], &State),
        state: &mut [Vec<f64>],
    );
}

/// A parameter and its state on a device.
pub(super) struct OnDevice {
    pub(super) param: Tensor,
    pub(super) state: Vec<Tensor>,
}

impl OnDevice {
    pub(super) fn new(device: &Device, rule: &impl Rule, values: &[f64], dtype: DType) -> Result<Self> {
        let zeros = |_: &&str| device.zeros([values.len()], DType::F32, Category::Optimiser);
        let state = rule.state().iter().map(zeros).collect::<Result<_>>()?;
        Ok(Self { param: data::tensor(device, values, [values.len()], dtype)?, state })
    }

    fn copy(&self) -> Result<Self> {
        let state = self.state.iter().map(elementwise::copy).collect::<Result<_>>()?;
        Ok(Self { param: elementwise::copy(&self.param)?, state })
    }

    fn same_bits(&self, case: &Case, what: &str, other: &Self) -> Checked {
        expect::same_bits(case, &format!("param, {what}"), &self.param, &other.param)?;
        self.state.iter().zip(&other.state).try_for_each(|(a, b)| expect::same_bits(case, what, a, b))
    }
}

/// The state of a step behind three, whose gradients are to be divided by `scale`, or are not finite.
pub(super) fn control(device: &Device, scale: f32, good: bool) -> Result<StepState> {
    control_after(device, 3, (scale, good))
}

/// The same behind so many completed steps.
pub(super) fn control_after(device: &Device, steps: u32, (scale, good): (f32, bool)) -> Result<StepState> {
    let mut state = StepState::new(device, steps)?;
    let scalar = |value: f32| device.from_slice(&[value], [1], Category::Activations);
    let spec = ControlSpec { max_grad_norm: None, loss_scale: scale, sticky: false };
    adamw::control(&spec, &scalar(1.0)?, &scalar(f32::from(u8::from(good)))?, &mut state)?;
    Ok(state)
}

/// Runs everything for each of the rules.
pub(super) fn check<R: Rule>(device: &Device, rules: &[R]) -> Checked {
    for rule in rules {
        for dtype in device.float_dtypes() {
            for length in AWKWARD_LENGTHS {
                let case = Case::new(device, R::OP, format!("{length} elements, {dtype}, {rule:?}"));
                five_steps(device, &case, rule, (length, dtype)).map_err(|failure| failure.within(&case))?;
            }
        }
        let case = Case::new(device, R::OP, format!("hazards, {rule:?}"));
        skips_a_bad_step(device, &case, rule).map_err(|failure| failure.within(&case))?;
        rejects_operands(device, &case, rule).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

/// Five steps against the formula, each from what the device holds, with gradients that are to be divided by four.
fn five_steps(device: &Device, case: &Case, rule: &impl Rule, (length, dtype): (usize, DType)) -> Checked {
    let mut data = Data::new(81);
    let start = data.normal(length, 1.0, dtype);
    let mut actual = OnDevice::new(device, rule, &start, dtype)?;
    let mut again = OnDevice::new(device, rule, &start, dtype)?;
    let step_state = control(device, 4.0, true)?;
    let scaled = State { gradient_scale: 0.25, ..State::new(4) };
    for index in 0..5 {
        let grad = data.normal(length, 1.0, DType::F32);
        let exact = reference(&Exact, rule, (&actual, dtype), (&grad, &scaled))?;
        let naive = reference(&Rounded(dtype), rule, (&actual, dtype), (&grad, &scaled))?;
        let grad = data::tensor(device, &grad, [length], DType::F32)?;
        for tensors in [&mut actual, &mut again] {
            rule.step(&mut tensors.param, &grad, &mut tensors.state, &step_state)?;
        }
        let expected = Expected { exact: &exact.0, naive: &naive.0, floor: Floor::Stored(dtype) };
        check_tensor(case, &format!("param after step {}", index + 1), &actual.param, expected)?;
        for (i, name) in rule.state().iter().enumerate() {
            let expected = Expected { exact: &exact.1[i], naive: &naive.1[i], floor: Floor::Stored(DType::F32) };
            check_tensor(case, &format!("{name} after step {}", index + 1), &actual.state[i], expected)?;
        }
    }
    actual.same_bits(case, "deterministic", &again)
}

/// Parameter and state behind a step from what the device holds.
fn reference<A: Arith>(
    arith: &A,
    rule: &impl Rule,
    (before, dtype): (&OnDevice, DType),
    grad: (&[f64], &State),
) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
    let mut param = data::read(&before.param)?;
    let mut state = before.state.iter().map(data::read).collect::<Result<Vec<_>>>()?;
    rule.reference(arith, (&mut param, dtype), grad, &mut state);
    Ok((param, state))
}

/// A step to be skipped changes nothing, whatever the gradients hold.
fn skips_a_bad_step(device: &Device, case: &Case, rule: &impl Rule) -> Checked {
    for dtype in device.float_dtypes() {
        let mut parameter = OnDevice::new(device, rule, &[1.0, -2.0, 3.0], dtype)?;
        let good = data::tensor(device, &[0.5, 0.25, -1.0], [3], DType::F32)?;
        rule.step(&mut parameter.param, &good, &mut parameter.state, &control(device, 1.0, true)?)?;
        let before = parameter.copy()?;
        let bad = data::tensor(device, &[f64::NAN, f64::INFINITY, 1.0], [3], DType::F32)?;
        rule.step(&mut parameter.param, &bad, &mut parameter.state, &control(device, 1.0, false)?)?;
        parameter.same_bits(case, "skipped", &before)?;
    }
    Ok(())
}

/// Nothing is changed by a refused step.
fn rejects_operands(device: &Device, case: &Case, rule: &impl Rule) -> Checked {
    let step_state = control(device, 1.0, true)?;
    let floats = |length| device.zeros([length], DType::F32, Category::Gradients);
    let ids = data::integers(device, &[1, 2, 3])?;
    let fresh = || OnDevice::new(device, rule, &[1.0; 3], DType::F32);
    let OnDevice { mut param, mut state } = fresh()?;
    let mut step = |param: &mut Tensor, grad: &Tensor| rule.step(param, grad, &mut state, &step_state);
    expect::rejects(case, Rejects::DType("param"), step(&mut data::integers(device, &[1, 2, 3])?, &floats(3)?))?;
    expect::rejects(case, Rejects::DType("grad"), step(&mut param, &ids))?;
    expect::rejects(case, Rejects::Shape("param"), step(&mut floats(4)?, &floats(3)?))?;
    for (i, name) in rule.state().iter().enumerate() {
        let OnDevice { mut param, mut state } = fresh()?;
        state[i] = floats(4)?;
        let refused = rule.step(&mut param, &floats(3)?, &mut state, &step_state);
        expect::rejects(case, Rejects::Shape(name), refused)?;
    }
    for shared in ["param"].iter().chain(rule.state()) {
        let mut parameter = fresh()?;
        let before = parameter.copy()?;
        let index = rule.state().iter().position(|name| name == shared);
        let _shared = index.map_or(&parameter.param, |index| &parameter.state[index]).clone();
        let grad = data::tensor(device, &[1.0; 3], [3], DType::F32)?;
        let refused = rule.step(&mut parameter.param, &grad, &mut parameter.state, &step_state);
        expect::rejects(case, Rejects::Shared(shared), refused)?;
        parameter.same_bits(case, shared, &before)?;
    }
    Ok(())
}
