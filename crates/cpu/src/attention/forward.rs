//! Forward pass: one task per sequence and a few blocks of queries of heads that have a key head in common; online softmax over tiles of
//! keys, each of which is put in order once for all of these.
//!
//! Tiles of scores are transposed, `[keys, queries]`: maxima and sums over keys are then taken for a vector of queries at once. So is the
//! output, `[head_dim, queries]`, until all keys have been visited: probabilities are the right factor of its product as they lie.

use std::{cell::LazyCell, ops::Range};

use unsloth_core::{
    FloatElement, Result, Tensor,
    ops::attention::{Options, Spec},
};

use super::{
    K_BLOCK, LANES, Q_BLOCK, Sequence, Visible,
    factor::{Form, Head, Path, columns_len, factor_len, tile_len, transpose},
    take,
    tile::{Product, padded, stride},
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

/// How much larger than the maximum that is subtracted a score may be before the maximum follows it: what was summed so far is then
/// rarely rescaled, and no exponential comes near the end of f32 or loses a bit.
const SLACK: f32 = 8.0;

/// Most blocks of queries that visit keys together: what they hold has to stay in the second-level cache.
const MAX_UNITS: usize = 4;

struct Task {
    sequence: Sequence,
    /// Of one key head.
    heads: Range<usize>,
    /// Queries, counted from the first of the sequence.
    queries: Range<usize>,
}

/// A block of queries of one head.
pub(super) struct Unit {
    pub(super) head: usize,
    /// Queries, counted from the first of the sequence.
    pub(super) queries: Range<usize>,
}

/// What a block of queries found.
pub(super) struct Block<'a> {
    /// Output: a tile of `[queries, head_dim]`.
    pub(super) out: &'a mut [f32],
    /// Largest score, or less by up to [`SLACK`].
    pub(super) max: &'a mut [f32],
    /// Sum of `exp(score - max)`.
    pub(super) sum: &'a mut [f32],
}

/// Running softmax of a block of queries.
struct Running<'a> {
    /// Output, not divided by the sums: a tile of `[head_dim, queries]`.
    out: &'a mut [f32],
    /// Largest score so far, or less by up to [`SLACK`].
    max: &'a mut [f32],
    /// Sum of `exp(score - max)` so far.
    sum: &'a mut [f32],
    /// What the last tile multiplied earlier sums by.
    rescale: &'a mut [f32],
}

/// Scratch of a task of so many units.
pub(super) fn scratch_len(d: usize, num_units: usize) -> usize {
    let own = columns_len(Q_BLOCK, d) + d * stride(Q_BLOCK) + 3 * Q_BLOCK;
    let shared = Q_BLOCK * stride(d) + 2 * factor_len(K_BLOCK, d);
    shared + K_BLOCK * stride(Q_BLOCK) + tile_len(K_BLOCK, Q_BLOCK) + num_units * own
}

/// Cuts the work so that there are several tasks for each thread; gives how many units one has at most, too. What a unit computes does not
/// depend on the others of its task.
fn tasks(spec: &Spec, sequences: &[Sequence], num_threads: usize) -> (Vec<Task>, usize) {
    let blocks: usize = sequences.iter().map(|sequence| sequence.visible.seq_q.div_ceil(Q_BLOCK)).sum();
    let num_units = (blocks * spec.num_heads / (8 * num_threads)).clamp(1, MAX_UNITS);
    let group = spec.num_heads / spec.num_kv_heads.max(1);
    let num_heads = group.clamp(1, num_units);
    let num_queries = num_units / num_heads * Q_BLOCK;
    let mut tasks = Vec::new();
    for &sequence in sequences {
        let seq_q = sequence.visible.seq_q;
        let of_group = |first: usize| (first..first + group).step_by(num_heads).map(move |head| (head, first + group));
        for (head, end) in (0..spec.num_heads).step_by(group.max(1)).flat_map(of_group) {
            let heads = head..end.min(head + num_heads);
            let blocks = (0..seq_q).step_by(num_queries).map(|start| start..seq_q.min(start + num_queries));
            tasks.extend(blocks.map(|queries| Task { sequence, heads: heads.clone(), queries }));
        }
    }
    (tasks, num_units)
}

