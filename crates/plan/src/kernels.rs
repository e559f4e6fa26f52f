//! Scratch that CubeCL's kernels take within one call, in f32 elements: what is of a size that shows in a plan. Partial sums of
//! reductions, a few KiB, are left out.

use unsloth_core::{DType, ops};

/// Bytes of a chunk of logits, at least and at most, and which part of a device's memory they are in between.
const LOGITS: (u64, u64, u64) = (64 << 20, 512 << 20, 128);
/// Elements that rows of an adapted layer are widened to at a time.
const WIDENED: usize = 8 << 20;
/// Rows of a chunk are a multiple of this.
const ROWS: usize = 128;
/// Partial sums of a matrix, parts of its rows that they are made of, both at most, and rows of a part, at least.
const COLUMN_PARTS: (usize, usize, usize) = (1 << 20, 4096, 4);

/// Rows of `width` elements that are at work at a time.
fn chunk_rows(elements: usize, width: usize, rows: usize) -> usize {
    (elements / width.max(1) / ROWS * ROWS).max(ROWS).min(rows)
}

/// Partial sums of a gradient that is summed over rows, if it is wanted: as `unsloth_common::column_parts` has them.
pub(crate) fn column_sums([rows, columns]: [usize; 2], is_wanted: bool) -> usize {
    let (max_sums, max_parts, part_rows) = COLUMN_PARTS;
    let most = (max_sums / columns.max(1)).clamp(1, max_parts);
    if is_wanted { rows.div_ceil(part_rows).clamp(1, most) * columns } else { 0 }
}

/// Rows in f32, of the input without what is dropped or of a result before it is rounded.
pub(crate) fn lora(spec: &ops::lora_linear::Spec) -> usize {
    let len = |columns| chunk_rows(WIDENED, columns, spec.base.rows) * columns;
    let needed = spec.dropout.is_some() || spec.base.dtype != DType::F32;
    if needed { len(spec.base.in_features).max(len(spec.base.out_features)) } else { 0 }
}

/// Losses and log-sum-exps of the rows, a chunk of logits, and its gradient where that is rounded.
pub(crate) fn loss(
    spec: &ops::linear_cross_entropy::Spec,
    with_dweight: bool,
    memory_bytes: Option<u64>,
) -> [usize; 4] {
    let (least, most, share) = LOGITS;
    let bytes = memory_bytes.map_or(least, |bytes| (bytes / share).clamp(least, most));
    let chunk = chunk_rows(bytes as usize / size_of::<f32>(), spec.vocab_size, spec.tokens) * spec.vocab_size;
    let rounds = spec.dtype != DType::F32 && (spec.weight_dtype == spec.dtype || spec.weight_dtype == DType::F32);
    let is_rounded = rounds && (spec.needs_dx || with_dweight);
    [spec.tokens, spec.tokens, chunk, if is_rounded { chunk.div_ceil(2) } else { 0 }]
}

#[cfg(test)]
mod tests {
    use super::column_sums;

    /// The numbers of the test beside `column_parts`, which this crate does not see.
    #[test]
    fn column_sums_by_hand() {
        assert_eq!(column_sums([8192, 2048], false), 0);
        for (rows, columns, parts) in [
            (0, 2048, 1),
            (1, 2048, 1),
            (5, 2048, 2),
            (8192, 2048, 512),
            (8192, 4096, 256),
            (262_144, 128, 4096),
            (9, 1 << 21, 1),
        ] {
            assert_eq!(column_sums([rows, columns], true), parts * columns, "[{rows}, {columns}]");
        }
    }
}
