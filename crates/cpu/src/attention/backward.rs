//! Backward pass: one task per sequence and key head. It owns the rows of dq, dk and dv of its group of query heads, so nothing
//! is shared and every sum has a fixed order.

use std::ops::Range;

use unsloth_core::{
    FloatElement, Result,
    ops::attention::{Backward, Gradients, Inputs, Spec},
};

use super::{Head, K_BLOCK, Q_BLOCK, Sequence, Visible, packed, parallel::Disjoint, take};
use crate::{
    CpuBackend,
    access::{read, write},
    gemm::{Into, Mat, MatMut, Threads, matmul},
    simd::{self, vectorised},
};

struct Task {
    sequence: Sequence,
    kv_head: usize,
}

/// Inputs as slices; heads are picked per task.
struct Arguments<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    out: &'a [T],
    dout: &'a [T],
    lse: &'a [f32],
    tokens_q: usize,
}

/// Scratch of a task.
struct Scratch<'a> {
    q: &'a mut [f32],
    dout: &'a mut [f32],
    dq: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    /// Scores, then probabilities.
    p: &'a mut [f32],
    /// Gradient of the probabilities, then of the scores.
    ds: &'a mut [f32],
    /// `sum_channels(dout * out)` of each query.
    projection: &'a mut [f32],
    /// `[seq_k, head_dim]`
    dk: &'a mut [f32],
    /// `[seq_k, head_dim]`
    dv: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn len(d: usize, seq_k: usize) -> usize {
        3 * Q_BLOCK * d + 2 * K_BLOCK * d + 2 * Q_BLOCK * K_BLOCK + Q_BLOCK + 2 * seq_k * d
    }

    fn new(mut slab: &'a mut [f32], d: usize, seq_k: usize) -> Self {
        let slab = &mut slab;
        Self {
            q: take(slab, Q_BLOCK * d),
            dout: take(slab, Q_BLOCK * d),
            dq: take(slab, Q_BLOCK * d),
            k: take(slab, K_BLOCK * d),
            v: take(slab, K_BLOCK * d),
            p: take(slab, Q_BLOCK * K_BLOCK),
            ds: take(slab, Q_BLOCK * K_BLOCK),
            projection: take(slab, Q_BLOCK),
            dk: take(slab, seq_k * d),
            dv: take(slab, seq_k * d),
        }
    }
}

pub(super) fn run<T: FloatElement>(
    backend: &CpuBackend,
    spec: &Spec,
    inputs: Inputs<'_>,
    saved: Backward<'_>,
    gradients: &mut Gradients,
) -> Result<()> {
    let args = Arguments {
        q: read::<T>(inputs.q),
        k: read::<T>(inputs.k),
        v: read::<T>(inputs.v),
        out: read::<T>(saved.out),
        dout: read::<T>(saved.dout),
        lse: read::<f32>(saved.lse),
        tokens_q: inputs.q.shape()[0],
    };
    let dq = Disjoint::new(write::<T>("attention", "dq", &mut gradients.dq)?);
    let dk = Disjoint::new(write::<T>("attention", "dk", &mut gradients.dk)?);
    let dv = Disjoint::new(write::<T>("attention", "dv", &mut gradients.dv)?);
    let sequences = packed(&spec.options, inputs.seq_q, inputs.seq_k);
    let heads = |&sequence| (0..spec.num_kv_heads).map(move |kv_head| Task { sequence, kv_head });
    let tasks: Vec<Task> = sequences.iter().flat_map(heads).collect();
    let d = spec.head_dim;
    let scratch_len = Scratch::len(d, inputs.seq_k.max_seqlen());
    backend.for_each_task(&tasks, scratch_len, |&Task { sequence, kv_head }, slab| {
        let Sequence { first_q, first_k, visible } = sequence;
        let scratch = &mut Scratch::new(slab, d, visible.seq_k);
        scratch.dk.fill(0.0);
        scratch.dv.fill(0.0);
        let group = spec.num_heads / spec.num_kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            for start in (0..visible.seq_q).step_by(Q_BLOCK) {
                let queries = start..visible.seq_q.min(start + Q_BLOCK);
                block(spec, &args, (sequence, head, &queries), scratch);
                store(&dq, (spec.num_heads, head, first_q + start), &scratch.dq[..queries.len() * d], d);
            }
        }
        store(&dk, (spec.num_kv_heads, kv_head, first_k), scratch.dk, d);
        store(&dv, (spec.num_kv_heads, kv_head, first_k), scratch.dv, d);
    })
}

/// Writes rows `first ..` of one head.
fn store<T: FloatElement>(
    to: &Disjoint<'_, T>,
    (num_heads, head, first): (usize, usize, usize),
    rows: &[f32],
    d: usize,
) {
    for (i, row) in rows.chunks_exact(d).enumerate() {
        let start = ((first + i) * num_heads + head) * d;
        #[allow(unsafe_code, reason = "tasks write interleaved rows of one tensor")]
        // SAFETY: a task writes rows of its own sequence and of its own heads only, one at a time.
        let to = unsafe { to.piece(start..start + d) };
        simd::narrow(row, to);
    }
}

