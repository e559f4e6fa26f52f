//! Generation: few queries against many cached keys, which are read where they lie.

use std::ops::Range;

use unsloth_core::{Element, FloatElement, KvView, Lengths, Result, Sequences, Tensor, ops::attention::Spec};

use super::{
    K_BLOCK, Q_BLOCK, Sequence, Visible,
    factor::{Head, Path},
    forward::{self, Block, Unit},
    rows::{self, Heads},
    tile::stride,
};
use crate::{
    CpuBackend,
    access::{read, write},
    parallel::Disjoint,
    simd::{self, vectorised_fused},
};

/// Up to this many queries of a sequence, each takes the query heads of a key head together; tiles of one head would be mostly
/// empty.
const MAX_ROW_QUERIES: usize = 4;
/// Keys of a task. Where a sequence is cut depends on nothing else.
const KEYS: usize = 4 * K_BLOCK;

/// Query heads of one query, all of one task for the same keys.
struct Rows {
    /// The query, counted over all sequences.
    token: usize,
    heads: Range<usize>,
    /// Its tasks, in the order of their keys.
    tasks: Range<usize>,
}

struct Task {
    token: usize,
    heads: Range<usize>,
    /// Rows of the cache.
    keys: Range<usize>,
    /// Where its results are put.
    start: usize,
}

/// f32 elements of what is known about a row after some keys: its output, largest score and sum.
fn partial_len(d: usize) -> usize {
    d + 2
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
    run_rows::<T>(backend, spec, (q, kv), &rows, out)
}

/// Sequences of few queries.
fn run_rows<T: FloatElement>(
    backend: &CpuBackend,
    spec: &Spec,
    (q, kv): (&Tensor, KvView<'_>),
    sequences: &[Sequence],
    out: &mut Tensor,
) -> Result<()> {
    let d = spec.head_dim;
    let parts = |sequence: &Sequence| sequence.visible.seq_q * sequence.visible.seq_k.div_ceil(KEYS).max(1);
    let parts: usize = sequences.iter().map(parts).sum();
    let (rows, tasks) = cut(&head_ranges(spec, parts, backend.num_threads()), spec.head_dim, sequences);
    let mut partials = backend.workspace(parts * spec.num_heads * partial_len(d))?;
    let results = Disjoint::new(&mut partials);
    let (q, k, v) = (read::<T>(q), read::<T>(kv.k), read::<T>(kv.v));
    // One by what is cut, not by what is seen: a plan knows no masks.
    let num_threads = if parts * spec.num_kv_heads < 2 { 1 } else { backend.num_threads() };
    backend.for_each_task_on(num_threads, &tasks, forward::scratch_len(d, 1), |task, scratch| {
        let Task { token, heads, keys, start } = task;
        // Heads of one query lie as rows of one head do: one after another.
        let q = Head { data: q, num_heads: 1, head: 0, head_dim: d };
        let (first_q, group) = (token * spec.num_heads + heads.start, spec.num_heads / spec.num_kv_heads);
        let head = |data| Head { data, num_heads: spec.num_kv_heads, head: heads.start / group, head_dim: d };
        #[allow(unsafe_code, reason = "tasks write pieces of one buffer")]
        // SAFETY: `cut` gives each task a range of its own.
        let to = unsafe { results.piece(*start..start + heads.len() * partial_len(d)) };
        let mut keep = |block: Block<'_>| {
            let found = block.out.chunks_exact(stride(d)).zip(&*block.max).zip(&*block.sum);
            for (to, ((out, max), sum)) in to.chunks_exact_mut(partial_len(d)).zip(found) {
                to[..d].copy_from_slice(&out[..d]);
                (to[d], to[d + 1]) = (*max, *sum);
            }
        };
        if group <= rows::MAX_GROUP {
            let [k, v] = [k, v].map(|data| Heads { first: head(data), count: heads.len() / group });
            keep(rows::block((spec, backend.isa()), (q, first_q), (k, v), keys, scratch));
        } else {
            let visible = Visible { seq_q: heads.len(), seq_k: keys.len(), causal: false, left: None };
            let sequence = Sequence { first_q, first_k: keys.start, visible };
            let path = Path::new::<T>(backend.isa(), d, heads.len());
            let unit = Unit { head: 0, queries: 0..heads.len() };
            forward::visit((spec, path), sequence, &[unit], (q, head(k), head(v)), scratch, |_, block| keep(block));
        }
    })?;
    let out = write::<T>("attention", "out", out)?;
    for Rows { token, heads, tasks: own } in rows {
        let own = &tasks[own];
        for (i, head) in heads.enumerate() {
            let start = |task: &Task| task.start + i * partial_len(d);
            merge(&mut partials, own.iter().map(start), d);
            let to = &mut out[(token * spec.num_heads + head) * d..][..d];
            simd::narrow(&partials[start(&own[0])..][..d], to);
        }
    }
    Ok(())
}

