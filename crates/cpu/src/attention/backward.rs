//! Backward pass: one task per sequence and key head. It owns the rows of dq, dk and dv of its group of query heads, so nothing
//! is shared and every sum has a fixed order.

use std::ops::Range;

use unsloth_core::{
    FloatElement, Result,
    ops::attention::{Backward, Gradients, Inputs, Options, Spec},
};

use super::{
    K_BLOCK, LANES, Q_BLOCK, Sequence,
    factor::{Form, Head, Path, bits, both_len, columns_len, factor_len, tile_len, transpose},
    packed, take,
    tile::{Product, padded, stride},
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

/// Blocks of queries that visit keys together, which are put in order once for all of them. More would not stay in a second-level cache of
/// 1 MiB.
const NUM_UNITS: usize = 2;

/// Scratch of a task.
struct Scratch<'a> {
    /// Rows of queries on their way.
    rows: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    /// Scores, then probabilities, `[keys, queries]`.
    p: &'a mut [f32],
    /// Gradient of the probabilities, then of the scores, `[keys, queries]`.
    ds: &'a mut [f32],
    /// Either of these as pairs of bf16.
    pairs: &'a mut [f32],
    /// `[seq_k, head_dim]`: sums over all queries of the group.
    dk: &'a mut [f32],
    /// `[seq_k, head_dim]`
    dv: &'a mut [f32],
    /// What is left, for [`Unit::new`].
    units: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn len(d: usize, seq_q: usize, seq_k: usize) -> usize {
        let (q, k) = (seq_q.min(Q_BLOCK), seq_k.min(K_BLOCK));
        let (wide, width) = (stride(d), stride(q));
        let factors = both_len(k, d) + factor_len(k, d) + tile_len(k, q);
        let shared = factors + (q + 2 * seq_k) * wide + 2 * k * width;
        let own = 2 * (factor_len(q, d) + columns_len(q, d) + padded(q)) + d * width;
        shared + seq_q.div_ceil(Q_BLOCK).min(NUM_UNITS) * own
    }

    fn new(mut slab: &'a mut [f32], d: usize, seq_q: usize, seq_k: usize) -> Self {
        let slab = &mut slab;
        let (q, k) = (seq_q.min(Q_BLOCK), seq_k.min(K_BLOCK));
        let (wide, width) = (stride(d), stride(q));
        Self {
            rows: take(slab, q * wide),
            k: take(slab, both_len(k, d)),
            v: take(slab, factor_len(k, d)),
            p: take(slab, k * width),
            ds: take(slab, k * width),
            pairs: take(slab, tile_len(k, q)),
            dk: take(slab, seq_k * wide),
            dv: take(slab, seq_k * wide),
            units: std::mem::take(slab),
        }
    }
}

