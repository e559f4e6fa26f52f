//! Cross entropy over rows of logits, and the row arithmetic that linear cross entropy shares.

use half::bf16;
use unsloth_core::{
    Category, DType, Error, FloatElement, Result, Tensor,
    ops::cross_entropy::{CrossEntropy, Forward, IGNORE_INDEX, LossSpec, Spec},
};

use crate::{
    access::{dispatch_float, output, read, take_or_copy, write},
    backend::CpuBackend,
    simd::{self, BLOCK, Fused, exp, tanh, vectorised_fused},
};

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

/// Turns logits into `z` in place.
#[inline(always)]
fn transform(m: Fused, z: &mut [f32], spec: &LossSpec) {
    if let Some(softcap) = spec.softcap {
        let inner = spec.logit_scale / softcap;
        for z in z {
            *z = softcap * tanh(m, *z * inner);
        }
    } else if spec.logit_scale != 1.0 {
        simd::scale(z, spec.logit_scale);
    }
}

/// What a row's loss is made of, over the blocks seen so far.
struct Statistics {
    max: f32,
    /// Subtracted before the exponential: the maximum where that is a number.
    shift: f32,
    /// Of `exp(z - shift)`.
    sum: f32,
    /// Of `z`, where labels are smoothed.
    total: f32,
}

impl Statistics {
    #[inline(always)]
    fn absorb(&mut self, m: Fused, z: &[f32], smoothed: bool) {
        let max = simd::max(z);
        if max > self.max {
            // All logits -inf, or NaN: subtracting the maximum would hide that.
            let shift = if max.is_finite() { max } else { 0.0 };
            // Before the first maximum nothing was added up, and the factor may be infinite.
            if self.max > f32::NEG_INFINITY {
                self.sum *= exp(m, self.shift - shift);
            }
            (self.max, self.shift) = (max, shift);
        }
        self.sum += simd::sum_of_exp(m, z, self.shift);
        if smoothed {
            self.total += simd::sum(z);
        }
    }
}

/// Loss of a row of logits, which is read once.
pub(crate) fn row_loss<T: FloatElement>(row: &[T], target: usize, spec: &LossSpec) -> RowLoss {
    let mut statistics = Statistics { max: f32::NEG_INFINITY, shift: 0.0, sum: 0.0, total: 0.0 };
    let (mut buffer, mut transformed) = ([0.0; BLOCK], [0.0; BLOCK]);
    let changes = spec.softcap.is_some() || spec.logit_scale != 1.0;
    for block in row.chunks(BLOCK) {
        let logits = simd::widened(block, &mut buffer);
        vectorised_fused(
            #[inline(always)]
            |m| {
                let z: &[f32] = if changes {
                    let z = &mut transformed[..logits.len()];
                    z.copy_from_slice(logits);
                    transform(m, z, spec);
                    z
                } else {
                    logits
                };
                statistics.absorb(m, z, spec.label_smoothing > 0.0);
            },
        );
    }
    let mut at_target = [row[target].to_f32()];
    vectorised_fused(|m| transform(m, &mut at_target, spec));
    let lse = statistics.shift + statistics.sum.ln();
    let mut nll = lse - (1.0 - spec.label_smoothing) * at_target[0] + spec.z_loss * lse * lse;
    if spec.label_smoothing > 0.0 {
        nll -= spec.label_smoothing * statistics.total / row.len() as f32;
    }
    RowLoss { nll, lse }
}

/// The gradient of a row of logits.
struct RowGradient<'a> {
    spec: &'a LossSpec,
    target: usize,
    lse: f32,
    /// Factor of a probability.
    probability: f32,
    /// Share of each label where labels are smoothed.
    smoothed: f32,
    /// What is left for the target.
    hit: f32,
}

impl<'a> RowGradient<'a> {
    fn new(spec: &'a LossSpec, vocab_size: usize, target: usize, lse: f32) -> Self {
        let factor = spec.loss_scale / spec.num_targets as f32;
        let probability = factor * (1.0 + 2.0 * spec.z_loss * lse);
        let smoothed = factor * spec.label_smoothing / vocab_size as f32;
        let hit = factor * (1.0 - spec.label_smoothing);
        Self { spec, target, lse, probability, smoothed, hit }
    }