pub(super) fn run<T: FloatElement>(
    backend: &CpuBackend,
    spec: &Spec,
    (q, (k, v)): (&Tensor, (&Tensor, &Tensor)),
    sequences: &[Sequence],
    (out, lse): (&mut Tensor, Option<&mut Tensor>),
) -> Result<()> {
    let (tasks, num_units) = tasks(spec, sequences, backend.num_threads());
    let d = spec.head_dim;
    let tokens_q = q.shape()[0];
    let (q, k, v) = (read::<T>(q), read::<T>(k), read::<T>(v));
    let out = Disjoint::new(write::<T>("attention", "out", out)?);
    let lse = lse.map(|lse| write::<f32>("attention", "lse", lse)).transpose()?.map(Disjoint::new);
    backend.for_each_task(&tasks, scratch_len(d, num_units), |task, scratch| {
        let Task { sequence, ref heads, ref queries } = *task;
        let path = Path::new::<T>(backend.isa(), d, sequence.visible.seq_q);
        let kv_head = heads.start / (spec.num_heads / spec.num_kv_heads);
        let keys = |data| Head { data, num_heads: spec.num_kv_heads, head: kv_head, head_dim: d };
        let q = Head { data: q, num_heads: spec.num_heads, head: heads.start, head_dim: d };
        let blocks = |head| {
            let blocks = queries.clone().step_by(Q_BLOCK);
            blocks.map(move |start| Unit { head, queries: start..queries.end.min(start + Q_BLOCK) })
        };
        let units: Vec<Unit> = heads.clone().flat_map(blocks).collect();
        visit((spec, path), sequence, &units, (q, keys(k), keys(v)), scratch, |&Unit { head, ref queries }, block| {
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
        });
    })
}

/// Asks for rows before they are read: those of one head lie apart, which no processor foresees.
fn ask<T: FloatElement>(head: Head<'_, T>, rows: Range<usize>) {
    rows.for_each(|token| prefetch_all(head.row(token)));
}

/// Lets units of one key head visit the keys that they see, one tile after another; calls `found` with what each found.
pub(super) fn visit<T: FloatElement>(
    (spec, path): (&Spec, Path),
    Sequence { first_q, first_k, visible }: Sequence,
    units: &[Unit],
    (q_head, k_head, v_head): (Head<'_, T>, Head<'_, T>, Head<'_, T>),
    mut scratch: &mut [f32],
    mut found: impl FnMut(&Unit, Block<'_>),
) {
    let d = spec.head_dim;
    let rows = units.iter().map(|unit| unit.queries.len()).max().unwrap_or(0);
    // Few queries make narrow tiles.
    let (wide, width) = (stride(d), stride(rows));
    let q = take(&mut scratch, rows * wide);
    let (k, v) = (take(&mut scratch, factor_len(K_BLOCK, d)), take(&mut scratch, factor_len(K_BLOCK, d)));
    let (scores, pairs) = (take(&mut scratch, K_BLOCK * width), take(&mut scratch, tile_len(K_BLOCK, rows)));
    let begin = |unit: &Unit| {
        let (head, rows) = (Head { head: unit.head, ..q_head }, unit.queries.len());
        let columns = take(&mut scratch, columns_len(rows, d));
        let first = first_q + unit.queries.start;
        if path.form == Form::F32 {
            head.load(first, rows, q);
        }
        let columns = head.columns(path, (first, rows), q, columns);
        (columns, Running::new((d, rows), &mut scratch))
    };
    let mut states: Vec<_> = units.iter().map(begin).collect();
    let queries = units.iter().map(|unit| unit.queries.clone());
    let Some(all) = queries.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)) else { return };
    let mut tiles = visible.tiles(&all).peekable();
    while let Some(keys) = tiles.next() {
        let (cols, seen) = (keys.len(), (first_k + keys.start, keys.len()));
        if rows <= LANES {
            // There is little to do with what is read.
            ask(v_head, seen.0..seen.0 + cols);
        }
        let (k, channels) = (k_head.left(path, seen, k), LazyCell::new(|| v_head.channels(path, seen, v)));
        for (Unit { queries, .. }, (q_columns, running)) in units.iter().zip(&mut states) {
            let rows = queries.len();
            if !visible.sees_any(queries, &keys) {
                continue;
            }
            let (size, c) = ((cols, padded(rows), path.depth(d)), (&mut *scores, stride(rows)));
            Product { size, a: k, b: *q_columns, c, into: Into::Overwrite }.run(path);
            if let Some(next) = tiles.peek().filter(|_| rows <= LANES) {
                ask(k_head, first_k + next.start..first_k + next.end);
            }
            running.absorb((&visible, &spec.options), queries, &keys, scores);
            let (size, b) = ((d, padded(rows), path.depth(cols)), path.by_rows(scores, (cols, rows), pairs));
            Product { size, a: *channels, b, c: (running.out, stride(rows)), into: Into::Add }.run(path);
        }
    }
    for (unit, (_, running)) in units.iter().zip(states) {
        found(unit, running.finish((d, unit.queries.len()), q));
    }
}

