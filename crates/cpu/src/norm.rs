//! What RMSNorm and LayerNorm have in common: rows divided by their size, after their mean is taken from them where they are
//! centred, in parallel over groups of rows. Gradients of parameters are summed within parts of the rows whose number does not
//! depend on the threads, then over the parts in order.

use unsloth_core::{FloatElement, Result, Tensor};

use crate::{
    CpuBackend,
    access::{dispatch_float, read},
    backend::Workspace,
    elementwise::{Reused, fetch},
    simd::{self, TASK, buffer, produce, update, vectorised, widened},
};

/// Parts of the rows that gradients of parameters are summed in, at most.
const PARTS: usize = 64;
/// Rows of a part, at least: below it the sums over the parts would cost more than the rows.
const PART_ROWS: usize = 8;

/// One normalisation of rows that are not empty.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    pub(crate) rows: usize,
    pub(crate) hidden_size: usize,
    pub(crate) eps: f32,
    /// With its offset.
    pub(crate) weight: &'a [f32],
    pub(crate) bias: Option<&'a [f32]>,
}

/// What the backward pass reads; `mean` is empty where rows are not centred.
pub(crate) struct Arguments<'a, T> {
    pub(crate) dout_source: Option<&'a [T]>,
    pub(crate) dsum: Option<&'a [T]>,
    pub(crate) sum: &'a [T],
    pub(crate) mean: &'a [f32],
    pub(crate) rstd: &'a [f32],
}

/// Gradients that are wanted, added to.
#[derive(Default)]
pub(crate) struct ParameterGradients<'a> {
    pub(crate) dweight: Option<&'a mut [f32]>,
    pub(crate) dbias: Option<&'a mut [f32]>,
}

impl CpuBackend {
    /// One value per channel in f32, `offset` added.
    pub(crate) fn channels(&self, values: &Tensor, offset: f32) -> Result<Workspace> {
        let len = values.num_elements();
        let mut wide = self.workspace(len)?;
        dispatch_float!(values.dtype(), W => simd::widen(read::<W>(values), &mut wide[..len]));
        wide[..len].iter_mut().for_each(|value| *value += offset);
        Ok(wide)
    }

