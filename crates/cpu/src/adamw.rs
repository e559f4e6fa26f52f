//! AdamW in one pass over parameter, gradient and moments, steered by the state's scalars.

use unsloth_core::{
    FloatElement, Result, Tensor,
    ops::adamw::{AdamW, Buffers, ControlSpec, Spec, StepState},
};

use crate::{
    CpuBackend,
    access::{dispatch_float, read, write},
    simd::{BLOCK, TASK, update, vectorised},
};

/// What is the same for every element of a step.
#[derive(Clone, Copy)]
pub(crate) struct Factors {
    /// `1 - lr * weight_decay`
    decay: f32,
    /// `lr / (1 - beta1^t)`
    step_size: f32,
    /// `1 - beta2^t`
    correction2: f32,
    gradient_scale: f32,
    spec: Spec,
}

impl Factors {
    pub(crate) fn new(spec: &Spec, gradient_scale: f32, steps: f32) -> Self {
        // In f64: 0.999^t rounded to f32 loses three of the seven digits of 1 - 0.999^t.
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(f64::from(steps));
        let rate = f64::from(spec.learning_rate);
        Self {
            decay: (1.0 - rate * f64::from(spec.weight_decay)) as f32,
            step_size: (rate / correction(spec.beta1)) as f32,
            correction2: correction(spec.beta2) as f32,
            gradient_scale,
            spec: *spec,
        }
    }

    #[inline(always)]
    pub(crate) fn apply(self, param: &mut [f32], grad: &[f32], (m, v): (&mut [f32], &mut [f32])) {
        let Self { decay, step_size, correction2, gradient_scale, spec: Spec { beta1, beta2, eps, .. } } = self;
        let (rest1, rest2) = (1.0 - beta1, 1.0 - beta2);
        for (((param, grad), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
            let g = grad * gradient_scale;
            *m = beta1 * *m + rest1 * g;
            *v = beta2 * *v + rest2 * (g * g);
            *param = *param * decay - step_size * *m / ((*v / correction2).sqrt() + eps);
        }
    }
}

impl CpuBackend {
    fn adamw_elements<T: FloatElement>(&self, factors: Factors, buffers: &mut Buffers<'_>) -> Result<()> {
        let param = write::<T>("adamw", "param", buffers.param)?;
        let grad = read::<f32>(buffers.grad);
        let (m, v) = (write::<f32>("adamw", "m", buffers.m)?, write::<f32>("adamw", "v", buffers.v)?);
        let task = |param: &mut [T], grad: &[f32], m: &mut [f32], v: &mut [f32]| {
            let blocks =
                param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)).zip(m.chunks_mut(BLOCK)).zip(v.chunks_mut(BLOCK));
            for (((param, grad), m), v) in blocks {
                update(param, &mut [0.0; BLOCK], |param| {
                    vectorised(
                        #[inline(always)]
                        || factors.apply(param, grad, (m, v)),
                    )
                });
            }
        };
        let moments = m.chunks_mut(TASK).zip(v.chunks_mut(TASK));
        let parts = param.chunks_mut(TASK).zip(grad.chunks(TASK)).zip(moments);
        self.for_each_part(parts, |((param, grad), (m, v))| task(param, grad, m, v));
        Ok(())
    }
}

impl AdamW for CpuBackend {
    fn step_control(&self, spec: &ControlSpec, norm: &Tensor, finite: &Tensor, state: &mut Tensor) -> Result<()> {
        let norm = read::<f32>(norm)[0] / spec.loss_scale;
        let finite = read::<f32>(finite)[0] == 1.0 && norm.is_finite();
        let state = write::<f32>("step_control", "state", state)?;
        let clip = spec.max_grad_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        let skip = !finite || (spec.sticky && state[StepState::SKIP] != 0.0);
        state[StepState::GRAD_NORM] = norm;
        state[StepState::GRADIENT_SCALE] = clip / spec.loss_scale;
        state[StepState::SKIP] = f32::from(u8::from(skip));
        if !skip {
            state[StepState::STEPS] += 1.0;
        }
        Ok(())
    }

    fn adamw(&self, spec: &Spec, parameters: &mut [Buffers<'_>], state: &Tensor) -> Result<()> {
        let state = read::<f32>(state);
        if state[StepState::SKIP] != 0.0 {
            return Ok(());
        }
        let factors = Factors::new(spec, state[StepState::GRADIENT_SCALE], state[StepState::STEPS]);
        parameters.iter_mut().try_for_each(
            |buffers| dispatch_float!(buffers.param.dtype(), T => self.adamw_elements::<T>(factors, buffers)),
        )
    }
}
