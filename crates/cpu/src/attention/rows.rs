//! A few query rows for each key head, without tiles of rows, which would be mostly empty. Memory's bandwidth is the limit: each key and
//! each value is read once, in the order in which they lie, and meets all rows of its head.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use unsloth_core::{DType, FloatElement, ops::attention::Spec};

use super::{
    factor::Head,
    forward::Block,
    take,
    tile::{padded, stride},
};
use crate::{
    matmul::{Isa, prefetch_all},
    simd::{self, vectorised_fused},
};

/// Most rows of a key head that are faster without tiles.
pub(super) const MAX_GROUP: usize = 8;
/// Most rows of a task: with them scratch is no more than tiles need.
pub(super) const MAX_ROWS: usize = 64;
/// f32 of the keys or values that are in the first-level cache at a time.
const CHUNK: usize = 4096;
/// Rows, and keys or vectors of values, whose sums are held in registers: eight of the sixteen of AVX2, as many as hide their latency.
const ROWS: usize = 4;
const ACROSS: usize = 2;

/// Some heads that are neighbours.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a, T> {
    pub(super) first: Head<'a, T>,
    pub(super) count: usize,
}

impl<'a, T: FloatElement> Heads<'a, T> {
    /// What the heads have of a token.
    fn row(self, token: usize) -> &'a [T] {
        let Head { data, num_heads, head, head_dim } = self.first;
        &data[(token * num_heads + head) * head_dim..][..self.count * head_dim]
    }

    /// Asks for a share of some tokens before they are read: one that is asked for all at once waits for the memory.
    fn ask(self, tokens: &Range<usize>, share: usize) {
        let len = tokens.len();
        let of = |share: usize| tokens.start + len * share / self.count;
        (of(share)..of(share + 1)).for_each(|token| prefetch_all(self.row(token)));
    }

    /// Rows of tokens in f32: as they lie in memory where they are whole vectors, else by way of `buffer`.
    fn lines(self, tokens: Range<usize>, buffer: &'a mut [f32]) -> Lines<'a> {
        let Head { data, num_heads, head, head_dim: d } = self.first;
        let (cols, keys) = (padded(d), tokens.len());
        if T::DTYPE == DType::F32 && cols == d {
            let (data, row) = (bytemuck::cast_slice::<T, f32>(data), num_heads * d);
            return Lines { data: &data[tokens.start * row + head * d..], row, cols, keys };
        }
        let row = self.count * cols;
        for (token, to) in tokens.zip(buffer.chunks_exact_mut(row)) {
            let from = self.row(token);
            if cols == d {
                simd::widen(from, to);
                continue;
            }
            for (from, to) in from.chunks_exact(d).zip(to.chunks_exact_mut(cols)) {
                simd::widen(from, &mut to[..d]);
                to[d..].fill(0.0);
            }
        }
        Lines { data: buffer, row, cols, keys }
    }
}

/// Keys or values of some heads in f32, in rows of whole vectors.
#[derive(Clone, Copy)]
struct Lines<'a> {
    data: &'a [f32],
    /// Distance of the keys.
    row: usize,
    /// Elements of a head, and their distance.
    cols: usize,
    keys: usize,
}

impl<'a> Lines<'a> {
    #[inline(always)]
    fn of(self, key: usize, head: usize) -> &'a [f32] {
        &self.data[key * self.row + head * self.cols..][..self.cols]
    }
}

/// Output of the rows `first_q ..` of queries, `group` for each key head, after some keys, all of which they see.
pub(super) fn block<'a, T: FloatElement>(
    (spec, isa): (&Spec, Isa),
    (q_head, first_q): (Head<'_, T>, usize),
    (k, v): (Heads<'_, T>, Heads<'_, T>),
    keys: &Range<usize>,
    mut scratch: &'a mut [f32],
) -> Block<'a> {
    let (group, wide) = (spec.num_heads / spec.num_kv_heads, stride(spec.head_dim));
    let rows = k.count * group;
    let mut block = Block::empty((rows, wide), &mut scratch);
    let (width, row) = (stride(keys.len()), k.count * padded(spec.head_dim));
    let step = (CHUNK / row).max(ACROSS);
    let (q, buffer) = (take(&mut scratch, rows * wide), take(&mut scratch, step * row));
    let scores = take(&mut scratch, rows * width);
    q_head.load(first_q, rows, q);
    simd::scale(q, spec.options.scale);
    let cut = |start: usize| start.min(keys.end)..keys.end.min(start + step);
    let chunks = || keys.clone().step_by(step).map(cut);
    for chunk in chunks() {
        let (next, start) = (cut(chunk.end), chunk.start - keys.start);
        let lines = k.lines(chunk, &mut *buffer);
        for head in 0..k.count {
            k.ask(&next, head);
            let (q, to) = (&q[head * group * wide..], &mut scores[head * group * width + start..]);
            isa.vectorize(Pass { sums: Sums::Scores, rows: group, from: (q, wide), lines, head, to: (to, width) });
        }
    }
    (0..v.count).for_each(|share| v.ask(&cut(keys.start), share));
    let statistics = block.max.iter_mut().zip(&mut *block.sum);
    for (scores, (max, sum)) in scores.chunks_exact_mut(width).zip(statistics) {
        (*max, *sum) = exponentials(&mut scores[..keys.len()], spec.options.softcap);
    }
    for chunk in chunks() {
        let (next, start) = (cut(chunk.end), chunk.start - keys.start);
        let lines = v.lines(chunk, &mut *buffer);
        for head in 0..v.count {
            v.ask(&next, head);
            let (weights, to) = (&scores[head * group * width + start..], &mut block.out[head * group * wide..]);
            isa.vectorize(Pass {
                sums: Sums::Outputs,
                rows: group,
                from: (weights, width),
                lines,
                head,
                to: (to, wide),
            });
        }
    }
    block.divide(wide);
    block
}

