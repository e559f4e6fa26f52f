//! Trained lengths of the rows of an adapted matrix.

use unsloth_core::{
    Category, DType, FloatElement, Result, Tensor, Weight,
    ops::dora::{Dora, Lengths, NormSpec, Spec},
};

use crate::{
    CpuBackend,
    access::{dispatch_float, output, read, take_or_copy, write},
    linear::dense,
};

/// Columns of a row that are put together at once, on the stack.
const BLOCK: usize = 256;
/// Partial sums of a row, which the compiler keeps in vectors.
const LANES: usize = 16;
/// Rows of one partial sum; the boundaries do not depend on the number of threads.
const SUM_BLOCK: usize = 64;

/// Length of `row + sum_r factors[r] * a[r]`.
fn row_norm<W: FloatElement>(row: &[W], a: &[f32], b: &[f32], scale: f32) -> f32 {
    let (width, mut lanes) = (row.len(), [0.0f32; LANES]);
    for start in (0..width).step_by(BLOCK) {
        let end = width.min(start + BLOCK);
        let mut values = [0.0f32; BLOCK];
        let values = &mut values[..end - start];
        values.iter_mut().zip(&row[start..end]).for_each(|(value, element)| *value = element.to_f32());
        for (factor, a) in b.iter().zip(a.chunks_exact(width)) {
            let factor = scale * factor;
            values.iter_mut().zip(&a[start..end]).for_each(|(value, a)| *value += factor * a);
        }
        for values in values.chunks(LANES) {
            lanes.iter_mut().zip(values).for_each(|(lane, value)| *lane += value * value);
        }
    }
    lanes.iter().sum::<f32>().sqrt()
}

impl CpuBackend {
    /// `sums[j] += sum_rows(dy * t)[j] / norms[j]`
    fn add_magnitudes<T: FloatElement>(&self, dy: &[T], t: &[T], norms: &[f32], sums: &mut [f32]) {
        let width = norms.len().max(1);
        let blocks = dy.chunks(width * SUM_BLOCK).zip(t.chunks(width * SUM_BLOCK));
        let partials = self.map_parts(blocks, |(dy, t)| {
            let mut sums = vec![0.0f32; norms.len()];
            for (dy, t) in dy.chunks_exact(width).zip(t.chunks_exact(width)) {
                sums.iter_mut().zip(dy.iter().zip(t)).for_each(|(sum, (dy, t))| *sum += dy.to_f32() * t.to_f32());
            }
            sums
        });
        for partial in partials {
            sums.iter_mut().zip(partial.iter().zip(norms)).for_each(|(sum, (partial, norm))| *sum += partial / norm);
        }
    }

    /// `magnitude / norm`, and the bias beside it, widened; zeros without one.
    fn factors(&self, lengths: Lengths<'_>, bias: Option<&Tensor>) -> Result<crate::backend::Workspace> {
        let (magnitude, norms) = (read::<f32>(lengths.magnitude), read::<f32>(lengths.norms));
        let mut factors = self.workspace(2 * norms.len())?;
        let (quotients, shifts) = factors.split_at_mut(norms.len());
        quotients.iter_mut().zip(magnitude.iter().zip(norms)).for_each(|(c, (m, n))| *c = m / n);
        shifts.fill(0.0);
        if let Some(bias) = bias {
            dispatch_float!(bias.dtype(), B => {
                shifts.iter_mut().zip(read::<B>(bias)).for_each(|(shift, bias)| *shift = bias.to_f32());
            });
        }
        Ok(factors)
    }
}

impl Dora for CpuBackend {
    fn dora_norms(&self, spec: &NormSpec, weight: &Weight, lora_a: &Tensor, lora_b: &Tensor) -> Result<Tensor> {
        let weight = dense("dora", weight)?;
        let mut norms = output(weight, DType::F32, [spec.out_features], Category::Activations)?;
        let (a, b) = (read::<f32>(lora_a), read::<f32>(lora_b));
        let target = write::<f32>("dora", "norms", &mut norms)?;
        let width = spec.in_features;
        dispatch_float!(weight.dtype(), W => {
            let rows = read::<W>(weight);
            self.for_each_part(target.iter_mut().zip(b.chunks(spec.rank)).enumerate(), |(j, (norm, b))| {
                *norm = row_norm(&rows[j * width..(j + 1) * width], a, b, spec.scale);
            });
        });
        Ok(norms)
    }

    fn dora_forward(&self, spec: &Spec, t: &Tensor, lengths: Lengths<'_>, bias: Option<&Tensor>) -> Result<Tensor> {
        let mut y = output(t, spec.dtype, [spec.rows, spec.out_features], Category::Activations)?;
        let factors = self.factors(lengths, bias)?;
        let (quotients, shifts) = factors.split_at(spec.out_features);
        let width = spec.out_features.max(1);
        dispatch_float!(spec.dtype, T => {
            let target = write::<T>("dora", "y", &mut y)?;
            self.for_each_part(target.chunks_mut(width).zip(read::<T>(t).chunks(width)), |(y, t)| {
                let factors = quotients.iter().zip(&*shifts);
                y.iter_mut().zip(t).zip(factors).for_each(|((y, t), (c, b))| *y = T::from_f32(c * t.to_f32() + b));
            });
        });
        Ok(y)
    }

    fn dora_backward(
        &self,
        spec: &Spec,
        dy: Tensor,
        t: &Tensor,
        lengths: Lengths<'_>,
        dmagnitude: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        if let Some(dmagnitude) = dmagnitude {
            let sums = write::<f32>("dora", "dmagnitude", dmagnitude)?;
            let norms = read::<f32>(lengths.norms);
            dispatch_float!(spec.dtype, T => self.add_magnitudes::<T>(read(&dy), read(t), norms, sums));
        }
        let mut dt = take_or_copy(dy)?;
        let factors = self.factors(lengths, None)?;
        let quotients = &factors[..spec.out_features];
        let width = spec.out_features.max(1);
        dispatch_float!(spec.dtype, T => {
            let target = write::<T>("dora", "dt", &mut dt)?;
            self.for_each_part(target.chunks_mut(width), |row| {
                row.iter_mut().zip(quotients).for_each(|(value, c)| *value = T::from_f32(c * value.to_f32()));
            });
        });
        Ok(dt)
    }
}