impl<'a> Block<'a> {
    /// Of `rows` rows, `wide` elements apart, that have visited no key, in scratch.
    pub(super) fn empty((rows, wide): (usize, usize), scratch: &mut &'a mut [f32]) -> Self {
        let out = take(scratch, rows * wide);
        let mut statistics = || take(scratch, padded(rows));
        let block = Self { out, max: statistics(), sum: statistics() };
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
}

impl<'a> Running<'a> {
    /// Of `rows` queries of `d` channels that have visited no key, in scratch.
    fn new((d, rows): (usize, usize), scratch: &mut &'a mut [f32]) -> Self {
        let out = take(scratch, d * stride(rows));
        let mut statistics = || take(scratch, padded(rows));
        let running = Self { out, max: statistics(), sum: statistics(), rescale: statistics() };
        running.out.fill(0.0);
        running.max.fill(f32::NEG_INFINITY);
        running.sum.fill(0.0);
        running
    }

    /// The output by rows, divided by the sums, when all keys have been visited.
    fn finish<'b>(self, (d, rows): (usize, usize), to: &'b mut [f32]) -> Block<'b>
    where
        'a: 'b,
    {
        let to = &mut to[..rows * stride(d)];
        transpose(self.out, (d, rows), to);
        let mut block = Block { out: to, max: self.max, sum: self.sum };
        block.divide(stride(d));
        block
    }

    /// Turns a tile of products of queries and keys into probabilities relative to the maxima, and rescales what was summed before.
    fn absorb(
        &mut self,
        (visible, options): (&Visible, &Options),
        queries: &Range<usize>,
        tile: &Range<usize>,
        scores: &mut [f32],
    ) {
        let (width, rows) = (stride(queries.len()), queries.len());
        let scores = &mut scores[..tile.len() * width];
        vectorised_fused(
            #[inline(always)]
            |m| {
                // Maxima of products are those of scores as long as a factor does not turn them round.
                let scale = if options.softcap.is_none() && options.scale > 0.0 { options.scale } else { 1.0 };
                if let Some(cap) = options.softcap {
                    for s in scores.iter_mut() {
                        *s = cap * simd::tanh(m, options.scale * *s / cap);
                    }
                } else if scale != options.scale {
                    simd::scale(scores, options.scale);
                }
                visible.mask(queries, tile, scores, f32::NEG_INFINITY);
                // Not `for_each`: what is not inlined is not compiled for these instructions.
                let mut from = 0;
                while from < rows {
                    if padded(rows) - from >= MANY_LANES {
                        self.absorb_lanes::<MANY_LANES>((m, scale), from, scores, width);
                        from += MANY_LANES;
                    } else {
                        self.absorb_lanes::<LANES>((m, scale), from, scores, width);
                        from += LANES;
                    }
                }
                if self.rescale.iter().any(|rescale| *rescale != 1.0) {
                    for out in self.out.chunks_exact_mut(width) {
                        out.iter_mut().zip(&*self.rescale).for_each(|(out, rescale)| *out *= rescale);
                    }
                }
            },
        );
    }