/// Turns the scores of a row into probabilities that are not divided by their sum yet; gives the largest score and that sum.
fn exponentials(scores: &mut [f32], softcap: Option<f32>) -> (f32, f32) {
    vectorised_fused(
        #[inline(always)]
        |m| {
            if let Some(cap) = softcap {
                for s in scores.iter_mut() {
                    *s = cap * simd::tanh(m, *s / cap);
                }
            }
            let max = simd::max(scores);
            // All scores may be -inf; subtracting that would give NaN.
            let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
            for s in scores.iter_mut() {
                *s = simd::exp(m, *s - shift);
            }
            (max, simd::sum(scores))
        },
    )
}

enum Sums {
    /// Products of rows of queries with keys, written.
    Scores,
    /// Values by rows of weights, added.
    Outputs,
}

/// Rows of one head that meet some keys or values.
struct Pass<'a> {
    sums: Sums,
    rows: usize,
    /// Rows of queries or weights, and their distance.
    from: (&'a [f32], usize),
    lines: Lines<'a>,
    head: usize,
    /// Rows of scores or output, and their distance.
    to: (&'a mut [f32], usize),
}

impl WithSimd for Pass<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for first in (0..self.rows).step_by(ROWS) {
            match self.rows - first {
                1 => self.some::<S, 1>(simd, first),
                2 => self.some::<S, 2>(simd, first),
                3 => self.some::<S, 3>(simd, first),
                _ => self.some::<S, ROWS>(simd, first),
            }
        }
    }
}