/// Fills `scratch.dq` for a block of queries of one head and adds its share to `scratch.dk` and `scratch.dv`.
fn block<T: FloatElement>(
    spec: &Spec,
    args: &Arguments<'_, T>,
    (sequence, head, queries): (Sequence, usize, &Range<usize>),
    scratch: &mut Scratch<'_>,
) {
    let Sequence { first_q, first_k, visible } = sequence;
    let (d, rows, scale) = (spec.head_dim, queries.len(), spec.options.scale);
    let query_rows = |data| Head { data, num_heads: spec.num_heads, head, head_dim: d };
    let kv_head = head / (spec.num_heads / spec.num_kv_heads);
    let key_rows = |data| Head { data, num_heads: spec.num_kv_heads, head: kv_head, head_dim: d };
    let first = first_q + queries.start;
    let lse = &args.lse[head * args.tokens_q + first..][..rows];
    let Scratch { q, dout, dq, k, v, p, ds, projection, dk, dv } = scratch;
    let (q, dout, dq) = (&mut q[..rows * d], &mut dout[..rows * d], &mut dq[..rows * d]);
    // dq holds `out` until the first tile.
    query_rows(args.out).load(first, dq);
    query_rows(args.dout).load(first, dout);
    query_rows(args.q).load(first, q);
    for ((projection, out), dout) in projection.iter_mut().zip(dq.chunks_exact(d)).zip(dout.chunks_exact(d)) {
        *projection = vectorised(
            #[inline(always)]
            || simd::dot(out, dout),
        );
    }
    dq.fill(0.0);
    for keys in visible.tiles(queries) {
        let cols = keys.len();
        let (k, v) = (&mut k[..cols * d], &mut v[..cols * d]);
        key_rows(args.k).load(first_k + keys.start, k);
        key_rows(args.v).load(first_k + keys.start, v);
        let (q, dout) = (Mat::new(q, rows, d, d), Mat::new(dout, rows, d, d));
        let (k, v) = (Mat::new(k, cols, d, d), Mat::new(v, cols, d, d));
        matmul(Threads::One, scale, q, k.t(), MatMut::new(p, rows, cols, K_BLOCK), Into::Overwrite);
        matmul(Threads::One, 1.0, dout, v.t(), MatMut::new(ds, rows, cols, K_BLOCK), Into::Overwrite);
        score_gradients(&visible, (queries, &keys), (p, ds), (lse, projection), spec.options.softcap);
        let (p, ds) = (Mat::new(p, rows, cols, K_BLOCK), Mat::new(ds, rows, cols, K_BLOCK));
        let (dk, dv) = (&mut dk[keys.start * d..keys.end * d], &mut dv[keys.start * d..keys.end * d]);
        matmul(Threads::One, 1.0, p.t(), dout, MatMut::new(dv, cols, d, d), Into::Add);
        matmul(Threads::One, scale, ds.t(), q, MatMut::new(dk, cols, d, d), Into::Add);
        matmul(Threads::One, scale, ds, k, MatMut::new(dq, rows, d, d), Into::Add);
    }
}

/// `p`: scores become probabilities; `ds`: gradients of the probabilities become those of the scores.
fn score_gradients(
    visible: &Visible,
    (queries, tile): (&Range<usize>, &Range<usize>),
    (p, ds): (&mut [f32], &mut [f32]),
    (lse, projection): (&[f32], &[f32]),
    softcap: Option<f32>,
) {
    vectorised(
        #[inline(always)]
        || {
            let rows = p.chunks_exact_mut(K_BLOCK).zip(ds.chunks_exact_mut(K_BLOCK));
            for (i, ((p, ds), (lse, projection))) in rows.zip(lse.iter().zip(projection)).enumerate() {
                let keys = visible.keys(queries.start + i);
                let mut from = keys.start.clamp(tile.start, tile.end) - tile.start;
                let mut to = keys.end.clamp(tile.start, tile.end) - tile.start;
                if *lse == f32::NEG_INFINITY {
                    // A fully masked row: its probabilities are 0, where exp(s - lse) would be NaN.
                    (from, to) = (0, 0);
                }
                for masked in [0..from, to..tile.len()] {
                    p[masked.clone()].fill(0.0);
                    ds[masked].fill(0.0);
                }
                let (p, ds) = (&mut p[from..to], &mut ds[from..to]);
                match softcap {
                    None => {
                        for (p, ds) in p.iter_mut().zip(ds) {
                            *p = simd::exp(*p - lse);
                            *ds = *p * (*ds - projection);
                        }
                    }
                    Some(cap) => {
                        for (p, ds) in p.iter_mut().zip(ds) {
                            let t = simd::tanh(*p / cap);
                            *p = simd::exp(cap * t - lse);
                            *ds = *p * (*ds - projection) * (1.0 - t * t);
                        }
                    }
                }
            }
        },
    );
}