    /// Turns logits `start ..` into their gradient in place.
    fn block(&self, start: usize, logits: &mut [f32]) {
        let Self { spec, target, lse, probability, smoothed, hit } = *self;
        let target = target.checked_sub(start).filter(|target| *target < logits.len());
        vectorised_fused(
            #[inline(always)]
            |m| {
                transform(m, logits, spec);
                let at_target = target.map(|target| logits[target]);
                let scale = spec.logit_scale;
                match spec.softcap {
                    None => {
                        for z in logits.iter_mut() {
                            *z = (exp(m, *z - lse) * probability - smoothed) * scale;
                        }
                    }
                    Some(softcap) => {
                        for z in logits.iter_mut() {
                            let capped = *z / softcap;
                            *z = (exp(m, *z - lse) * probability - smoothed) * (scale * (1.0 - capped * capped));
                        }
                    }
                }
                if let Some((target, z)) = target.zip(at_target) {
                    let capped = spec.softcap.map_or(0.0, |softcap| z / softcap);
                    logits[target] -= hit * scale * (1.0 - capped * capped);
                }
            },
        );
    }
}

/// Turns a row of logits into its gradient in place.
pub(crate) fn row_gradient<T: FloatElement>(row: &mut [T], target: usize, lse: f32, spec: &LossSpec) {
    let gradient = RowGradient::new(spec, row.len(), target, lse);
    let mut buffer = [0.0; BLOCK];
    for (i, block) in row.chunks_mut(BLOCK).enumerate() {
        simd::update(block, &mut buffer, |logits| gradient.block(i * BLOCK, logits));
    }
}

/// [`row_gradient`], rounded to bf16; it takes the first half of the row.
pub(crate) fn row_gradient_in_bf16(row: &mut [f32], target: usize, lse: f32, spec: &LossSpec) {
    let gradient = RowGradient::new(spec, row.len(), target, lse);
    let mut buffer = [0.0; BLOCK];
    for start in (0..row.len()).step_by(BLOCK) {
        let block = &mut buffer[..BLOCK.min(row.len() - start)];
        block.copy_from_slice(&row[start..start + block.len()]);
        gradient.block(start, block);
        // Half as wide, so only logits that have been read are overwritten.
        simd::narrow(block, &mut bytemuck::cast_slice_mut::<f32, bf16>(row)[start..start + block.len()]);
    }
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
        let outputs = nll[..spec.tokens].iter_mut().zip(write::<f32>("cross_entropy", "lse", &mut lse)?);
        dispatch_float!(spec.dtype, T => {
            let rows = read::<T>(logits).chunks(spec.vocab_size).zip(targets);
            self.for_each_part(rows.zip(outputs), |((logits, &target), (nll, lse))| {
                let loss = match usize::try_from(target) {
                    Ok(target) => row_loss(logits, target, &spec.loss),
                    Err(_) => RowLoss::default(),
                };
                (*nll, *lse) = (loss.nll, loss.lse);
            });
        });
        let loss = mean_loss(logits, &nll, spec.loss.num_targets)?;
        Ok(Forward { loss, lse })
    }

    fn cross_entropy_backward(&self, spec: &Spec, logits: Tensor, targets: &Tensor, lse: &Tensor) -> Result<Tensor> {
        let (targets, lse) = (read::<i32>(targets), read::<f32>(lse));
        check_targets("cross_entropy", targets, spec.vocab_size)?;
        let mut dlogits = take_or_copy(logits)?;
        dispatch_float!(spec.dtype, T => {
            let rows = write::<T>("cross_entropy", "dlogits", &mut dlogits)?.chunks_mut(spec.vocab_size);
            self.for_each_part(rows.zip(targets).zip(lse), |((row, &target), &lse)| match usize::try_from(target) {
                Ok(target) => row_gradient(row, target, lse, &spec.loss),
                Err(_) => row.fill(T::from_f32(0.0)),
            });
        });
        Ok(dlogits)
    }
}
