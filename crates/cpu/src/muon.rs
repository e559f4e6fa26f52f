//! Muon beside its matrix products: momentum and the size of a direction in one pass, its scale in another.

use unsloth_core::{
    Category, DType, FloatElement, Result, Tensor,
    ops::{
        adamw::StepState,
        muon::{Muon, Spec},
    },
};

use crate::{
    CpuBackend,
    access::{dispatch_float, output, read, write},
    simd::{self, BLOCK, TASK, update, vectorised},
};

const OP: &str = "muon";

impl CpuBackend {
    /// Writes a direction before it is scaled, and returns the sums of its squares by tasks.
    fn momentum(
        &self,
        spec: &Spec,
        gradient_scale: f32,
        grad: &[f32],
        (buf, out): (&mut [f32], &mut [f32]),
    ) -> Vec<f64> {
        let &Spec { momentum, nesterov, .. } = spec;
        let rest = 1.0 - momentum;
        // Nesterov's direction is a share of the gradient and of the buffer.
        let (of_gradient, of_buffer) = if nesterov { (rest, momentum) } else { (0.0, 1.0) };
        let block = |grad: &[f32], buf: &mut [f32], out: &mut [f32]| {
            vectorised(
                #[inline(always)]
                || {
                    for ((grad, buf), out) in grad.iter().zip(buf).zip(&mut *out) {
                        let g = grad * gradient_scale;
                        *buf = momentum * *buf + rest * g;
                        *out = of_gradient * g + of_buffer * *buf;
                    }
                    f64::from(simd::sum_of_squares(out))
                },
            )
        };
        let task = |((grad, buf), out): ((&[f32], &mut [f32]), &mut [f32])| {
            let blocks = grad.chunks(BLOCK).zip(buf.chunks_mut(BLOCK)).zip(out.chunks_mut(BLOCK));
            blocks.map(|((grad, buf), out)| block(grad, buf, out)).sum::<f64>()
        };
        let tasks = grad.chunks(TASK).zip(buf.chunks_mut(TASK)).zip(out.chunks_mut(TASK));
        self.map_parts(tasks, task)
    }

    fn muon_elements<T: FloatElement>(&self, (kept, size): (f32, f32), param: &mut [T], direction: &[f32]) {
        self.for_each_block(param, |start, param, [buffer]| {
            let direction = &direction[start..start + param.len()];
            update(param, buffer, |param| {
                vectorised(
                    #[inline(always)]
                    || param.iter_mut().zip(direction).for_each(|(param, u)| *param = *param * kept - size * u),
                )
            });
        });
    }
}

impl Muon for CpuBackend {
    fn muon_direction(&self, spec: &Spec, grad: &Tensor, buf: &mut Tensor, state: &Tensor) -> Result<Tensor> {
        let state = read::<f32>(state);
        let mut direction = output(grad, DType::F32, *grad.shape(), Category::Activations)?;
        let out = write::<f32>(OP, "direction", &mut direction)?;
        let buf = write::<f32>(OP, "buf", buf)?;
        if state[StepState::SKIP] != 0.0 {
            out.fill(0.0);
            return Ok(direction);
        }
        let sums = self.momentum(spec, state[StepState::GRADIENT_SCALE], read::<f32>(grad), (buf, out));
        let norm = sums.into_iter().sum::<f64>().sqrt() as f32;
        let scale = 1.0 / norm.max(spec.eps);
        self.for_each_block(out, |_, out, []| simd::scale(out, scale));
        Ok(direction)
    }

    fn muon_apply(&self, spec: &Spec, param: &mut Tensor, direction: &Tensor, state: &Tensor) -> Result<()> {
        if read::<f32>(state)[StepState::SKIP] != 0.0 {
            return Ok(());
        }
        let [rate, adjustment, decay] = [spec.learning_rate, spec.adjustment, spec.weight_decay].map(f64::from);
        let factors = ((1.0 - rate * decay) as f32, (rate * adjustment) as f32);
        let direction = read::<f32>(direction);
        dispatch_float!(param.dtype(), T => {
            self.muon_elements(factors, write::<T>(OP, "param", param)?, direction);
        });
        Ok(())
    }
}
