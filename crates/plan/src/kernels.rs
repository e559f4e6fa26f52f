//! Scratch that CubeCL's kernels take within one call, in f32 elements: what is of a size that shows in a plan. Partial sums of
//! reductions, a few KiB, are left out.

use unsloth_core::{DType, ops};

/// Elements of a chunk of logits.
const LOGITS: usize = 16 << 20;
/// Elements that rows of an adapted layer are widened to at a time.
const WIDENED: usize = 8 << 20;
/// Rows of a chunk are a multiple of this.
const ROWS: usize = 128;
/// Parts of the rows that a norm's weight gradient is summed in, at most, and rows of a part.
const NORM_PARTS: (usize, usize) = (64, 16);

/// Rows of `width` elements that are at work at a time.
fn chunk_rows(elements: usize, width: usize, rows: usize) -> usize {
    (elements / width.max(1) / ROWS * ROWS).max(ROWS).min(rows)
}

/// Partial sums of a norm's weight gradient.
pub(crate) fn rms_norm_backward(spec: &ops::rms_norm::Spec, with_dweight: bool) -> usize {
    let (max_parts, rows) = NORM_PARTS;
    if with_dweight { spec.rows.div_ceil(rows).clamp(1, max_parts) * spec.hidden_size } else { 0 }
}

/// Rows in f32, of the input without what is dropped or of a result before it is rounded.
pub(crate) fn lora(spec: &ops::lora_linear::Spec) -> usize {
    let widest = spec.base.in_features.max(spec.base.out_features);
    let needed = spec.dropout.is_some() || spec.base.dtype != DType::F32;
    if needed { chunk_rows(WIDENED, widest, spec.base.rows) * widest } else { 0 }
}

/// Losses and log-sum-exps of the rows, and a chunk of logits.
pub(crate) fn loss(spec: &ops::linear_cross_entropy::Spec) -> [usize; 3] {
    let vocab = spec.vocab_size;
    [spec.tokens, spec.tokens, chunk_rows(LOGITS, vocab, spec.tokens) * vocab]
}
