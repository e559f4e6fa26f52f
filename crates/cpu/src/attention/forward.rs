//! Forward pass: one task per sequence, head and block of queries; online softmax over tiles of keys.
//!
//! Tiles of scores are transposed, `[keys, queries]`: maxima and sums over keys are then taken for a vector of queries at once.

use std::ops::Range;

use unsloth_core::{FloatElement, Result, Tensor, ops::attention::Spec};

use super::{
    K_BLOCK, LANES, Q_BLOCK, Sequence, Visible, take,
    tile::{Head, Path, Product, bits, padded, stride},
};
use crate::{
    CpuBackend,
    access::{read, write},
    matmul::{Into, prefetch_all},
    parallel::Disjoint,
    simd::{self, Fused, vectorised_fused},
};

/// Queries whose softmax is taken at once where there are as many. One vector alone would wait for its own last maximum; the
/// sums of more would not stay in the registers of AVX2.
const MANY_LANES: usize = 4 * LANES;

struct Task {
    sequence: Sequence,
    head: usize,
    /// Queries, counted from the first of the sequence.
    queries: Range<usize>,
}

/// Running softmax of a block of queries.
pub(super) struct Block<'a> {
    /// Output, not divided by the sums before all keys have been visited: a tile of `[queries, head_dim]`.
    pub(super) out: &'a mut [f32],
    /// Largest score so far.
    pub(super) max: &'a mut [f32],
    /// Sum of `exp(score - max)` so far.
    pub(super) sum: &'a mut [f32],
    /// What the last tile multiplied earlier sums by.
    rescale: &'a mut [f32],
}

/// Scratch of a task.
pub(super) fn scratch_len(d: usize) -> usize {
    let (wide, width) = (stride(d), stride(Q_BLOCK));
    2 * Q_BLOCK * wide + d * width + 2 * K_BLOCK * wide + (K_BLOCK + K_BLOCK / 2) * width + 3 * Q_BLOCK
}

pub(super) fn run<T: FloatElement>(
    backend: &CpuBackend,
    spec: &Spec,
    (q, (k, v)): (&Tensor, (&Tensor, &Tensor)),
    sequences: &[Sequence],
    (out, lse): (&mut Tensor, Option<&mut Tensor>),
) -> Result<()> {
    let mut tasks = Vec::new();
    for &sequence in sequences {
        let seq_q = sequence.visible.seq_q;
        for head in 0..spec.num_heads {
            let blocks = (0..seq_q).step_by(Q_BLOCK).map(|start| start..seq_q.min(start + Q_BLOCK));
            tasks.extend(blocks.map(|queries| Task { sequence, head, queries }));
        }
    }
    let (d, path) = (spec.head_dim, Path::new::<T>(backend.isa(), spec.head_dim));
    let tokens_q = q.shape()[0];
    let (q, k, v) = (read::<T>(q), read::<T>(k), read::<T>(v));
    let out = Disjoint::new(write::<T>("attention", "out", out)?);
    let lse = lse.map(|lse| write::<f32>("attention", "lse", lse)).transpose()?.map(Disjoint::new);
    backend.for_each_task(&tasks, scratch_len(d), |task, scratch| {
        let Task { sequence, head, ref queries } = *task;
        let kv_head = head / (spec.num_heads / spec.num_kv_heads);
        let keys = |data| Head { data, num_heads: spec.num_kv_heads, head: kv_head, head_dim: d };
        let q = Head { data: q, num_heads: spec.num_heads, head, head_dim: d };
        let block = block((spec, path), sequence, queries, (q, keys(k), keys(v)), scratch);
        let first = sequence.first_q + queries.start;
        for (i, row) in block.out.chunks_exact(stride(d)).take(queries.len()).enumerate() {
            let start = ((first + i) * spec.num_heads + head) * d;
            #[allow(unsafe_code, reason = "tasks write interleaved rows of one tensor")]
            // SAFETY: a row is written by the one task with its sequence, head and block of queries.
            let to = unsafe { out.piece(start..start + d) };
            simd::narrow(&row[..d], to);
        }
        if let Some(lse) = &lse {
            let start = head * tokens_q + first;
            #[allow(unsafe_code, reason = "tasks write interleaved rows of one tensor")]
            // SAFETY: as above.
            let lse = unsafe { lse.piece(start..start + queries.len()) };
            for ((lse, max), sum) in lse.iter_mut().zip(&*block.max).zip(&*block.sum) {
                // A fully masked row has neither a maximum nor a sum: -inf, not NaN.
                *lse = if *sum == 0.0 { f32::NEG_INFINITY } else { max + sum.ln() };
            }
        }
    })
}

/// Asks for rows before they are read: those of one head lie apart, which no processor foresees.
fn ask<T: FloatElement>(head: Head<'_, T>, rows: Range<usize>) {
    rows.for_each(|token| prefetch_all(head.row(token)));
}

