//! Lion in one pass over parameter, gradient and momentum, steered by the state's scalars.

use unsloth_core::{
    FloatElement, Result, Tensor,
    ops::{
        adamw::StepState,
        lion::{Buffers, Lion, Spec},
    },
};

use crate::{
    CpuBackend,
    access::{dispatch_float, read, write},
    simd::{BLOCK, TASK, update, vectorised},
};

#[inline(always)]
fn apply(spec: &Spec, gradient_scale: f32, param: &mut [f32], (grad, m): (&[f32], &mut [f32])) {
    let &Spec { learning_rate, beta1, beta2, weight_decay } = spec;
    let decay = (1.0 - f64::from(learning_rate) * f64::from(weight_decay)) as f32;
    let (rest1, rest2) = (1.0 - beta1, 1.0 - beta2);
    for ((param, grad), m) in param.iter_mut().zip(grad).zip(m) {
        let g = grad * gradient_scale;
        let c = beta1 * *m + rest1 * g;
        *m = beta2 * *m + rest2 * g;
        // `signum` has no 0.
        let sign = f32::from(u8::from(c > 0.0)) - f32::from(u8::from(c < 0.0));
        *param = *param * decay - learning_rate * sign;
    }
}

impl CpuBackend {
    fn lion_elements<T: FloatElement>(&self, spec: &Spec, gradient_scale: f32, buffers: Buffers<'_>) -> Result<()> {
        let param = write::<T>("lion", "param", buffers.param)?;
        let grad = read::<f32>(buffers.grad);
        let m = write::<f32>("lion", "m", buffers.m)?;
        let task = |param: &mut [T], grad: &[f32], m: &mut [f32]| {
            let blocks = param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)).zip(m.chunks_mut(BLOCK));
            for ((param, grad), m) in blocks {
                update(param, &mut [0.0; BLOCK], |param| {
                    vectorised(
                        #[inline(always)]
                        || apply(spec, gradient_scale, param, (grad, m)),
                    )
                });
            }
        };
        let parts = param.chunks_mut(TASK).zip(grad.chunks(TASK)).zip(m.chunks_mut(TASK));
        self.for_each_part(parts, |((param, grad), m)| task(param, grad, m));
        Ok(())
    }
}

impl Lion for CpuBackend {
    fn lion(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()> {
        let state = read::<f32>(state);
        if state[StepState::SKIP] != 0.0 {
            return Ok(());
        }
        let scale = state[StepState::GRADIENT_SCALE];
        dispatch_float!(buffers.param.dtype(), T => self.lion_elements::<T>(spec, scale, buffers))
    }
}