/// A block of queries of one head, and what products need of it.
struct Unit<'a> {
    queries: Range<usize>,
    /// Right factors of products that sum over channels, `[head_dim, queries]`.
    q_columns: (&'a [u32], usize),
    dout_columns: (&'a [u32], usize),
    /// Right factors of products that sum over queries, `[queries, head_dim]`.
    q: (&'a [u32], usize),
    dout: (&'a [u32], usize),
    /// Log of the sums of the softmax of each query.
    lse: &'a [f32],
    /// `sum_channels(dout * out)` of each query.
    projection: &'a [f32],
    /// `[head_dim, queries]`
    dq: &'a mut [f32],
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
    let scratch_len = Scratch::len(d, inputs.seq_q.max_seqlen(), inputs.seq_k.max_seqlen());
    backend.for_each_task(&tasks, scratch_len, |&Task { sequence, kv_head }, slab| {
        let Sequence { first_q, first_k, visible } = sequence;
        let path = Path::new::<T>(backend.isa(), d, visible.seq_q);
        let scratch = &mut Scratch::new(slab, d, visible.seq_q, visible.seq_k);
        scratch.dk.fill(0.0);
        scratch.dv.fill(0.0);
        let group = spec.num_heads / spec.num_kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            for first in (0..visible.seq_q).step_by(NUM_UNITS * Q_BLOCK) {
                let queries = first..visible.seq_q.min(first + NUM_UNITS * Q_BLOCK);
                visit((spec, path), &args, (sequence, head, &queries), scratch, |queries, rows| {
                    store(&dq, (spec.num_heads, head, first_q + queries.start), rows, d);
                });
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

impl<'a> Unit<'a> {
    fn new<T: FloatElement>(
        (spec, path): (&Spec, Path),
        args: &Arguments<'_, T>,
        (first_q, head, queries): (usize, usize, Range<usize>),
        out: &mut [f32],
        scratch: &mut &'a mut [f32],
    ) -> Self {
        let (d, rows, first) = (spec.head_dim, queries.len(), first_q + queries.start);
        let (wide, width) = (stride(d), stride(rows));
        let head_of = |data| Head { data, num_heads: spec.num_heads, head, head_dim: d };
        let (q_head, dout_head) = (head_of(args.q), head_of(args.dout));
        let (q, dout) = (take(scratch, factor_len(rows, d)), take(scratch, factor_len(rows, d)));
        let mut columns = || take(scratch, columns_len(rows, d));
        let (q_columns, dout_columns) = (columns(), columns());
        let (dq, lse, projection) =
            (take(scratch, d * width), take(scratch, padded(rows)), take(scratch, padded(rows)));
        head_of(args.out).load(first, rows, out);
        dout_head.load(first, rows, dout);
        if path.form == Form::F32 {
            q_head.load(first, rows, q);
        }
        projection.fill(0.0);
        for ((projection, out), dout) in projection[..rows].iter_mut().zip(out.chunks(wide)).zip(dout.chunks(wide)) {
            *projection = vectorised(
                #[inline(always)]
                || simd::dot(out, dout),
            );
        }
        lse.fill(0.0);
        lse[..rows].copy_from_slice(&args.lse[head * args.tokens_q + first..][..rows]);
        // All scores of such a row are -inf or masked: exp(-inf - 0) is the 0 wanted, exp(-inf + inf) would be NaN.
        lse.iter_mut().filter(|lse| **lse == f32::NEG_INFINITY).for_each(|lse| *lse = 0.0);
        dq.fill(0.0);
        let seen = (first, rows);
        let q_columns = q_head.columns(path, seen, q, q_columns);
        let dout_columns = dout_head.columns(path, seen, dout, dout_columns);
        let [q, dout] = [(q_head, q), (dout_head, dout)]
            .map(|(head, tile)| if path.form == Form::F32 { (bits(tile), wide) } else { head.right(path, seen, tile) });
        Self { queries, q_columns, dout_columns, q, dout, lse, projection, dq }
    }
}

/// Lets a few blocks of queries of one head visit the keys that they see: their shares are added to `scratch.dk` and `scratch.dv`, and
/// `store` gets the rows of dq of each block.
fn visit<T: FloatElement>(
    (spec, path): (&Spec, Path),
    args: &Arguments<'_, T>,
    (Sequence { first_q, first_k, visible }, head, all): (Sequence, usize, &Range<usize>),
    scratch: &mut Scratch<'_>,
    store: impl Fn(&Range<usize>, &[f32]),
) {
    let d = spec.head_dim;
    let Scratch { rows: dq_rows, k, v, p, ds, pairs, dk, dv, units } = scratch;
    let mut own = &mut **units;
    let blocks = all.clone().step_by(Q_BLOCK).map(|start| start..all.end.min(start + Q_BLOCK));
    let mut units: Vec<Unit<'_>> =
        blocks.map(|queries| Unit::new((spec, path), args, (first_q, head, queries), dq_rows, &mut own)).collect();
    let kv_head = head / (spec.num_heads / spec.num_kv_heads);
    let key_rows = |data| Head { data, num_heads: spec.num_kv_heads, head: kv_head, head_dim: d };
    for keys in visible.tiles(all) {
        let (cols, seen, wide) = (keys.len(), (first_k + keys.start, keys.len()), stride(d));
        let [k, channels] = key_rows(args.k).both(path, seen, k);
        let v = key_rows(args.v).left(path, seen, v);
        let (dk, dv) = (&mut dk[keys.start * wide..keys.end * wide], &mut dv[keys.start * wide..keys.end * wide]);
        for unit in &mut units {
            let (rows, width) = (unit.queries.len(), stride(unit.queries.len()));
            if !visible.sees_any(&unit.queries, &keys) {
                continue;
            }
            let (p, ds) = (&mut p[..cols * width], &mut ds[..cols * width]);
            let (size, into) = ((cols, padded(rows), path.depth(d)), Into::Overwrite);
            Product { size, a: k, b: unit.q_columns, c: (p, width), into }.run(path);
            Product { size, a: v, b: unit.dout_columns, c: (ds, width), into }.run(path);
            score_gradients((p, ds), (unit.lse, unit.projection), &spec.options);
            visible.mask(&unit.queries, &keys, p, 0.0);
            visible.mask(&unit.queries, &keys, ds, 0.0);
            let (size, into) = ((cols, padded(d), path.depth(rows)), Into::Add);
            let a = path.by_cols(p, (cols, rows), pairs);
            Product { size, a, b: unit.dout, c: (dv, wide), into }.run(path);
            let a = path.by_cols(ds, (cols, rows), pairs);
            Product { size, a, b: unit.q, c: (dk, wide), into }.run(path);
            let (size, b) = ((d, padded(rows), path.depth(cols)), path.by_rows(ds, (cols, rows), pairs));
            Product { size, a: channels, b, c: (unit.dq, width), into }.run(path);
        }
    }
    for unit in units {
        let dq_rows = &mut dq_rows[..unit.queries.len() * stride(d)];
        transpose(unit.dq, (d, unit.queries.len()), dq_rows);
        store(&unit.queries, dq_rows);
    }
}

/// `p`: products of queries and keys become probabilities; `ds`: gradients of the probabilities become those of the products.
fn score_gradients(tiles: (&mut [f32], &mut [f32]), statistics: (&[f32], &[f32]), options: &Options) {
    let scale = options.scale;
    // The cap is not looked at within the loop: there the compiler would compute both and choose.
    vectorised_fused(
        #[inline(always)]
        |m| match options.softcap {
            None => {
                for_each_score(tiles, statistics, |product, lse| (simd::exp(m, m.mul_add(product, scale, -lse)), scale))
            }
            Some(cap) => for_each_score(tiles, statistics, |product, lse| {
                let t = simd::tanh(m, scale * product / cap);
                (simd::exp(m, cap * t - lse), scale * (1.0 - t * t))
            }),
        },
    );
}

/// [`score_gradients`] with the probability of a product and the slope of its score.
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
