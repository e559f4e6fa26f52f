//! Gradient descent in one pass over parameter, gradient and momentum, steered by the state's scalars.

use unsloth_core::{
    FloatElement, Result, Tensor,
    ops::{
        adamw::StepState,
        sgd::{Buffers, Sgd, Spec},
    },
};

use crate::{
    CpuBackend,
    access::{dispatch_float, read, write},
    simd::{BLOCK, TASK, update, vectorised},
};

#[inline(always)]
fn apply(spec: &Spec, gradient_scale: f32, (param, grad): (&mut [f32], &[f32]), buf: Option<&mut [f32]>) {
    let &Spec { learning_rate, momentum, nesterov, weight_decay } = spec;
    let Some(buf) = buf else {
        for (param, grad) in param.iter_mut().zip(grad) {
            *param -= learning_rate * (grad * gradient_scale + weight_decay * *param);
        }
        return;
    };
    // Nesterov's step is a share of the gradient and of the buffer too.
    let (of_gradient, of_buffer) = if nesterov { (1.0, momentum) } else { (0.0, 1.0) };
    for ((param, grad), buf) in param.iter_mut().zip(grad).zip(buf) {
        let g = grad * gradient_scale + weight_decay * *param;
        *buf = momentum * *buf + g;
        *param -= learning_rate * (of_gradient * g + of_buffer * *buf);
    }
}

impl CpuBackend {
    fn sgd_elements<T: FloatElement>(&self, spec: &Spec, gradient_scale: f32, buffers: Buffers<'_>) -> Result<()> {
        let param = write::<T>("sgd", "param", buffers.param)?;
        let grad = read::<f32>(buffers.grad);
        let buf = buffers.buf.map(|buf| write::<f32>("sgd", "buf", buf)).transpose()?;
        let block = |param: &mut [T], grad: &[f32], buf: Option<&mut [f32]>| {
            update(param, &mut [0.0; BLOCK], |param| {
                vectorised(
                    #[inline(always)]
                    || apply(spec, gradient_scale, (param, grad), buf),
                )
            });
        };
        let Some(buf) = buf else {
            self.for_each_block(param, |start, param, []| {
                let len = param.len();
                block(param, &grad[start..start + len], None);
            });
            return Ok(());
        };
        let task = |param: &mut [T], grad: &[f32], buf: &mut [f32]| {
            let blocks = param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)).zip(buf.chunks_mut(BLOCK));
            blocks.for_each(|((param, grad), buf)| block(param, grad, Some(buf)));
        };
        let parts = param.chunks_mut(TASK).zip(grad.chunks(TASK)).zip(buf.chunks_mut(TASK));
        self.for_each_part(parts, |((param, grad), buf)| task(param, grad, buf));
        Ok(())
    }
}

impl Sgd for CpuBackend {
    fn sgd(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()> {
        let state = read::<f32>(state);
        if state[StepState::SKIP] != 0.0 {
            return Ok(());
        }
        let scale = state[StepState::GRADIENT_SCALE];
        dispatch_float!(buffers.param.dtype(), T => self.sgd_elements::<T>(spec, scale, buffers))
    }
}
