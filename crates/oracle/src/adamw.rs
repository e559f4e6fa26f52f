//! Reference of [`unsloth_core::ops::adamw`].

use unsloth_core::{
    DType,
    ops::adamw::{ControlSpec, Spec},
};

use crate::arith::Arith;

/// The scalars of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    /// Norm of the unscaled gradients.
    pub grad_norm: f64,
    /// Clip factor over loss scale.
    pub gradient_scale: f64,
    /// Whether the step is skipped.
    pub skip: bool,
    /// Completed steps, this one included unless skipped.
    pub steps: u32,
}

impl State {
    /// Before the first step, or after `steps` completed ones.
    pub fn new(steps: u32) -> Self {
        Self { grad_norm: 0.0, gradient_scale: 1.0, skip: false, steps }
    }

    /// The state for the next step, from the norm of the scaled gradients and whether all is finite.
    pub fn next<A: Arith>(self, arith: &A, spec: &ControlSpec, norm: f64, finite: bool) -> Self {
        let loss_scale = f64::from(spec.loss_scale);
        let grad_norm = arith.stat(norm / loss_scale);
        let clip = match spec.max_grad_norm {
            Some(max) => arith.stat(f64::from(max) / arith.stat(grad_norm + 1e-6)).min(1.0),
            None => 1.0,
        };
        let skip = !finite || !norm.is_finite() || (spec.sticky && self.skip);
        let steps = if skip { self.steps } else { self.steps + 1 };
        Self { grad_norm, gradient_scale: arith.stat(clip / loss_scale), skip, steps }
    }
}

/// A parameter and its moments.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The values.
    pub param: Vec<f64>,
    /// First moment.
    pub m: Vec<f64>,
    /// Second moment.
    pub v: Vec<f64>,
    /// Storage type of the values.
    pub dtype: DType,
}

impl Parameter {
    /// One step, each operation of the formula on its own.
    pub fn step<A: Arith>(&mut self, arith: &A, spec: &Spec, grad: &[f64], state: &State) {
        if state.skip {
            return;
        }
        let [learning_rate, beta1, beta2, eps, weight_decay] =
            [spec.learning_rate, spec.beta1, spec.beta2, spec.eps, spec.weight_decay].map(f64::from);
        let steps = state.steps as i32;
        let correction1 = arith.stat(1.0 - arith.stat(beta1.powi(steps)));
        let correction2 = arith.stat(1.0 - arith.stat(beta2.powi(steps)));
        for i in 0..grad.len() {
            let g = arith.stat(grad[i] * state.gradient_scale);
            let decay = arith.stat(1.0 - learning_rate * weight_decay);
            let decayed = arith.store_as(self.dtype, self.param[i] * decay);
            self.m[i] = arith.stat(arith.stat(beta1 * self.m[i]) + arith.stat((1.0 - beta1) * g));
            self.v[i] = arith.stat(arith.stat(beta2 * self.v[i]) + arith.stat((1.0 - beta2) * arith.stat(g * g)));
            let denominator = arith.stat(arith.stat((self.v[i] / correction2).sqrt()) + eps);
            let update = arith.stat(arith.stat(learning_rate / correction1) * arith.stat(self.m[i] / denominator));
            self.param[i] = arith.store_as(self.dtype, decayed - update);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arith::Exact;

    const SPEC: Spec = Spec { learning_rate: 0.5, beta1: 0.5, beta2: 0.75, eps: 0.25, weight_decay: 0.5 };

    /// Two steps by hand; all numbers but the last are exact in binary.
    /// Step 1, g = 1: p = 2 * (1 - 0.25) = 1.5, m = 0.5, v = 0.25, update = 0.5 / 0.5 * 0.5 / (sqrt(0.25 / 0.25) + 0.25) = 0.4.
    /// Step 2, g = -2: p = 1.1 * 0.75 = 0.825, m = 0.25 - 1 = -0.75, v = 0.1875 + 1 = 1.1875, corrections 0.75 and 0.4375,
    /// update = 0.5 / 0.75 * -0.75 / (sqrt(1.1875 / 0.4375) + 0.25) = -0.5 / 1.897508922708 = -0.263503373...
    #[test]
    fn by_hand() {
        let mut parameter = Parameter { param: vec![2.0], m: vec![0.0], v: vec![0.0], dtype: DType::F32 };
        let state = |steps| State { steps, ..State::new(0) };
        parameter.step(&Exact, &SPEC, &[1.0], &state(1));
        assert!((parameter.param[0] - 1.1).abs() < 1e-15);
        parameter.step(&Exact, &SPEC, &[-2.0], &state(2));
        assert_eq!((parameter.m[0], parameter.v[0]), (-0.75, 1.1875));
        assert!((parameter.param[0] - (0.825 + 0.5 / ((1.1875f64 / 0.4375).sqrt() + 0.25))).abs() < 1e-15);
    }

    #[test]
    fn control_by_hand() {
        let spec = ControlSpec { max_grad_norm: Some(1.0), loss_scale: 4.0, sticky: true };
        let clipped = State::new(0).next(&Exact, &spec, 8.0, true);
        assert_eq!((clipped.grad_norm, clipped.skip, clipped.steps), (2.0, false, 1));
        assert!((clipped.gradient_scale - 1.0 / 2.000001 / 4.0).abs() < 1e-15);
        let small = clipped.next(&Exact, &spec, 2.0, true);
        assert_eq!((small.gradient_scale, small.steps), (0.25, 2));
        let bad = small.next(&Exact, &spec, f64::NAN, true);
        assert_eq!((bad.skip, bad.steps), (true, 2));
        assert!(bad.next(&Exact, &spec, 2.0, true).skip, "sticky");
        assert!(!bad.next(&Exact, &ControlSpec { sticky: false, ..spec }, 2.0, true).skip, "not sticky");
    }
}