/// Query heads of a task: those of several key heads as far as there are tasks for all threads.
fn head_ranges(spec: &Spec, parts: usize, num_threads: usize) -> Vec<Range<usize>> {
    let group = (spec.num_heads / spec.num_kv_heads.max(1)).max(1);
    if group <= rows::MAX_GROUP {
        let heads = (spec.num_kv_heads * parts / (2 * num_threads)).clamp(1, rows::MAX_ROWS / group) * group;
        return (0..spec.num_heads).step_by(heads).map(|head| head..spec.num_heads.min(head + heads)).collect();
    }
    let of_one = |head: usize| (head..head + group).step_by(Q_BLOCK).map(move |first| (first, head + group));
    let ranges = (0..spec.num_heads).step_by(group).flat_map(of_one);
    ranges.map(|(first, end)| first..end.min(first + Q_BLOCK)).collect()
}

/// All rows, and their tasks. A row that sees no keys has a task too, which finds that out.
fn cut(heads: &[Range<usize>], head_dim: usize, sequences: &[Sequence]) -> (Vec<Rows>, Vec<Task>) {
    let (mut all, mut tasks, mut start) = (Vec::new(), Vec::<Task>::new(), 0);
    for Sequence { first_q, first_k, visible } in sequences {
        for (query, heads) in (0..visible.seq_q).flat_map(|i| heads.iter().map(move |heads| (i, heads))) {
            let (token, seen, first_task) = (first_q + query, visible.keys(query), tasks.len());
            let mut task = |keys: Range<usize>| {
                let keys = first_k + keys.start..first_k + keys.end;
                tasks.push(Task { token, heads: heads.clone(), keys, start });
                start += heads.len() * partial_len(head_dim);
            };
            if seen.is_empty() {
                task(0..0);
            }
            for part in (seen.start / KEYS..).map(|part| part * KEYS).take_while(|part| *part < seen.end) {
                task(seen.start.max(part)..seen.end.min(part + KEYS));
            }
            all.push(Rows { token, heads: heads.clone(), tasks: first_task..tasks.len() });
        }
    }
    (all, tasks)
}

/// Puts what is known of one row after each of several ranges of keys together, at the first of `starts`.
fn merge(partials: &mut [f32], starts: impl Iterator<Item = usize> + Clone, d: usize) {
    let max = starts.clone().map(|start| partials[start + d]).fold(f32::NEG_INFINITY, f32::max);
    // All scores may be -inf; subtracting that would give NaN.
    let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let weight = |partial: &[f32]| partial[d + 1] * vectorised_fused(|m| simd::exp(m, partial[d] - shift));
    let total: f32 = starts.clone().map(|start| weight(&partials[start..])).sum();
    // Nothing is seen: the output is 0 already. NaN stays NaN.
    if total == 0.0 {
        return;
    }
    let mut first = None;
    for start in starts {
        let share = weight(&partials[start..]) / total;
        match first {
            None => {
                simd::scale(&mut partials[start..start + d], share);
                first = Some(start);
            }
            Some(first) => {
                let (before, own) = partials.split_at_mut(start);
                simd::add_scaled(&mut before[first..first + d], share, &own[..d]);
            }
        }
    }
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
