//! Flash attention in tiles of f32: scores exist for one tile at a time.
//!
//! Work is cut into tasks by sequence, head and block, never by the number of threads, and every task runs on one thread: the
//! bits of a sequence depend on that sequence only, whether it is packed with others or alone.

#[cfg(target_arch = "x86_64")]
mod amx;
mod backward;
mod cached;
mod factor;
mod forward;
mod rows;
mod tile;

use unsloth_core::{
    Category, DType, KvView, Lengths, Result, Sequences, Tensor,
    ops::attention::{Attention, Backward, Forward, Gradients, Inputs, Options, Spec, Window},
};

use crate::{
    CpuBackend,
    access::{dispatch_float, output},
};

/// Queries of a tile. Keys and values are put in order for products once for so many.
const Q_BLOCK: usize = 128;
/// Keys of a tile: whole tiles of AMX, in either direction. Scores of a tile fit the second-level cache several times.
const K_BLOCK: usize = 128;
/// Queries whose softmax is taken at once: two vectors of AVX2 or one of AVX-512.
const LANES: usize = 16;

/// Which keys the queries of one sequence see.
#[derive(Clone, Copy)]
struct Visible {
    seq_q: usize,
    seq_k: usize,
    causal: bool,
    left: Option<usize>,
}

impl Visible {
    fn new(options: &Options, seq_q: usize, seq_k: usize) -> Self {
        let left = match options.window {
            Window::Full => None,
            Window::Sliding { left } => Some(left),
        };
        Self { seq_q, seq_k, causal: options.causal, left }
    }

    /// Keys of query `i`; both ends grow with `i`.
    fn keys(&self, i: usize) -> std::ops::Range<usize> {
        // One past the query's own position, counted from `seq_q` keys before the first one so that it is never negative.
        let next = i + self.seq_k + 1;
        let end = if self.causal { next.saturating_sub(self.seq_q).min(self.seq_k) } else { self.seq_k };
        let start = self.left.map_or(0, |left| next.saturating_sub(self.seq_q.saturating_add(left).saturating_add(1)));
        start.min(end)..end
    }

    /// Keys that some query of a block sees.
    fn keys_of_block(&self, queries: &std::ops::Range<usize>) -> std::ops::Range<usize> {
        self.keys(queries.start).start..self.keys(queries.end - 1).end
    }

    /// Whether the range of keys that a block of queries sees has some of a tile.
    fn sees_any(&self, queries: &std::ops::Range<usize>, tile: &std::ops::Range<usize>) -> bool {
        let keys = self.keys_of_block(queries);
        keys.start < tile.end && tile.start < keys.end
    }

    /// Queries that see key `j`; both ends grow with `j`.
    #[inline(always)]
    fn queries(&self, j: usize) -> std::ops::Range<usize> {
        let own = j + self.seq_q;
        let start = if self.causal { own.saturating_sub(self.seq_k) } else { 0 };
        let end =
            self.left.map_or(self.seq_q, |left| own.saturating_add(left).saturating_add(1).saturating_sub(self.seq_k));
        start.min(self.seq_q)..end.min(self.seq_q)
    }

    /// Writes `value` over the entries of a tile `[keys, queries]` that are masked.
    #[inline(always)]
    fn mask(&self, queries: &std::ops::Range<usize>, keys: &std::ops::Range<usize>, tile: &mut [f32], value: f32) {
        let all = self.keys(queries.end - 1).start <= keys.start && keys.end <= self.keys(queries.start).end;
        if all {
            return;
        }
        for (j, row) in keys.clone().zip(tile.chunks_exact_mut(tile::stride(queries.len()))) {
            let seen = self.queries(j);
            let from = seen.start.clamp(queries.start, queries.end) - queries.start;
            let to = seen.end.clamp(queries.start, queries.end) - queries.start;
            row[..from].fill(value);
            row[to.max(from)..].fill(value);
        }
    }

    /// The tiles of keys that `queries` have to visit, aligned to [`K_BLOCK`] and cut where nothing is seen.
    fn tiles(&self, queries: &std::ops::Range<usize>) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let keys = self.keys_of_block(queries);
        let first = keys.start / K_BLOCK * K_BLOCK;
        (first..keys.end).step_by(K_BLOCK).map(move |start| start..keys.end.min(start + K_BLOCK))
    }
}

/// One sequence: where its rows start, and its mask.
#[derive(Clone, Copy)]
struct Sequence {
    first_q: usize,
    first_k: usize,
    visible: Visible,
}

