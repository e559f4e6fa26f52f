//! Backward pass: one task per sequence and key head. It owns the rows of dq, dk and dv of its group of query heads, so nothing
//! is shared and every sum has a fixed order.

use std::ops::Range;

use unsloth_core::{
    FloatElement, Result,
    ops::attention::{Backward, Gradients, Inputs, Spec},
};

use super::{
    K_BLOCK, Q_BLOCK, Sequence, packed, take,
    tile::{Head, Left, Product, padded, stride, transpose},
};
use crate::{
    CpuBackend,
    access::{read, write},
    matmul::Into,
    parallel::Disjoint,
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

/// Scratch of a task: tiles, and the sums over all queries of the group.
struct Scratch<'a> {
    q: &'a mut [f32],
    q_transposed: &'a mut [f32],
    dout: &'a mut [f32],
    dout_transposed: &'a mut [f32],
    dq: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    /// Scores, then probabilities, `[keys, queries]`.
    p: &'a mut [f32],
    /// Gradient of the probabilities, then of the scores, `[keys, queries]`.
    ds: &'a mut [f32],
    /// Log of the sums of the softmax of each query.
    lse: &'a mut [f32],
    /// `sum_channels(dout * out)` of each query.
    projection: &'a mut [f32],
    /// `[seq_k, head_dim]`
    dk: &'a mut [f32],
    /// `[seq_k, head_dim]`
    dv: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn len(d: usize, seq_k: usize) -> usize {
        let (wide, width) = (stride(d), stride(Q_BLOCK));
        3 * Q_BLOCK * wide + 2 * d * width + 2 * K_BLOCK * wide + 2 * K_BLOCK * width + 2 * Q_BLOCK + 2 * seq_k * wide
    }

    fn new(mut slab: &'a mut [f32], d: usize, seq_k: usize) -> Self {
        let slab = &mut slab;
        let (wide, width) = (stride(d), stride(Q_BLOCK));
        Self {
            q: take(slab, Q_BLOCK * wide),
            q_transposed: take(slab, d * width),
            dout: take(slab, Q_BLOCK * wide),
            dout_transposed: take(slab, d * width),
            dq: take(slab, Q_BLOCK * wide),
            k: take(slab, K_BLOCK * wide),
            v: take(slab, K_BLOCK * wide),
            p: take(slab, K_BLOCK * width),
            ds: take(slab, K_BLOCK * width),
            lse: take(slab, Q_BLOCK),
            projection: take(slab, Q_BLOCK),
            dk: take(slab, seq_k * wide),
            dv: take(slab, seq_k * wide),
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
                store(&dq, (spec.num_heads, head, first_q + start), &scratch.dq[..queries.len() * stride(d)], d);
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
    for (i, row) in rows.chunks_exact(stride(d)).enumerate() {
        let start = ((first + i) * num_heads + head) * d;
        #[allow(unsafe_code, reason = "tasks write interleaved rows of one tensor")]
        // SAFETY: a task writes rows of its own sequence and of its own heads only, one at a time.
        let to = unsafe { to.piece(start..start + d) };
        simd::narrow(&row[..d], to);
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
    let (wide, width) = (stride(d), stride(rows));
    let Scratch { q, q_transposed, dout, dout_transposed, dq, k, v, p, ds, lse, projection, dk, dv } = scratch;
    // dq holds `out` until the first tile.
    query_rows(args.out).load(first, rows, dq);
    query_rows(args.dout).load(first, rows, dout);
    query_rows(args.q).load(first, rows, q);
    transpose(q, (rows, d), q_transposed);
    transpose(dout, (rows, d), dout_transposed);
    let (lse, projection) = (&mut lse[..padded(rows)], &mut projection[..padded(rows)]);
    projection.fill(0.0);
    for ((projection, out), dout) in projection[..rows].iter_mut().zip(dq.chunks(wide)).zip(dout.chunks(wide)) {
        *projection = vectorised(
            #[inline(always)]
            || simd::dot(out, dout),
        );
    }
    lse.fill(0.0);
    lse[..rows].copy_from_slice(&args.lse[head * args.tokens_q + first..][..rows]);
    // All scores of such a row are -inf or masked: exp(-inf - 0) is the 0 wanted, exp(-inf + inf) would be NaN.
    lse.iter_mut().filter(|lse| **lse == f32::NEG_INFINITY).for_each(|lse| *lse = 0.0);
    let dq = &mut dq[..rows * wide];
    dq.fill(0.0);
    for keys in visible.tiles(queries) {
        let cols = keys.len();
        key_rows(args.k).load(first_k + keys.start, cols, k);
        key_rows(args.v).load(first_k + keys.start, cols, v);
        let (p, ds) = (&mut p[..cols * width], &mut ds[..cols * width]);
        let (size, into) = ((cols, padded(rows), d), Into::Overwrite);
        Product { size, alpha: scale, a: Left::new(k, wide), b: (q_transposed, width), c: (p, width), into }.run();
        Product { size, alpha: 1.0, a: Left::new(v, wide), b: (dout_transposed, width), c: (ds, width), into }.run();
        score_gradients((p, ds), (lse, projection), spec.options.softcap);
        visible.mask(queries, &keys, p, 0.0);
        visible.mask(queries, &keys, ds, 0.0);
        let (dk, dv) = (&mut dk[keys.start * wide..keys.end * wide], &mut dv[keys.start * wide..keys.end * wide]);
        let (size, into) = ((cols, padded(d), rows), Into::Add);
        Product { size, alpha: 1.0, a: Left::new(p, width), b: (dout, wide), c: (dv, wide), into }.run();
        Product { size, alpha: scale, a: Left::new(ds, width), b: (q, wide), c: (dk, wide), into }.run();
        let (size, a) = ((rows, padded(d), cols), Left::new(ds, width).t());
        Product { size, alpha: scale, a, b: (k, wide), c: (dq, wide), into }.run();
    }
}

/// `p`: scores become probabilities; `ds`: gradients of the probabilities become those of the scores.
fn score_gradients((p, ds): (&mut [f32], &mut [f32]), (lse, projection): (&[f32], &[f32]), softcap: Option<f32>) {
    let width = stride(lse.len());
    vectorised(
        #[inline(always)]
        || {
            for (p, ds) in p.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width)) {
                let columns = p.iter_mut().zip(ds).zip(lse.iter().zip(projection));
                match softcap {
                    None => {
                        for ((p, ds), (lse, projection)) in columns {
                            *p = simd::exp(*p - lse);
                            *ds = *p * (*ds - projection);
                        }
                    }
                    Some(cap) => {
                        for ((p, ds), (lse, projection)) in columns {
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
