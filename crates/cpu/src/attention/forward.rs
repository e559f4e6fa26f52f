//! Forward pass: one task per sequence, head and block of queries; online softmax over tiles of keys.

use std::ops::Range;

use unsloth_core::{FloatElement, Result, Tensor, ops::attention::Spec};

use super::{Head, K_BLOCK, Q_BLOCK, Sequence, Visible, parallel::Disjoint, take};
use crate::{
    CpuBackend,
    access::{read, write},
    gemm::{Into, Mat, MatMut, Threads, matmul},
    simd::{self, vectorised},
};

struct Task {
    sequence: Sequence,
    head: usize,
    /// Queries, counted from the first of the sequence.
    queries: Range<usize>,
}

/// Running softmax of a block of queries.
struct Block<'a> {
    /// Unnormalised output, `[queries, head_dim]`.
    out: &'a mut [f32],
    /// Largest score so far.
    max: &'a mut [f32],
    /// Sum of `exp(score - max)` so far.
    sum: &'a mut [f32],
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
    let d = spec.head_dim;
    let tokens_q = q.shape()[0];
    let (q, k, v) = (read::<T>(q), read::<T>(k), read::<T>(v));
    let out = Disjoint::new(write::<T>("attention", "out", out)?);
    let lse = lse.map(|lse| write::<f32>("attention", "lse", lse)).transpose()?.map(Disjoint::new);
    let scratch = 2 * Q_BLOCK * d + 2 * K_BLOCK * d + Q_BLOCK * K_BLOCK + 2 * Q_BLOCK;
    backend.for_each_task(&tasks, scratch, |task, scratch| {
        let Task { sequence, head, ref queries } = *task;
        let kv_head = head / (spec.num_heads / spec.num_kv_heads);
        let keys = |data| Head { data, num_heads: spec.num_kv_heads, head: kv_head, head_dim: d };
        let q = Head { data: q, num_heads: spec.num_heads, head, head_dim: d };
        let block = block(spec, sequence, queries, (q, keys(k), keys(v)), scratch);
        let first = sequence.first_q + queries.start;
        for (i, row) in block.out.chunks_exact(d).enumerate() {
            let start = ((first + i) * spec.num_heads + head) * d;
            #[allow(unsafe_code, reason = "tasks write interleaved rows of one tensor")]
            // SAFETY: a row is written by the one task with its sequence, head and block of queries.
            let to = unsafe { out.piece(start..start + d) };
            simd::narrow(row, to);
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

/// Output rows of a block of queries.
fn block<'a, T: FloatElement>(
    spec: &Spec,
    Sequence { first_q, first_k, visible }: Sequence,
    queries: &Range<usize>,
    (q_head, k_head, v_head): (Head<'_, T>, Head<'_, T>, Head<'_, T>),
    mut scratch: &'a mut [f32],
) -> Block<'a> {
    let (d, rows) = (spec.head_dim, queries.len());
    let q = take(&mut scratch, rows * d);
    let (k, v) = (take(&mut scratch, K_BLOCK * d), take(&mut scratch, K_BLOCK * d));
    let scores = take(&mut scratch, rows * K_BLOCK);
    let mut block =
        Block { out: take(&mut scratch, rows * d), max: take(&mut scratch, rows), sum: take(&mut scratch, rows) };
    block.out.fill(0.0);
    block.max.fill(f32::NEG_INFINITY);
    block.sum.fill(0.0);
    q_head.load(first_q + queries.start, q);
    for keys in visible.tiles(queries) {
        let cols = keys.len();
        let (k, v) = (&mut k[..cols * d], &mut v[..cols * d]);
        k_head.load(first_k + keys.start, k);
        v_head.load(first_k + keys.start, v);
        let (q, k, v) = (Mat::new(q, rows, d, d), Mat::new(k, cols, d, d), Mat::new(v, cols, d, d));
        let into = MatMut::new(scores, rows, cols, K_BLOCK);
        matmul(Threads::One, spec.options.scale, q, k.t(), into, Into::Overwrite);
        block.absorb(&visible, queries, &keys, (scores, spec.options.softcap));
        let probabilities = Mat::new(scores, rows, cols, K_BLOCK);
        matmul(Threads::One, 1.0, probabilities, v, MatMut::new(block.out, rows, d, d), Into::Add);
    }
    for (row, sum) in block.out.chunks_exact_mut(d).zip(&*block.sum) {
        // A fully masked row is zeros already; NaN stays NaN.
        if *sum != 0.0 {
            let inverse = 1.0 / sum;
            row.iter_mut().for_each(|out| *out *= inverse);
        }
    }
    block
}

impl Block<'_> {
    /// Turns a tile of scores into probabilities relative to the new maxima, and rescales what was summed before.
    fn absorb(
        &mut self,
        visible: &Visible,
        queries: &Range<usize>,
        tile: &Range<usize>,
        (scores, softcap): (&mut [f32], Option<f32>),
    ) {
        let d = self.out.len() / self.max.len();
        vectorised(
            #[inline(always)]
            || {
                let rows = scores.chunks_exact_mut(K_BLOCK).zip(self.out.chunks_exact_mut(d));
                let statistics = self.max.iter_mut().zip(self.sum.iter_mut());
                for (i, ((scores, out), (max, sum))) in rows.zip(statistics).enumerate() {
                    let keys = visible.keys(queries.start + i);
                    let from = keys.start.clamp(tile.start, tile.end) - tile.start;
                    let to = keys.end.clamp(tile.start, tile.end) - tile.start;
                    scores[..from].fill(0.0);
                    scores[to..tile.len()].fill(0.0);
                    let seen = &mut scores[from..to];
                    if seen.is_empty() {
                        continue;
                    }
                    if let Some(cap) = softcap {
                        seen.iter_mut().for_each(|s| *s = cap * simd::tanh(*s / cap));
                    }
                    let new_max = simd::max(seen).max(*max);
                    // All scores may be -inf so far; subtracting that would give NaN.
                    let shift = if new_max == f32::NEG_INFINITY { 0.0 } else { new_max };
                    let rescale = simd::exp(*max - shift);
                    *sum = *sum * rescale + simd::exp_and_sum(seen, shift);
                    *max = new_max;
                    if rescale != 1.0 {
                        simd::scale(out, rescale);
                    }
                }
            },
        );
    }
}