    /// [`Self::absorb`] for `N` queries, of whose scores `scores` are `1 / scale`.
    #[inline(always)]
    fn absorb_lanes<const N: usize>(
        &mut self,
        (m, scale): (Fused, f32),
        from: usize,
        scores: &mut [f32],
        width: usize,
    ) {
        let statistics = [&mut self.max, &mut self.sum, &mut self.rescale];
        let [Some(max), Some(total), Some(rescale)] = statistics.map(|all| all[from..].first_chunk_mut::<N>()) else {
            unreachable!("statistics are whole vectors");
        };
        let mut new_max = [f32::NEG_INFINITY; N];
        for row in scores.chunks_exact(width) {
            let Some(row) = row[from..].first_chunk::<N>() else { unreachable!("rows are whole vectors") };
            // A new array, not new elements: these the compiler would store one by one, where they are larger.
            new_max = std::array::from_fn(|lane| if row[lane] > new_max[lane] { row[lane] } else { new_max[lane] });
        }
        let (mut shift, mut sum) = ([0.0; N], [0.0; N]);
        for lane in 0..N {
            let of_tile = scale * new_max[lane];
            new_max[lane] = if of_tile > max[lane] + SLACK { of_tile } else { max[lane] };
            // All scores may be -inf so far; subtracting that would give NaN.
            shift[lane] = if new_max[lane] == f32::NEG_INFINITY { 0.0 } else { new_max[lane] };
            // Before there is a maximum there is nothing to rescale.
            rescale[lane] = if max[lane] == f32::NEG_INFINITY { 1.0 } else { simd::exp(m, max[lane] - new_max[lane]) };
        }
        *max = new_max;
        for row in scores.chunks_exact_mut(width) {
            let Some(row) = row[from..].first_chunk_mut::<N>() else { unreachable!("rows are whole vectors") };
            for lane in 0..N {
                row[lane] = simd::exp(m, m.mul_add(row[lane], scale, -shift[lane]));
                sum[lane] += row[lane];
            }
        }
        for lane in 0..N {
            total[lane] = total[lane] * rescale[lane] + sum[lane];
        }
    }
}

#[cfg(test)]
mod tests {
    use unsloth_core::{Category, Device, Sequences, ops::attention};

    use super::super::K_BLOCK;
    use crate::{CpuBackend, CpuOptions, Isa};

    /// Scores that grow from tile to tile, by more than the slack and by less, or fall, where the factor is negative, or are all the same.
    #[test]
    fn maxima_that_grow_leave_the_sums_right() {
        const TOKENS: usize = 3 * K_BLOCK + 5;
        for isa in Isa::available() {
            let options = CpuOptions { isa: Some(isa), num_threads: Some(2), ..CpuOptions::default() };
            let device = Device::new(CpuBackend::new(options).unwrap());
            let tensor = |values: &[f32]| device.from_slice(values, [TOKENS, 1, 2], Category::Activations).unwrap();
            let column = |i: usize| (i * 7 % 13) as f32 / 13.0 - 0.5;
            // Steps of a tile: 16 in a score of a query whose first channel is 1.
            let q: Vec<f32> = (0..TOKENS).flat_map(|i| [(i % 5) as f32 / 4.0, column(i)]).collect();
            let k: Vec<f32> = (0..TOKENS).flat_map(|j| [j as f32 / 8.0, column(j + 3)]).collect();
            let v: Vec<f32> = (0..TOKENS).flat_map(|j| [column(j + 1), (j % 11) as f32]).collect();
            let seqs = Sequences::from_lengths(&device, &[TOKENS]).unwrap();
            let (q_tensor, k_tensor, v_tensor) = (tensor(&q), tensor(&k), tensor(&v));
            let inputs = attention::Inputs { q: &q_tensor, k: &k_tensor, v: &v_tensor, seq_q: &seqs, seq_k: &seqs };
            for scale in [1.0, 0.25, 0.0, -1.0] {
                let options = attention::Options { scale, ..attention::Options::causal(2) };
                let found = attention::forward(inputs, options).unwrap();
                let (out, lse) = (found.out.to_vec::<f32>().unwrap(), found.lse.to_vec::<f32>().unwrap());
                for i in 0..TOKENS {
                    let at = |x: &[f32], row: usize, c: usize| f64::from(x[2 * row + c]);
                    let score =
                        |j: usize| f64::from(scale) * (at(&q, i, 0) * at(&k, j, 0) + at(&q, i, 1) * at(&k, j, 1));
                    let max = (0..=i).map(score).fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = (0..=i).map(|j| (score(j) - max).exp()).sum();
                    let close = |actual: f32, expected: f64| {
                        (f64::from(actual) - expected).abs() <= 3e-5 * (1.0 + expected.abs())
                    };
                    assert!(close(lse[i], max + sum.ln()), "{} {scale} {i}: {}", isa.name(), lse[i]);
                    for c in 0..2 {
                        let expected = (0..=i).map(|j| (score(j) - max).exp() * at(&v, j, c)).sum::<f64>() / sum;
                        let actual = out[2 * i + c];
                        assert!(close(actual, expected), "{} {scale} {i} {c}: {actual} {expected}", isa.name());
                    }
                }
            }
        }
    }
}
