//! Cross entropy over rows of logits, and the row arithmetic that linear cross entropy shares.

use rayon::prelude::*;
use unsloth_core::{
    Category, DType, Error, FloatElement, Result, Tensor,
    ops::cross_entropy::{CrossEntropy, Forward, IGNORE_INDEX, LossSpec, Spec},
};

use crate::{
    access::{dispatch_float, output, read, take_or_copy, write},
    backend::CpuBackend,
    linear::blocks,
    simd::{self, exp, tanh},
};

/// Lanes that a row is reduced in: fixed, so the result does not depend on the instruction set's width.
const LANES: usize = 16;
/// f32 elements of logits that are widened at a time: 4 MiB.
const CHUNK: usize = 1 << 20;

/// Loss of one row.
#[derive(Clone, Copy, Default)]
pub(crate) struct RowLoss {
    pub(crate) nll: f32,
    pub(crate) lse: f32,
}

/// # Errors
/// [`Error::InvalidSpec`] for a target that is neither a class nor [`IGNORE_INDEX`].
pub(crate) fn check_targets(op: &'static str, targets: &[i32], vocab_size: usize) -> Result<()> {
    let valid = |&target: &i32| target == IGNORE_INDEX || usize::try_from(target).is_ok_and(|t| t < vocab_size);
    match targets.iter().find(|target| !valid(target)) {
        None => Ok(()),
        Some(target) => Err(Error::InvalidSpec {
            op,
            field: "targets",
            value: target.to_string(),
            rule: "below the vocabulary size, or -100",
        }),
    }
}

/// Folds a row in [`LANES`] independent lanes, then the lanes in order.
#[inline(always)]
fn fold(row: &[f32], start: f32, lane: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = row.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (acc, &value) in lanes.iter_mut().zip(chunk) {
            *acc = lane(*acc, value);
        }
    }
    for (acc, &value) in lanes.iter_mut().zip(tail) {
        *acc = lane(*acc, value);
    }
    lanes.into_iter().reduce(join).unwrap_or(start)
}

/// Turns logits into `z` in place.
fn transform(row: &mut [f32], spec: &LossSpec) {
    pulp::Arch::new().dispatch(|| {
        if let Some(softcap) = spec.softcap {
            let inner = spec.logit_scale / softcap;
            row.iter_mut().for_each(|z| *z = softcap * tanh(*z * inner));
        } else if spec.logit_scale != 1.0 {
            row.iter_mut().for_each(|z| *z *= spec.logit_scale);
        }
    });
}

/// Turns logits into `z` in place; gives the loss of the row.
pub(crate) fn row_loss(row: &mut [f32], target: usize, spec: &LossSpec) -> RowLoss {
    transform(row, spec);
    pulp::Arch::new().dispatch(|| {
        // `a > b ? a : b` drops a NaN on one side; the sum below keeps it.
        let max = fold(row, f32::NEG_INFINITY, |a, z| if z > a { z } else { a }, f32::max);
        // All logits -inf, or NaN: subtracting the maximum would hide that.
        let max = if max.is_finite() { max } else { 0.0 };
        let sum = fold(row, 0.0, |a, z| a + exp(z - max), |a, b| a + b);
        let lse = max + sum.ln();
        let mut nll = lse - (1.0 - spec.label_smoothing) * row[target] + spec.z_loss * lse * lse;
        if spec.label_smoothing > 0.0 {
            nll -= spec.label_smoothing * fold(row, 0.0, |a, z| a + z, |a, b| a + b) / row.len() as f32;
        }
        RowLoss { nll, lse }
    })
}

/// Turns `z`, as [`row_loss`] left it, into the gradient of the logits in place.
pub(crate) fn row_gradient(row: &mut [f32], target: usize, lse: f32, spec: &LossSpec) {
    let factor = spec.loss_scale / spec.num_targets as f32;
    let probability = factor * (1.0 + 2.0 * spec.z_loss * lse);
    let smoothed = factor * spec.label_smoothing / row.len() as f32;
    let hit = factor * (1.0 - spec.label_smoothing);
    let at_target = row[target];
    pulp::Arch::new().dispatch(|| match spec.softcap {
        None => {
            let scale = spec.logit_scale;
            row.iter_mut().for_each(|z| *z = (exp(*z - lse) * probability - smoothed) * scale);
        }
        Some(softcap) => row.iter_mut().for_each(|z| {
            let capped = *z / softcap;
            let slope = spec.logit_scale * (1.0 - capped * capped);
            *z = (exp(*z - lse) * probability - smoothed) * slope;
        }),
    });
    let capped = spec.softcap.map_or(0.0, |softcap| at_target / softcap);
    row[target] -= hit * spec.logit_scale * (1.0 - capped * capped);
}

