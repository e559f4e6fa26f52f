//! RMSNorm by rows, in parallel over groups of rows. The weight's gradient is summed within parts of the rows whose number
//! does not depend on the threads, then over the parts in order.

use rayon::prelude::*;
use unsloth_core::{
    Category, DType, FloatElement, Result, Tensor,
    ops::rms_norm::{Backward, Forward, RmsNorm, Spec},
};

use crate::{
    CpuBackend,
    access::{dispatch_float, output, read, write},
    elementwise::{Reused, fetch},
    simd::{self, TASK, buffer, produce, update, vectorised, widened},
};

/// Parts of the rows that the weight's gradient is summed in, at most.
const PARTS: usize = 64;
/// Rows of a part, at least: below it the sums over the parts would cost more than the rows.
const PART_ROWS: usize = 8;

impl CpuBackend {
    /// `weight + weight_offset` in f32.
    fn effective_weight(&self, spec: &Spec, weight: &Tensor) -> Result<crate::backend::Workspace> {
        let mut wide = self.workspace(spec.hidden_size)?;
        dispatch_float!(spec.weight_dtype, W => simd::widen(read::<W>(weight), &mut wide[..spec.hidden_size]));
        for weight in wide[..spec.hidden_size].iter_mut() {
            *weight += spec.weight_offset;
        }
        Ok(wide)
    }

    /// `x += residual`, or `x = source + residual`.
    fn add_residual<T: FloatElement>(&self, x: &mut Reused, residual: &Tensor) -> Result<()> {
        let residual = read::<T>(residual);
        let (sum, source) = x.slices::<T>("rms_norm")?;
        self.for_each_block(sum, |start, block, [wide, wide_residual]| {
            fetch(block, source, start);
            let residual = widened(&residual[start..start + block.len()], wide_residual);
            update(block, wide, |x| {
                vectorised(
                    #[inline(always)]
                    || x.iter_mut().zip(residual).for_each(|(x, r)| *x += r),
                )
            });
        });
        Ok(())
    }

    fn normalise<T: FloatElement>(&self, spec: &Spec, x: &[T], weight: &[f32], (out, rstd): (&mut [T], &mut [f32])) {
        let hidden_size = spec.hidden_size;
        let rows = (TASK / hidden_size).max(1);
        let task = |x: &[T], out: &mut [T], rstd: &mut [f32]| {
            let [mut wide, mut wide_out] = [(); 2].map(|()| buffer::<T>(hidden_size));
            for ((x, out), rstd) in x.chunks(hidden_size).zip(out.chunks_mut(hidden_size)).zip(rstd) {
                let x = widened(x, &mut wide);
                produce(out, &mut wide_out, |out| *rstd = normalise_row(x, weight, spec.eps, out));
            }
        };
        if spec.rows <= rows {
            return task(x, out, rstd);
        }
        let size = rows * hidden_size;
        let parts = (x.par_chunks(size), out.par_chunks_mut(size), rstd.par_chunks_mut(rows));
        self.run(|| parts.into_par_iter().for_each(|(x, out, rstd)| task(x, out, rstd)));
    }

    fn backward_rows<T: FloatElement>(
        &self,
        spec: &Spec,
        args: Arguments<'_, T>,
        dx: &mut [T],
        dweight: Option<&mut [f32]>,
    ) -> Result<()> {
        let hidden_size = spec.hidden_size;
        let rows = spec.rows.div_ceil(PARTS).max(PART_ROWS);
        let num_parts = spec.rows.div_ceil(rows);
        let mut partial = self.workspace(if dweight.is_some() { num_parts * hidden_size } else { 0 })?;
        // Without a gradient each part gets an empty slice.
        let width = if dweight.is_some() { hidden_size } else { 0 };
        let mut sums: Vec<&mut [f32]> = partial[..num_parts * width].chunks_mut(width.max(1)).collect();
        sums.resize_with(num_parts, Default::default);
        let task = |part: usize, dx: &mut [T], sums: &mut [f32]| {
            sums.fill(0.0);
            let mut buffers = [(); 3].map(|()| buffer::<T>(hidden_size));
            for (i, dx) in dx.chunks_mut(hidden_size).enumerate() {
                backward_row(spec, &args, (part * rows + i, dx), sums, &mut buffers);
            }
        };
        let size = rows * hidden_size;
        if spec.rows * hidden_size <= TASK {
            dx.chunks_mut(size).zip(&mut sums).enumerate().for_each(|(part, (dx, sums))| task(part, dx, sums));
        } else {
            let parts = (dx.par_chunks_mut(size), &mut sums).into_par_iter().enumerate();
            self.run(|| parts.for_each(|(part, (dx, sums))| task(part, dx, sums)));
        }
        if let Some(dweight) = dweight {
            let (total, others) = partial[..num_parts * hidden_size].split_at_mut(hidden_size);
            others.chunks(hidden_size).for_each(|part| simd::add_scaled(total, 1.0, part));
            simd::add_scaled(dweight, 1.0, total);
        }
        Ok(())
    }
}

