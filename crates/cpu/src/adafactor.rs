//! Adafactor in three passes over the gradient: averages, the size of the change, the change. Parts of a pass have a fixed size, and
//! their sums are added in their order.

use unsloth_core::{
    FloatElement, Result, Tensor,
    ops::{
        adafactor::{Adafactor, Averages, Buffers, Spec},
        adamw::StepState,
    },
};

use crate::{
    CpuBackend,
    access::{dispatch_float, read, write},
    simd::{self, TASK, update, vectorised},
};

/// Parts of a matrix at most, each with sums of its own over its columns.
const MAX_PARTS: usize = 16;
/// Elements that are changed at once.
const PIECE: usize = 256;

const OP: &str = "adafactor";

/// What is the same for every element of a step.
#[derive(Clone, Copy)]
struct Factors {
    gradient_scale: f32,
    /// Of the new square in an average.
    share: f32,
    eps: f32,
}

impl Factors {
    fn new(spec: &Spec, state: &[f32]) -> Self {
        let steps = f64::from(state[StepState::STEPS]);
        let share = steps.powf(f64::from(spec.decay_rate)) as f32;
        Self { gradient_scale: state[StepState::GRADIENT_SCALE], share, eps: spec.eps }
    }

    #[inline(always)]
    fn square(self, grad: f32) -> f32 {
        let g = grad * self.gradient_scale;
        g * g + self.eps
    }

    #[inline(always)]
    fn average(self, old: f32, new: f32) -> f32 {
        (1.0 - self.share) * old + self.share * new
    }
}

/// Of at most [`PIECE`] elements.
fn sum_of_squares(piece: &[f32]) -> f64 {
    f64::from(vectorised(
        #[inline(always)]
        || simd::sum_of_squares(piece),
    ))
}

/// Root mean square from the sums of parts, in their order.
fn rms(sums: Vec<f64>, len: usize) -> f32 {
    (sums.into_iter().sum::<f64>() / len as f64).sqrt() as f32
}

/// Changes before they are scaled: of a matrix with the averages of its rows and columns and the mean of the former, or of
/// anything else.
enum Changes<'a> {
    Factored { row: &'a [f32], col: &'a [f32], mean: f32 },
    Whole(&'a [f32]),
}

impl Changes<'_> {
    /// Those of the elements from `start` on.
    fn write(&self, (grad, gradient_scale): (&[f32], f32), start: usize, out: &mut [f32]) {
        match *self {
            Changes::Whole(v) => {
                let v = &v[start..start + out.len()];
                let elements = out.iter_mut().zip(&grad[start..]).zip(v);
                vectorised(
                    #[inline(always)]
                    || elements.for_each(|((out, grad), v)| *out = grad * gradient_scale / v.sqrt()),
                );
            }
            Changes::Factored { row, col, mean } => {
                let (mut start, mut out) = (start, out);
                while !out.is_empty() {
                    let (i, j) = (start / col.len(), start % col.len());
                    let (piece, others) = out.split_at_mut(out.len().min(col.len() - j));
                    // Each root by itself: the product of two small averages would be below the normal numbers.
                    let of_row = (row[i] / mean).sqrt();
                    let elements = piece.iter_mut().zip(&grad[start..]).zip(&col[j..]);
                    vectorised(
                        #[inline(always)]
                        || elements.for_each(|((out, grad), col)| *out = grad * gradient_scale / of_row / col.sqrt()),
                    );
                    (start, out) = (start + piece.len(), others);
                }
            }
        }
    }
}

impl CpuBackend {
    /// Brings the averages of rows and columns up to date, and returns the mean of the rows'.
    fn factored_averages(&self, factors: Factors, grad: &[f32], (row, col): (&mut [f32], &mut [f32])) -> Result<f32> {
        let (rows, columns) = (row.len(), col.len());
        let part = rows.div_ceil(MAX_PARTS);
        let num_parts = rows.div_ceil(part);
        let mut sums = self.workspace(num_parts * columns)?;
        let sums = &mut sums[..num_parts * columns];
        let task = |((grad, row), sums): ((&[f32], &mut [f32]), &mut [f32])| {
            sums.fill(0.0);
            for (grad, row) in grad.chunks(columns).zip(row) {
                let mut total = 0.0f64;
                for (grad, sum) in grad.iter().zip(&mut *sums) {
                    let square = factors.square(*grad);
                    total += f64::from(square);
                    *sum += square;
                }
                *row = factors.average(*row, (total / columns as f64) as f32);
            }
        };
        let parts = grad.chunks(part * columns).zip(row.chunks_mut(part));
        self.for_each_part(parts.zip(sums.chunks_mut(columns)), task);
        for (j, col) in col.iter_mut().enumerate() {
            let total: f64 = sums.chunks(columns).map(|sums| f64::from(sums[j])).sum();
            *col = factors.average(*col, (total / rows as f64) as f32);
        }
        Ok((row.iter().map(|row| f64::from(*row)).sum::<f64>() / rows as f64) as f32)
    }