/// The sequences of a packed call.
fn packed(options: &Options, seq_q: &Sequences, seq_k: &Sequences) -> Vec<Sequence> {
    let pairs = seq_q.offsets().windows(2).zip(seq_k.offsets().windows(2));
    let sequence = |(q, k): (&[usize], &[usize])| Sequence {
        first_q: q[0],
        first_k: k[0],
        visible: Visible::new(options, q[1] - q[0], k[1] - k[0]),
    };
    pairs.map(sequence).collect()
}

/// Cuts the first `len` elements off.
fn take<'a>(slab: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, rest) = std::mem::take(slab).split_at_mut(len);
    *slab = rest;
    front
}

impl Attention for CpuBackend {
    fn attention_forward(&self, spec: &Spec, inputs: Inputs<'_>) -> Result<Forward> {
        let mut out = output(inputs.q, spec.dtype, *inputs.q.shape(), Category::Activations)?;
        let tokens_q = inputs.q.shape()[0];
        let mut lse = output(inputs.q, DType::F32, [spec.num_heads, tokens_q], Category::Activations)?;
        let sequences = packed(&spec.options, inputs.seq_q, inputs.seq_k);
        let keys = (inputs.k, inputs.v);
        dispatch_float!(spec.dtype, T => {
            forward::run::<T>(self, spec, (inputs.q, keys), &sequences, (&mut out, Some(&mut lse)))?;
        });
        Ok(Forward { out, lse })
    }

    fn attention_backward(&self, spec: &Spec, inputs: Inputs<'_>, backward: Backward<'_>) -> Result<Gradients> {
        let like = |x: &Tensor| output(x, spec.dtype, *x.shape(), Category::Activations);
        let mut gradients = Gradients { dq: like(inputs.q)?, dk: like(inputs.k)?, dv: like(inputs.v)? };
        dispatch_float!(spec.dtype, T => backward::run::<T>(self, spec, inputs, backward, &mut gradients)?);
        Ok(gradients)
    }

    fn attention_cached(&self, spec: &Spec, q: &Tensor, seq_q: &Sequences, kv: KvView<'_>) -> Result<Tensor> {
        let mut out = output(q, spec.dtype, *q.shape(), Category::Activations)?;
        dispatch_float!(spec.dtype, T => cached::run::<T>(self, spec, (q, seq_q, kv), &mut out)?);
        Ok(out)
    }

    fn kv_append(&self, cache: &mut Tensor, rows: &Tensor, seqs: &Sequences, start: &Lengths) -> Result<()> {
        dispatch_float!(rows.dtype(), T => cached::append::<T>(cache, rows, seqs, start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mask as the contract words it.
    fn sees(visible: &Visible, i: usize, j: usize) -> bool {
        let p = i as i64 + visible.seq_k as i64 - visible.seq_q as i64;
        let j = j as i64;
        let after = visible.causal && j > p;
        let before = visible.left.is_some_and(|left| j < p.saturating_sub_unsigned(left as u64));
        !after && !before
    }

    #[test]
    fn ranges_and_tiles_equal_the_mask() {
        for (seq_q, seq_k) in [(1, 1), (5, 5), (3, 9), (9, 3), (4, 0), (130, 300), (300, 130)] {
            for causal in [false, true] {
                for left in [None, Some(0), Some(1), Some(4), Some(129), Some(usize::MAX)] {
                    let visible = Visible { seq_q, seq_k, causal, left };
                    for i in 0..seq_q {
                        let expected: Vec<usize> = (0..seq_k).filter(|&j| sees(&visible, i, j)).collect();
                        assert_eq!(
                            visible.keys(i).collect::<Vec<_>>(),
                            expected,
                            "{seq_q} {seq_k} {causal} {left:?} {i}"
                        );
                    }
                    for j in 0..seq_k {
                        let expected: Vec<usize> = (0..seq_q).filter(|&i| sees(&visible, i, j)).collect();
                        assert_eq!(
                            visible.queries(j).collect::<Vec<_>>(),
                            expected,
                            "{seq_q} {seq_k} {causal} {left:?} {j}"
                        );
                    }
                    for start in (0..seq_q).step_by(Q_BLOCK) {
                        let queries = start..seq_q.min(start + Q_BLOCK);
                        let tiles: Vec<usize> = visible.tiles(&queries).flatten().collect();
                        assert!(tiles.is_sorted() && tiles.iter().all(|&j| j < seq_k));
                        assert!(queries.flat_map(|i| visible.keys(i)).all(|j| tiles.binary_search(&j).is_ok()));
                    }
                }
            }
        }
    }
}