/// Gives rstd.
fn normalise_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    vectorised(
        #[inline(always)]
        || {
            let rstd = 1.0 / (simd::sum_of_squares(x) / x.len() as f32 + eps).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * rstd * weight;
            }
            rstd
        },
    )
}

/// What the backward pass reads; `weight` with its offset.
struct Arguments<'a, T> {
    dout_source: Option<&'a [T]>,
    dsum: Option<&'a [T]>,
    sum: &'a [T],
    weight: &'a [f32],
    rstd: &'a [f32],
}

/// Replaces dout by dx, and adds to the gradient of the weight if `dweight` is not empty.
fn backward_row<T: FloatElement>(
    spec: &Spec,
    args: &Arguments<'_, T>,
    (row, dx): (usize, &mut [T]),
    dweight: &mut [f32],
    [wide, wide_sum, wide_dsum]: &mut [Vec<f32>; 3],
) {
    let start = row * spec.hidden_size;
    fetch(dx, args.dout_source, start);
    let (weight, rstd) = (args.weight, args.rstd[row]);
    let sum = widened(&args.sum[start..][..dx.len()], wide_sum);
    let dsum = args.dsum.map(|dsum| widened(&dsum[start..][..sum.len()], wide_dsum));
    update(dx, wide, |dx| {
        vectorised(
            #[inline(always)]
            || {
                // mean(g * xhat) * rstd, with xhat = sum * rstd
                let shrink = simd::dot3(dx, weight, sum) * rstd * rstd / dx.len() as f32;
                for ((dweight, dout), sum) in dweight.iter_mut().zip(&*dx).zip(sum) {
                    *dweight += dout * (sum * rstd);
                }
                for ((dx, sum), weight) in dx.iter_mut().zip(sum).zip(weight) {
                    *dx = rstd * (*dx * weight - sum * shrink);
                }
                if let Some(dsum) = dsum {
                    dx.iter_mut().zip(dsum).for_each(|(dx, dsum)| *dx += dsum);
                }
            },
        );
    });
}

impl RmsNorm for CpuBackend {
    fn rms_norm_forward(&self, spec: &Spec, x: Tensor, residual: Option<&Tensor>, weight: &Tensor) -> Result<Forward> {
        let mut out = output(&x, spec.dtype, [spec.rows, spec.hidden_size], Category::Activations)?;
        let mut rstd = output(&x, DType::F32, [spec.rows], Category::Activations)?;
        let weight = self.effective_weight(spec, weight)?;
        let (x, sum) = match residual {
            None => (Some(x), None),
            Some(residual) => {
                let mut sum = Reused::new(x)?;
                dispatch_float!(spec.dtype, T => self.add_residual::<T>(&mut sum, residual)?);
                (None, Some(sum.out))
            }
        };
        let statistics = write::<f32>("rms_norm", "rstd", &mut rstd)?;
        if spec.hidden_size == 0 {
            statistics.fill(1.0 / spec.eps.sqrt());
        } else if let Some(x) = x.as_ref().or(sum.as_ref()) {
            dispatch_float!(spec.dtype, T => {
                let outputs = (write::<T>("rms_norm", "out", &mut out)?, statistics);
                self.normalise::<T>(spec, read::<T>(x), &weight[..spec.hidden_size], outputs);
            });
        }
        Ok(Forward { out, sum, rstd })
    }