impl Pass<'_> {
    /// `R` rows, from `first` on.
    #[inline(always)]
    fn some<S: Simd, const R: usize>(&mut self, simd: S, first: usize) {
        match self.sums {
            Sums::Scores => self.scores::<S, R>(simd, first),
            Sums::Outputs => self.outputs::<S, R>(simd, first),
        }
    }

    #[inline(always)]
    fn scores<S: Simd, const R: usize>(&mut self, simd: S, first: usize) {
        let Lines { cols, keys, .. } = self.lines;
        let (q, distance) = self.from;
        let q: [&[S::f32s]; R] = std::array::from_fn(|r| S::as_simd_f32s(&q[(first + r) * distance..][..cols]).0);
        let len = q[0].len();
        let (to, width) = (&mut *self.to.0, self.to.1);
        for key in (0..keys).step_by(ACROSS) {
            let here = (keys - key).min(ACROSS);
            // Where there is one left, it is taken twice.
            let lines: [&[S::f32s]; ACROSS] =
                std::array::from_fn(|i| S::as_simd_f32s(self.lines.of(key + i.min(here - 1), self.head)).0);
            let mut sums = [[simd.splat_f32s(0.0); ACROSS]; R];
            for k in 0..len {
                let keys: [S::f32s; ACROSS] = std::array::from_fn(|i| lines[i][k]);
                for (sums, q) in sums.iter_mut().zip(q) {
                    for (sum, key) in sums.iter_mut().zip(keys) {
                        *sum = simd.mul_add_e_f32s(q[k], key, *sum);
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                let to = &mut to[(first + r) * width + key..][..here];
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to = simd.reduce_sum_f32s(sum));
            }
        }
    }

    #[inline(always)]
    fn outputs<S: Simd, const R: usize>(&mut self, simd: S, first: usize) {
        let Lines { cols, keys, .. } = self.lines;
        let (weights, width) = self.from;
        let weights: [&[f32]; R] = std::array::from_fn(|r| &weights[(first + r) * width..][..keys]);
        let (to, distance) = (&mut *self.to.0, self.to.1);
        for col in (0..cols).step_by(ACROSS * S::F32_LANES) {
            let at = |r: usize| (first + r) * distance + col..(first + r) * distance + col + ACROSS * S::F32_LANES;
            let mut sums = [[simd.splat_f32s(0.0); ACROSS]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                sums.copy_from_slice(S::as_simd_f32s(&to[at(r)]).0);
            }
            for key in 0..keys {
                let line = S::as_simd_f32s(&self.lines.of(key, self.head)[col..col + ACROSS * S::F32_LANES]).0;
                for (sums, weights) in sums.iter_mut().zip(weights) {
                    let weight = simd.splat_f32s(weights[key]);
                    for (sum, value) in sums.iter_mut().zip(line) {
                        *sum = simd.mul_add_e_f32s(weight, *value, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                S::as_mut_simd_f32s(&mut to[at(r)]).0.copy_from_slice(sums);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use unsloth_core::ops::attention::{Options, Window};

    use super::*;
    use crate::attention::forward::scratch_len;

    /// Numbers between -1 and 1 that every storage type has.
    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * seed + i / 7) % 17) as f32 / 8.0 - 1.0).collect()
    }

    /// Output row, largest score and sum of one query, in f64.
    fn plain(scores: &[f64], value: impl Fn(usize, usize) -> f64, d: usize) -> (Vec<f64>, f64, f64) {
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let weights = scores.iter().map(|s| (s - max).exp() / sum);
        let row = (0..d).map(|c| weights.clone().enumerate().map(|(j, w)| w * value(j, c)).sum()).collect();
        (row, max, sum)
    }

    const HEADS: usize = 3;

    /// Two heads beside another, tokens and rows of queries with others before them.
    fn check<T: FloatElement>(isa: Isa, (group, len, d): (usize, usize, usize), softcap: Option<f32>) {
        let options = Options { scale: 0.25, softcap, causal: false, window: Window::Full };
        let spec = Spec { dtype: T::DTYPE, num_heads: HEADS * group, num_kv_heads: HEADS, head_dim: d, options };
        let (rows, token) = (2 * group, HEADS * d);
        let (q, k, v) = (values((rows + 1) * d, 5), values((len + 2) * token, 3), values((len + 2) * token, 11));
        let stored = |x: &[f32]| x.iter().map(|&x| T::from_f32(x)).collect::<Vec<T>>();
        let (q_data, k_data, v_data) = (stored(&q), stored(&k), stored(&v));
        let q_head = Head { data: &q_data[..], num_heads: 1, head: 0, head_dim: d };
        let head = |data| Head { data, num_heads: HEADS, head: 1, head_dim: d };
        let [k_heads, v_heads] = [&k_data, &v_data].map(|data| Heads { first: head(&data[..]), count: 2 });
        let mut scratch = vec![f32::NAN; scratch_len(d, 1)];
        let block = block((&spec, isa), (q_head, 1), (k_heads, v_heads), &(2..2 + len), &mut scratch);
        for i in 0..rows {
            let at = |x: &[f32], j: usize, c: usize| f64::from(x[(j + 2) * token + (1 + i / group) * d + c]);
            let score = |j: usize| 0.25 * (0..d).map(|c| f64::from(q[(i + 1) * d + c]) * at(&k, j, c)).sum::<f64>();
            let capped = |s: f64| softcap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh());
            let scores: Vec<f64> = (0..len).map(|j| capped(score(j))).collect();
            let (expected, max, sum) = plain(&scores, |j, c| at(&v, j, c), d);
            let what = format!("{isa:?} {group} {len} {d} {softcap:?} {i}");
            let (out, of_max, of_sum) = (&block.out[i * stride(d)..][..d], block.max[i], block.sum[i]);
            if len == 0 {
                assert!(out.iter().all(|x| *x == 0.0) && (of_max, of_sum) == (f32::NEG_INFINITY, 0.0), "{what}");
                continue;
            }
            assert!((f64::from(of_max) - max).abs() < 1e-5, "{what}: {of_max} {max}");
            assert!((f64::from(of_sum) / sum - 1.0).abs() < 1e-5, "{what}: {of_sum} {sum}");
            for (actual, expected) in out.iter().zip(expected) {
                assert!((f64::from(*actual) - expected).abs() < 2e-6, "{what}: {actual} {expected}");
            }
        }
    }

    /// Every number of rows that is taken at once, keys in whole chunks and not, heads of whole vectors and not.
    #[test]
    fn rows_equal_plain_loops() {
        for isa in Isa::available() {
            for shape in [(1, 0, 64), (1, 1, 8), (2, 63, 20), (3, 64, 16), (4, 65, 64), (7, 200, 96), (8, 512, 256)] {
                for softcap in [None, Some(1.5)] {
                    check::<f32>(isa, shape, softcap);
                    check::<half::f16>(isa, shape, softcap);
                    check::<half::bf16>(isa, shape, softcap);
                }
            }
        }
    }
}