    /// `x += residual`, or `x = source + residual`.
    pub(crate) fn add_residual<T: FloatElement>(
        &self,
        op: &'static str,
        x: &mut Reused,
        residual: &Tensor,
    ) -> Result<()> {
        let residual = read::<T>(residual);
        let (sum, source) = x.slices::<T>(op)?;
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

    /// Writes `out` and `rstd`, and `mean` where rows are centred; otherwise that is empty.
    pub(crate) fn normalise<T: FloatElement, const CENTRED: bool>(
        &self,
        norm: Norm<'_>,
        x: &[T],
        out: &mut [T],
        (mean, rstd): (&mut [f32], &mut [f32]),
    ) {
        let hidden_size = norm.hidden_size;
        let rows = (TASK / hidden_size).max(1);
        let task = |x: &[T], out: &mut [T], mean: &mut [f32], rstd: &mut [f32]| {
            let [mut wide, mut wide_out] = [(); 2].map(|()| buffer::<T>(hidden_size));
            for (i, (x, out)) in x.chunks(hidden_size).zip(out.chunks_mut(hidden_size)).enumerate() {
                let x = widened(x, &mut wide);
                produce(out, &mut wide_out, |out| {
                    let of_row = normalise_row::<CENTRED>(&norm, x, out);
                    rstd[i] = of_row.rstd;
                    if CENTRED {
                        mean[i] = of_row.mean;
                    }
                });
            }
        };
        if norm.rows <= rows {
            return task(x, out, mean, rstd);
        }
        let size = rows * hidden_size;
        // Without means each task gets an empty slice.
        let mut means: Vec<&mut [f32]> = mean.chunks_mut(rows).collect();
        means.resize_with(norm.rows.div_ceil(rows), Default::default);
        let parts = x.chunks(size).zip(out.chunks_mut(size)).zip(means.into_iter().zip(rstd.chunks_mut(rows)));
        self.for_each_part(parts, |((x, out), (mean, rstd))| task(x, out, mean, rstd));
    }

    /// Replaces `dout`, or what is to be copied there first, by `dx`.
    pub(crate) fn backward_rows<T: FloatElement, const CENTRED: bool>(
        &self,
        norm: Norm<'_>,
        args: Arguments<'_, T>,
        dx: &mut [T],
        gradients: ParameterGradients<'_>,
    ) -> Result<()> {
        let hidden_size = norm.hidden_size;
        let rows = norm.rows.div_ceil(PARTS).max(PART_ROWS);
        let num_parts = norm.rows.div_ceil(rows);
        let ParameterGradients { dweight, dbias } = gradients;
        let of_weight = if dweight.is_some() { hidden_size } else { 0 };
        let width = of_weight + if dbias.is_some() { hidden_size } else { 0 };
        let mut partial = self.workspace(num_parts * width)?;
        // Without a gradient each part gets an empty slice.
        let mut sums: Vec<&mut [f32]> = partial[..num_parts * width].chunks_mut(width.max(1)).collect();
        sums.resize_with(num_parts, Default::default);
        let task = |part: usize, dx: &mut [T], sums: &mut [f32]| {
            sums.fill(0.0);
            let mut buffers = [(); 3].map(|()| buffer::<T>(hidden_size));
            for (i, dx) in dx.chunks_mut(hidden_size).enumerate() {
                let sums = sums.split_at_mut(of_weight);
                backward_row::<T, CENTRED>(&norm, &args, (part * rows + i, dx), sums, &mut buffers);
            }
        };
        let size = rows * hidden_size;
        if norm.rows * hidden_size <= TASK {
            dx.chunks_mut(size).zip(&mut sums).enumerate().for_each(|(part, (dx, sums))| task(part, dx, sums));
        } else {
            let parts = dx.chunks_mut(size).zip(&mut sums).enumerate();
            self.for_each_part(parts, |(part, (dx, sums))| task(part, dx, sums));
        }
        if width > 0 {
            let (total, others) = partial[..num_parts * width].split_at_mut(width);
            others.chunks(width).for_each(|part| simd::add_scaled(total, 1.0, part));
            let (of_weight, of_bias) = total.split_at(of_weight);
            for (gradient, total) in [(dweight, of_weight), (dbias, of_bias)] {
                if let Some(gradient) = gradient {
                    simd::add_scaled(gradient, 1.0, total);
                }
            }
        }
        Ok(())
    }
}

struct OfRow {
    mean: f32,
    rstd: f32,
}

fn normalise_row<const CENTRED: bool>(norm: &Norm<'_>, x: &[f32], out: &mut [f32]) -> OfRow {
    vectorised(
        #[inline(always)]
        || {
            let len = x.len() as f32;
            // A constant 0 costs nothing where rows are not centred.
            let mean = if CENTRED { simd::sum(x) / len } else { 0.0 };
            let rstd = 1.0 / (simd::sum_of_squares_about(x, mean) / len + norm.eps).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(norm.weight) {
                *out = (x - mean) * rstd * weight;
            }
            if let Some(bias) = norm.bias {
                out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
            }
            OfRow { mean, rstd }
        },
    )
}

/// Replaces dout by dx, and adds to the sums of the gradients of weight and bias that are not empty.
fn backward_row<T: FloatElement, const CENTRED: bool>(
    norm: &Norm<'_>,
    args: &Arguments<'_, T>,
    (row, dx): (usize, &mut [T]),
    (dweight, dbias): (&mut [f32], &mut [f32]),
    [wide, wide_sum, wide_dsum]: &mut [Vec<f32>; 3],
) {
    let start = row * norm.hidden_size;
    fetch(dx, args.dout_source, start);
    let (weight, rstd) = (norm.weight, args.rstd[row]);
    let mean = if CENTRED { args.mean[row] } else { 0.0 };
    let sum = widened(&args.sum[start..][..dx.len()], wide_sum);
    let dsum = args.dsum.map(|dsum| widened(&dsum[start..][..sum.len()], wide_dsum));
    update(dx, wide, |dx| {
        vectorised(
            #[inline(always)]
            || {
                let len = dx.len() as f32;
                // mean(g * xhat) * rstd, with xhat = (sum - mean) * rstd; and mean(g)
                let shrink = simd::dot3_about(dx, weight, sum, mean) * rstd * rstd / len;
                let mean_gradient = if CENTRED { simd::dot(dx, weight) / len } else { 0.0 };
                for ((dweight, dout), sum) in dweight.iter_mut().zip(&*dx).zip(sum) {
                    *dweight += dout * ((sum - mean) * rstd);
                }
                dbias.iter_mut().zip(&*dx).for_each(|(dbias, dout)| *dbias += dout);
                for ((dx, sum), weight) in dx.iter_mut().zip(sum).zip(weight) {
                    *dx = rstd * (*dx * weight - mean_gradient - (sum - mean) * shrink);
                }
                if let Some(dsum) = dsum {
                    dx.iter_mut().zip(dsum).for_each(|(dx, dsum)| *dx += dsum);
                }
            },
        );
    });
}