    /// Squares of what `write(start, piece)` puts into pieces of `len` elements, added up by tasks.
    fn squares(&self, len: usize, write: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f64> {
        let task = |start: usize| {
            let end = len.min(start + TASK);
            let mut buffer = [0.0; PIECE];
            let mut total = 0.0f64;
            for start in (start..end).step_by(PIECE) {
                let piece = &mut buffer[..PIECE.min(end - start)];
                write(start, piece);
                total += sum_of_squares(piece);
            }
            total
        };
        self.map_parts((0..len).step_by(TASK), task)
    }

    fn change<T: FloatElement>(
        &self,
        spec: &Spec,
        param: &mut [T],
        (changes, grad): (&Changes<'_>, (&[f32], f32)),
    ) -> Result<()> {
        let &Spec { learning_rate, clip_threshold, parameter_scale, weight_decay, .. } = spec;
        let len = param.len();
        let rms_of_changes = rms(self.squares(len, |start, out| changes.write(grad, start, out)), len);
        let alpha = parameter_scale.map_or(learning_rate, |least| {
            let task = |part: &[T]| -> f64 {
                let mut buffer = [0.0; PIECE];
                part.chunks(PIECE).map(|piece| sum_of_squares(simd::widened(piece, &mut buffer))).sum()
            };
            let sums = self.map_parts(param.chunks(TASK), task);
            learning_rate * rms(sums, len).max(least)
        });
        let size = alpha / (rms_of_changes / clip_threshold).max(1.0);
        let kept = (1.0 - f64::from(learning_rate) * f64::from(weight_decay)) as f32;
        let task = |(i, part): (usize, &mut [T])| {
            for (j, piece) in part.chunks_mut(PIECE).enumerate() {
                let mut buffer = [0.0; PIECE];
                let u = &mut buffer[..piece.len()];
                changes.write(grad, i * TASK + j * PIECE, u);
                update(piece, &mut [0.0; PIECE], |param| {
                    vectorised(
                        #[inline(always)]
                        || param.iter_mut().zip(&*u).for_each(|(param, u)| *param = *param * kept - size * u),
                    );
                });
            }
        };
        self.for_each_part(param.chunks_mut(TASK).enumerate(), task);
        Ok(())
    }

    fn adafactor_elements<T: FloatElement>(&self, spec: &Spec, factors: Factors, buffers: Buffers<'_>) -> Result<()> {
        let grad = read::<f32>(buffers.grad);
        let param = write::<T>(OP, "param", buffers.param)?;
        let scaled = (grad, factors.gradient_scale);
        match buffers.averages {
            Averages::Whole(v) => {
                let v = write::<f32>(OP, "v", v)?;
                for (v, grad) in v.iter_mut().zip(grad) {
                    *v = factors.average(*v, factors.square(*grad));
                }
                self.change(spec, param, (&Changes::Whole(v), scaled))
            }
            Averages::Factored { row, col } => {
                let (row, col) = (write::<f32>(OP, "row", row)?, write::<f32>(OP, "col", col)?);
                let mean = self.factored_averages(factors, grad, (row, col))?;
                self.change(spec, param, (&Changes::Factored { row, col, mean }, scaled))
            }
        }
    }
}

impl Adafactor for CpuBackend {
    fn adafactor(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()> {
        let state = read::<f32>(state);
        if state[StepState::SKIP] != 0.0 || buffers.grad.num_elements() == 0 {
            return Ok(());
        }
        let factors = Factors::new(spec, state);
        dispatch_float!(buffers.param.dtype(), T => self.adafactor_elements::<T>(spec, factors, buffers))
    }
}