/// Output rows of a block of queries.
pub(super) fn block<'a, T: FloatElement>(
    (spec, path): (&Spec, Path),
    Sequence { first_q, first_k, visible }: Sequence,
    queries: &Range<usize>,
    (q_head, k_head, v_head): (Head<'_, T>, Head<'_, T>, Head<'_, T>),
    mut scratch: &'a mut [f32],
) -> Block<'a> {
    let (d, rows) = (spec.head_dim, queries.len());
    // Few queries make narrow tiles.
    let (wide, width) = (stride(d), stride(rows));
    let (q, q_transposed) = (take(&mut scratch, rows * wide), take(&mut scratch, d * width));
    let (k, v) = (take(&mut scratch, K_BLOCK * wide), take(&mut scratch, K_BLOCK * wide));
    let scores = take(&mut scratch, K_BLOCK * width);
    let pairs = take(&mut scratch, K_BLOCK / 2 * width);
    let mut block = Block::empty((rows, wide), &mut scratch);
    q_head.columns(path, (first_q + queries.start, rows), q, q_transposed);
    let mut tiles = visible.tiles(queries).peekable();
    while let Some(keys) = tiles.next() {
        let (cols, seen) = (keys.len(), (first_k + keys.start, keys.len()));
        if rows <= LANES {
            // There is little to do with what is read.
            ask(v_head, seen.0..seen.0 + cols);
        }
        let (size, alpha, a) = ((cols, padded(rows), path.depth(d)), spec.options.scale, k_head.left(path, seen, k));
        let b = (bits(q_transposed), width);
        Product { size, alpha, a, b, c: (scores, width), into: Into::Overwrite }.run(path);
        if let Some(next) = tiles.peek().filter(|_| rows <= LANES) {
            ask(k_head, first_k + next.start..first_k + next.end);
        }
        block.absorb(&visible, queries, &keys, (scores, spec.options.softcap));
        let (size, a) = ((rows, padded(d), path.depth(cols)), path.by_rows(scores, (cols, rows), pairs));
        let (_, b) = v_head.both(path, seen, v);
        Product { size, alpha: 1.0, a, b, c: (block.out, wide), into: Into::Add }.run(path);
    }
    block.divide(wide);
    block
}

impl<'a> Block<'a> {
    /// Of `rows` rows, `wide` elements apart, that have visited no key, in scratch.
    pub(super) fn empty((rows, wide): (usize, usize), scratch: &mut &'a mut [f32]) -> Self {
        let out = take(scratch, rows * wide);
        let mut statistics = || take(scratch, padded(rows));
        let block = Self { out, max: statistics(), sum: statistics(), rescale: statistics() };
        block.out.fill(0.0);
        block.max.fill(f32::NEG_INFINITY);
        block.sum.fill(0.0);
        block
    }

    /// Divides the output by the sums, when all keys have been visited.
    pub(super) fn divide(&mut self, wide: usize) {
        for (row, sum) in self.out.chunks_exact_mut(wide).zip(&*self.sum) {
            // A fully masked row is zeros already; NaN stays NaN.
            if *sum != 0.0 {
                simd::scale(row, 1.0 / sum);
            }
        }
    }

    /// Turns a tile of scores into probabilities relative to the new maxima, and rescales what was summed before.
    fn absorb(
        &mut self,
        visible: &Visible,
        queries: &Range<usize>,
        tile: &Range<usize>,
        (scores, softcap): (&mut [f32], Option<f32>),
    ) {
        let (width, rows) = (stride(queries.len()), queries.len());
        let scores = &mut scores[..tile.len() * width];
        let wide = self.out.len() / rows;
        vectorised_fused(
            #[inline(always)]
            |m| {
                if let Some(cap) = softcap {
                    for s in scores.iter_mut() {
                        *s = cap * simd::tanh(m, *s / cap);
                    }
                }
                visible.mask(queries, tile, scores, f32::NEG_INFINITY);
                // Not `for_each`: what is not inlined is not compiled for these instructions.
                let mut from = 0;
                while from < rows {
                    if padded(rows) - from >= MANY_LANES {
                        self.absorb_lanes::<MANY_LANES>(m, from, scores, width);
                        from += MANY_LANES;
                    } else {
                        self.absorb_lanes::<LANES>(m, from, scores, width);
                        from += LANES;
                    }
                }
                for (out, rescale) in self.out.chunks_exact_mut(wide).zip(&*self.rescale) {
                    if *rescale != 1.0 {
                        simd::scale(out, *rescale);
                    }
                }
            },
        );
    }

    /// [`Self::absorb`] for `N` queries.
    #[inline(always)]
    fn absorb_lanes<const N: usize>(&mut self, m: Fused, from: usize, scores: &mut [f32], width: usize) {
        let statistics = [&mut self.max, &mut self.sum, &mut self.rescale];
        let [Some(max), Some(total), Some(rescale)] = statistics.map(|all| all[from..].first_chunk_mut::<N>()) else {
            unreachable!("statistics are whole vectors");
        };
        let mut new_max = *max;
        for row in scores.chunks_exact(width) {
            let Some(row) = row[from..].first_chunk::<N>() else { unreachable!("rows are whole vectors") };
            for lane in 0..N {
                new_max[lane] = if row[lane] > new_max[lane] { row[lane] } else { new_max[lane] };
            }
        }
        let (mut shift, mut sum) = ([0.0; N], [0.0; N]);
        for lane in 0..N {
            // All scores may be -inf so far; subtracting that would give NaN.
            shift[lane] = if new_max[lane] == f32::NEG_INFINITY { 0.0 } else { new_max[lane] };
            rescale[lane] = simd::exp(m, max[lane] - shift[lane]);
        }
        *max = new_max;
        for row in scores.chunks_exact_mut(width) {
            let Some(row) = row[from..].first_chunk_mut::<N>() else { unreachable!("rows are whole vectors") };
            for lane in 0..N {
                row[lane] = simd::exp(m, row[lane] - shift[lane]);
                sum[lane] += row[lane];
            }
        }
        for lane in 0..N {
            total[lane] = total[lane] * rescale[lane] + sum[lane];
        }
    }
}
