//! Backward pass: one task per sequence and key head. It owns the rows of dq, dk and dv of its group of query heads, so nothing
//! is shared and every sum has a fixed order.

use std::ops::Range;

use unsloth_core::{
    FloatElement, Result,
    ops::attention::{Backward, Gradients, Inputs, Spec},
};

use super::{
    K_BLOCK, LANES, Q_BLOCK, Sequence, packed, take,
    tile::{Head, Path, Product, bits, padded, stride},
};
use crate::{
    CpuBackend,
    access::{read, write},
    matmul::Into,
    parallel::Disjoint,
    simd::{self, vectorised, vectorised_fused},
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
    /// Either of these as pairs of bf16.
    pairs: &'a mut [f32],
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
        let tiles = 3 * Q_BLOCK * wide + 2 * d * width + 2 * K_BLOCK * wide + (2 * K_BLOCK + K_BLOCK / 2) * width;
        tiles + 2 * Q_BLOCK + 2 * seq_k * wide
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
            pairs: take(slab, K_BLOCK / 2 * width),
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
    let (d, path) = (spec.head_dim, Path::new::<T>(backend.isa(), spec.head_dim));
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
                block((spec, path), &args, (sequence, head, &queries), scratch);
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
    (spec, path): (&Spec, Path),
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
    let Scratch { q, q_transposed, dout, dout_transposed, dq, k, v, p, ds, pairs, lse, projection, dk, dv } = scratch;
    // dq holds `out` until the first tile.
    query_rows(args.out).load(first, rows, dq);
    query_rows(args.dout).load(first, rows, dout);
    let (lse, projection) = (&mut lse[..padded(rows)], &mut projection[..padded(rows)]);
    projection.fill(0.0);
    for ((projection, out), dout) in projection[..rows].iter_mut().zip(dq.chunks(wide)).zip(dout.chunks(wide)) {
        *projection = vectorised(
            #[inline(always)]
            || simd::dot(out, dout),
        );
    }
    query_rows(args.q).columns(path, (first, rows), q, q_transposed);
    query_rows(args.dout).columns(path, (first, rows), dout, dout_transposed);
    let (_, q) = query_rows(args.q).both(path, (first, rows), q);
    let (_, dout) = query_rows(args.dout).both(path, (first, rows), dout);
    let [q_transposed, dout_transposed] = [q_transposed, dout_transposed].map(|columns| bits(columns));
    lse.fill(0.0);
    lse[..rows].copy_from_slice(&args.lse[head * args.tokens_q + first..][..rows]);
    // All scores of such a row are -inf or masked: exp(-inf - 0) is the 0 wanted, exp(-inf + inf) would be NaN.
    lse.iter_mut().filter(|lse| **lse == f32::NEG_INFINITY).for_each(|lse| *lse = 0.0);
    let dq = &mut dq[..rows * wide];
    dq.fill(0.0);
    for keys in visible.tiles(queries) {
        let (cols, seen) = (keys.len(), (first_k + keys.start, keys.len()));
        let (a, k) = key_rows(args.k).both(path, seen, k);
        let (p, ds) = (&mut p[..cols * width], &mut ds[..cols * width]);
        let (size, into) = ((cols, padded(rows), path.depth(d)), Into::Overwrite);
        Product { size, alpha: scale, a, b: (q_transposed, width), c: (p, width), into }.run(path);
        let a = key_rows(args.v).left(path, seen, v);
        Product { size, alpha: 1.0, a, b: (dout_transposed, width), c: (ds, width), into }.run(path);
        score_gradients((p, ds), (lse, projection), spec.options.softcap);
        visible.mask(queries, &keys, p, 0.0);
        visible.mask(queries, &keys, ds, 0.0);
        let (dk, dv) = (&mut dk[keys.start * wide..keys.end * wide], &mut dv[keys.start * wide..keys.end * wide]);
        let (size, into) = ((cols, padded(d), path.depth(rows)), Into::Add);
        let a = path.by_cols(p, (cols, rows), pairs);
        Product { size, alpha: 1.0, a, b: dout, c: (dv, wide), into }.run(path);
        let a = path.by_cols(ds, (cols, rows), pairs);
        Product { size, alpha: scale, a, b: q, c: (dk, wide), into }.run(path);
        let (size, a) = ((rows, padded(d), path.depth(cols)), path.by_rows(ds, (cols, rows), pairs));
        Product { size, alpha: scale, a, b: k, c: (dq, wide), into }.run(path);
    }
}

/// `p`: scores become probabilities; `ds`: gradients of the probabilities become those of the scores.
fn score_gradients(tiles: (&mut [f32], &mut [f32]), statistics: (&[f32], &[f32]), softcap: Option<f32>) {
    // The cap is not looked at within the loop: there the compiler would compute both and choose.
    vectorised_fused(
        #[inline(always)]
        |m| match softcap {
            None => for_each_score(tiles, statistics, |score, lse| (simd::exp(m, score - lse), 1.0)),
            Some(cap) => for_each_score(tiles, statistics, |score, lse| {
                let t = simd::tanh(m, score / cap);
                (simd::exp(m, cap * t - lse), 1.0 - t * t)
            }),
        },
    );
}

/// [`score_gradients`] with the probability of a score and the slope of its cap.
#[inline(always)]
fn for_each_score(
    (p, ds): (&mut [f32], &mut [f32]),
    (lse, projection): (&[f32], &[f32]),
    probability: impl Fn(f32, f32) -> (f32, f32),
) {
    let width = stride(lse.len());
    let ((lse, _), (projection, _)) = (lse.as_chunks::<LANES>(), projection.as_chunks::<LANES>());
    for (p, ds) in p.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width)) {
        let ((p, _), (ds, _)) = (p.as_chunks_mut::<LANES>(), ds.as_chunks_mut::<LANES>());
        for i in 0..lse.len() {
            let (p, ds, lse, projection) = (&mut p[i], &mut ds[i], &lse[i], &projection[i]);
            for lane in 0..LANES {
                let (value, slope) = probability(p[lane], lse[lane]);
                p[lane] = value;
                ds[lane] = value * (ds[lane] - projection[lane]) * slope;
            }
        }
    }
}
