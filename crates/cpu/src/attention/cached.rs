//! Generation: few queries against many cached keys, which are read where they lie.

use unsloth_core::{Element, FloatElement, KvView, Lengths, Result, Sequences, Tensor, ops::attention::Spec};

use super::{K_BLOCK, Sequence, Visible, forward, take, tile::Head};
use crate::{
    CpuBackend,
    access::{read, write},
    parallel::Disjoint,
    simd::{self, vectorised},
};

/// Up to this many queries of a sequence, scores are dot products by rows; tiles would be mostly empty.
const MAX_ROW_QUERIES: usize = 4;

struct Task {
    sequence: Sequence,
    head: usize,
}

pub(super) fn run<T: FloatElement>(
    backend: &CpuBackend,
    spec: &Spec,
    (q, seq_q, kv): (&Tensor, &Sequences, KvView<'_>),
    out: &mut Tensor,
) -> Result<()> {
    let capacity = kv.k.shape()[1];
    let sequence = |(s, (pair, &seq_k)): (usize, (&[usize], &usize))| Sequence {
        first_q: pair[0],
        first_k: s * capacity,
        visible: Visible::new(&spec.options, pair[1] - pair[0], seq_k),
    };
    let sequences = seq_q.offsets().windows(2).zip(kv.lens.host()).enumerate().map(sequence);
    // Decided by each sequence for itself, so that its bits do not depend on its neighbours.
    let (rows, tiles): (Vec<Sequence>, Vec<Sequence>) =
        sequences.partition(|sequence| sequence.visible.seq_q <= MAX_ROW_QUERIES);
    forward::run::<T>(backend, spec, (q, (kv.k, kv.v)), &tiles, (out, None))?;
    let heads = |&sequence| (0..spec.num_heads).map(move |head| Task { sequence, head });
    let tasks: Vec<Task> = rows.iter().flat_map(heads).collect();
    let d = spec.head_dim;
    let (q, k, v) = (read::<T>(q), read::<T>(kv.k), read::<T>(kv.v));
    let out = Disjoint::new(write::<T>("attention", "out", out)?);
    backend.for_each_task(&tasks, 3 * d + K_BLOCK, |&Task { sequence, head }, scratch| {
        let kv_head = head / (spec.num_heads / spec.num_kv_heads);
        let keys = |data| Head { data, num_heads: spec.num_kv_heads, head: kv_head, head_dim: d };
        let q = Head { data: q, num_heads: spec.num_heads, head, head_dim: d };
        for i in 0..sequence.visible.seq_q {
            let row = row(spec, sequence, i, (q, keys(k), keys(v)), scratch);
            let start = ((sequence.first_q + i) * spec.num_heads + head) * d;
            #[allow(unsafe_code, reason = "tasks write interleaved rows of one tensor")]
            // SAFETY: a row is written by the one task with its sequence and head.
            let to = unsafe { out.piece(start..start + d) };
            simd::narrow(row, to);
        }
    })
}

/// Output of query `i`: online softmax over blocks of keys.
fn row<'a, T: FloatElement>(
    spec: &Spec,
    Sequence { first_q, first_k, visible }: Sequence,
    i: usize,
    (q_head, k_head, v_head): (Head<'_, T>, Head<'_, T>, Head<'_, T>),
    mut scratch: &'a mut [f32],
) -> &'a mut [f32] {
    let d = spec.head_dim;
    let (q, wide, out) = (take(&mut scratch, d), take(&mut scratch, d), take(&mut scratch, d));
    let scores = take(&mut scratch, K_BLOCK);
    simd::widen(q_head.row(first_q + i), q);
    out.fill(0.0);
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
    let keys = visible.keys(i);
    vectorised(
        #[inline(always)]
        || {
            for start in keys.clone().step_by(K_BLOCK) {
                let scores = &mut scores[..K_BLOCK.min(keys.end - start)];
                for (j, score) in scores.iter_mut().enumerate() {
                    let key = simd::widened(k_head.row(first_k + start + j), wide);
                    *score = spec.options.scale * simd::dot(q, key);
                }
                if let Some(cap) = spec.options.softcap {
                    scores.iter_mut().for_each(|s| *s = cap * simd::tanh(*s / cap));
                }
                let new_max = simd::max(scores).max(max);
                // All scores may be -inf so far; subtracting that would give NaN.
                let shift = if new_max == f32::NEG_INFINITY { 0.0 } else { new_max };
                let rescale = simd::exp(max - shift);
                sum = sum * rescale + simd::exp_and_sum(scores, shift);
                max = new_max;
                simd::scale(out, rescale);
                for (j, p) in scores.iter().enumerate() {
                    simd::add_scaled(out, *p, simd::widened(v_head.row(first_k + start + j), wide));
                }
            }
            if sum != 0.0 {
                simd::scale(out, 1.0 / sum);
            }
        },
    );
    out
}

pub(super) fn append<T: Element>(cache: &mut Tensor, rows: &Tensor, seqs: &Sequences, start: &Lengths) -> Result<()> {
    let (capacity, row) = (cache.shape()[1], cache.shape()[2] * cache.shape()[3]);
    let (cache, rows) = (write::<T>("kv_append", "cache", cache)?, read::<T>(rows));
    for (s, (pair, start)) in seqs.offsets().windows(2).zip(start.host()).enumerate() {
        let from = &rows[pair[0] * row..pair[1] * row];
        cache[(s * capacity + start) * row..][..from.len()].copy_from_slice(from);
    }
    Ok(())
}