    fn rms_norm_backward(&self, spec: &Spec, inputs: Backward<'_>, dweight: Option<&mut Tensor>) -> Result<Tensor> {
        let Backward { dout, dsum, sum, weight, rstd } = inputs;
        let weight = self.effective_weight(spec, weight)?;
        let dweight = dweight.map(|dweight| write::<f32>("rms_norm", "dweight", dweight)).transpose()?;
        let mut dx = Reused::new(dout)?;
        if spec.rows == 0 || spec.hidden_size == 0 {
            return Ok(dx.out);
        }
        dispatch_float!(spec.dtype, T => {
            let (dx, dout_source) = dx.slices::<T>("rms_norm")?;
            let (dsum, sum) = (dsum.map(read::<T>), read::<T>(sum));
            let args = Arguments { dout_source, dsum, sum, weight: &weight[..spec.hidden_size], rstd: read::<f32>(rstd) };
            self.backward_rows(spec, args, dx, dweight)?;
        });
        Ok(dx.out)
    }
}

#[cfg(test)]
mod tests {
    use unsloth_core::{Category, Tensor, ops::rms_norm};

    use crate::simd::BLOCK;

    /// A long row, and more rows than one part holds, against plain f64 loops.
    #[test]
    fn long_rows_and_several_parts() {
        let device = crate::device();
        let (rows, hidden_size) = (67, 2 * BLOCK + 3);
        let values = |salt: usize, len: usize| -> Vec<f32> {
            (0..len).map(|i| ((i * 37 + salt) % 101) as f32 / 50.0 - 1.0).collect()
        };
        let (x, dout, weight) = (values(1, rows * hidden_size), values(5, rows * hidden_size), values(9, hidden_size));
        let tensor = |data: &[f32], shape: &[usize]| -> Tensor {
            device.from_slice(data, unsloth_core::Shape::try_from(shape).unwrap(), Category::Activations).unwrap()
        };
        let (xt, wt) = (tensor(&x, &[rows, hidden_size]), tensor(&weight, &[hidden_size]));
        let forward = rms_norm::forward(xt.clone(), None, &wt, 1e-5, 0.0).unwrap();
        let mut dweight = tensor(&vec![1.0; hidden_size], &[hidden_size]);
        let backward = rms_norm::Backward {
            dout: tensor(&dout, &[rows, hidden_size]),
            dsum: None,
            sum: &xt,
            weight: &wt,
            rstd: &forward.rstd,
        };
        let dx = rms_norm::backward(backward, Some(&mut dweight), 1e-5, 0.0).unwrap().to_vec::<f32>().unwrap();
        let (out, dweight) = (forward.out.to_vec::<f32>().unwrap(), dweight.to_vec::<f32>().unwrap());
        let mut exact_dweight = vec![1.0f64; hidden_size];
        for row in 0..rows {
            let at = |data: &[f32], i: usize| f64::from(data[row * hidden_size + i]);
            let mean_square = (0..hidden_size).map(|i| at(&x, i).powi(2)).sum::<f64>() / hidden_size as f64;
            let rstd = 1.0 / (mean_square + 1e-5).sqrt();
            let g = |i: usize| at(&dout, i) * f64::from(weight[i]);
            let mean = (0..hidden_size).map(|i| g(i) * at(&x, i) * rstd).sum::<f64>() / hidden_size as f64;
            for i in 0..hidden_size {
                let xhat = at(&x, i) * rstd;
                exact_dweight[i] += at(&dout, i) * xhat;
                assert!((at(&out, i) - xhat * f64::from(weight[i])).abs() < 1e-6);
                assert!((at(&dx, i) - rstd * (g(i) - xhat * mean)).abs() < 1e-6);
            }
        }
        for (actual, exact) in dweight.iter().zip(exact_dweight) {
            assert!((f64::from(*actual) - exact).abs() < 1e-4);
        }
    }
}