/// Sum in a fixed tree over blocks: the rounding error grows with the logarithm of the length.
pub(crate) fn pairwise_sum(values: &[f32]) -> f32 {
    if values.len() <= 32 {
        return values.iter().sum();
    }
    let (left, right) = values.split_at(values.len() / 2);
    pairwise_sum(left) + pairwise_sum(right)
}

/// The scalar loss tensor of the rows' losses.
pub(crate) fn mean_loss(like: &Tensor, nll: &[f32], num_targets: usize) -> Result<Tensor> {
    let mut loss = output(like, DType::F32, [1], Category::Activations)?;
    write::<f32>("cross_entropy", "loss", &mut loss)?[0] = pairwise_sum(nll) / num_targets as f32;
    Ok(loss)
}

impl CrossEntropy for CpuBackend {
    fn cross_entropy_forward(&self, spec: &Spec, logits: &Tensor, targets: &Tensor) -> Result<Forward> {
        let targets = read::<i32>(targets);
        check_targets("cross_entropy", targets, spec.vocab_size)?;
        let mut lse = output(logits, DType::F32, [spec.tokens], Category::Activations)?;
        let mut nll = self.workspace(spec.tokens)?;
        self.run(|| -> Result<()> {
            let lse = write::<f32>("cross_entropy", "lse", &mut lse)?;
            for chunk in blocks(spec.tokens, (CHUNK / spec.vocab_size).max(1)) {
                let elements = chunk.start * spec.vocab_size..chunk.end * spec.vocab_size;
                let mut scratch = self.workspace(elements.len())?;
                dispatch_float!(spec.dtype, T => {
                    let logits = read::<T>(logits)[elements].par_chunks(spec.vocab_size);
                    let rows = scratch.par_chunks_mut(spec.vocab_size).zip(logits).zip(&targets[chunk.clone()]);
                    let outputs = nll[chunk.clone()].par_iter_mut().zip(&mut lse[chunk]);
                    rows.zip(outputs).for_each(|(((row, logits), &target), (nll, lse))| {
                        let loss = match usize::try_from(target) {
                            Ok(target) => {
                                simd::widen(logits, row);
                                row_loss(row, target, &spec.loss)
                            }
                            Err(_) => RowLoss::default(),
                        };
                        (*nll, *lse) = (loss.nll, loss.lse);
                    });
                });
            }
            Ok(())
        })?;
        let loss = mean_loss(logits, &nll, spec.loss.num_targets)?;
        Ok(Forward { loss, lse })
    }

    fn cross_entropy_backward(&self, spec: &Spec, logits: Tensor, targets: &Tensor, lse: &Tensor) -> Result<Tensor> {
        let (targets, lse) = (read::<i32>(targets), read::<f32>(lse));
        check_targets("cross_entropy", targets, spec.vocab_size)?;
        let mut dlogits = take_or_copy(logits)?;
        let vocab = spec.vocab_size;
        self.run(|| -> Result<()> {
            dispatch_float!(spec.dtype, T => {
                let dlogits = write::<T>("cross_entropy", "dlogits", &mut dlogits)?;
                for chunk in blocks(spec.tokens, (CHUNK / vocab).max(1)) {
                    let part = &mut dlogits[chunk.start * vocab..chunk.end * vocab];
                    let mut scratch = self.workspace(part.len())?;
                    let rows = part.par_chunks_mut(vocab).zip(scratch.par_chunks_mut(vocab)).zip(&targets[chunk.clone()]);
                    rows.zip(&lse[chunk]).for_each(|(((dlogits, row), &target), &lse)| match usize::try_from(target) {
                        Ok(target) => {
                            simd::widen(dlogits, row);
                            transform(row, &spec.loss);
                            row_gradient(row, target, lse, &spec.loss);
                            simd::narrow(row, dlogits);
                        }
                        Err(_) => dlogits.fill(T::from_f32(0.0)),
                    });
                }
            });
            Ok(())
        })?;
        Ok(dlogits)
    }
}
