//! Exact attention in blocks; no `[seq_q, seq_k]` buffer exists.        Dao 2023 (FlashAttention-2), arXiv:2307.08691
//!
//! Per sequence and query head `h` (key head `h / (num_heads / num_kv_heads)`), with `p = i + seq_k - seq_q` the position of
//! query `i` among the keys (causal masks are aligned to the bottom right):
//! - `s = scale * q k^T`; with softcap `c`: `s = c * tanh(s / c)`; masked where `j > p` (causal) or `j < p - left` (window)
//! - `lse = ln sum_j exp s`, `P = exp(s - lse)`, `out = P v`. A fully masked row has `out = 0`, `lse = -inf`, gradients 0.
//! - `D = sum_channels(dout * out)`, `dP = dout v^T`, `ds = P * (dP - D)`, with softcap `ds *= 1 - (s / c)^2`
//! - `dq = scale * ds k`, `dk = scale * ds^T q`, `dv = P^T dout`, the last two summed over the heads of a group

use super::{
    check,
    cost::{Cost, stored},
};
use crate::{DType, KvView, Lengths, Result, Sequences, Tensor};

/// Which keys before its own position a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// All of them.
    Full,
    /// The `left` keys before its own position, and its own. Hugging Face's `sliding_window = w` is `left = w - 1`.
    Sliding {
        /// Number of earlier keys seen.
        left: usize,
    },
}

/// What the caller chooses about an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Multiplies `q k^T`; usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Whether a query sees only keys up to its own position.
    pub causal: bool,
    /// Keys before the own position.
    pub window: Window,
    /// Bounds scores smoothly to `(-softcap, softcap)` (Gemma 2).
    pub softcap: Option<f32>,
}

impl Options {
    /// Causal attention with `scale = 1 / sqrt(head_dim)`.
    pub fn causal(head_dim: usize) -> Self {
        Self { scale: 1.0 / (head_dim as f32).sqrt(), causal: true, window: Window::Full, softcap: None }
    }
}

/// What defines one attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Channels of a head, 1 to 256.
    pub head_dim: usize,
    /// Scale and masks.
    pub options: Options,
    /// Storage type of `q`, `k`, `v`, `out`; scores and statistics are f32.
    pub dtype: DType,
}

impl Spec {
    /// Two products per query, head and key that it sees; q, k, v in, out and lse out. Takes the offsets of the sequences, as
    /// [`Sequences::offsets`] gives them.
    pub fn forward_cost(&self, offsets_q: &[usize], offsets_k: &[usize]) -> Cost {
        let (tokens_q, tokens_k) = (last(offsets_q), last(offsets_k));
        self.products(2, offsets_q, lengths(offsets_k))
            + Cost::read(self.like_q(tokens_q) + 2 * self.like_k(tokens_k))
            + Cost::written(self.like_q(tokens_q) + self.lse(tokens_q))
    }

    /// Five products, one of them the scores anew; q, k, v, out, dout and lse in, dq, dk, dv out.
    pub fn backward_cost(&self, offsets_q: &[usize], offsets_k: &[usize]) -> Cost {
        let (tokens_q, tokens_k) = (last(offsets_q), last(offsets_k));
        self.products(5, offsets_q, lengths(offsets_k))
            + Cost::read(3 * self.like_q(tokens_q) + 2 * self.like_k(tokens_k) + self.lse(tokens_q))
            + Cost::written(self.like_q(tokens_q) + 2 * self.like_k(tokens_k))
    }

    /// As the forward pass, over caches that hold `lens` keys, without lse.
    pub fn cached_cost(&self, offsets_q: &[usize], lens: &[usize]) -> Cost {
        let q = self.like_q(last(offsets_q));
        self.products(2, offsets_q, lens.iter().copied())
            + Cost::read(q + 2 * self.like_k(lens.iter().sum()))
            + Cost::written(q)
    }

    /// Products over the pairs of a query and a key that it sees.
    fn products(&self, count: u64, offsets_q: &[usize], lens_k: impl Iterator<Item = usize>) -> Cost {
        let lens_q = lengths(offsets_q);
        let pairs: u64 = lens_q.zip(lens_k).map(|(seq_q, seq_k)| self.options.pairs(seq_q, seq_k)).sum();
        Cost { flops: count * 2 * pairs * (self.num_heads * self.head_dim) as u64, ..Cost::default() }
    }

    /// Bytes of a tensor like q.
    fn like_q(&self, tokens_q: usize) -> usize {
        stored(tokens_q * self.num_heads * self.head_dim, self.dtype)
    }

    /// Bytes of a tensor like k.
    fn like_k(&self, tokens_k: usize) -> usize {
        stored(tokens_k * self.num_kv_heads * self.head_dim, self.dtype)
    }

    /// Bytes of lse.
    fn lse(&self, tokens_q: usize) -> usize {
        stored(self.num_heads * tokens_q, DType::F32)
    }
}

impl Options {
    /// Pairs of a query and a key that it sees, of one sequence.
    fn pairs(&self, seq_q: usize, seq_k: usize) -> u64 {
        let seen = |query: usize| {
            // One past the query's own position among the keys; 0 for a query before the first key.
            let own = (query + 1 + seq_k).saturating_sub(seq_q);
            let end = if self.causal { own.min(seq_k) } else { seq_k };
            let start = match self.window {
                Window::Full => 0,
                Window::Sliding { left } => own.saturating_sub(left.saturating_add(1)),
            };
            end.saturating_sub(start) as u64
        };
        (0..seq_q).map(seen).sum()
    }
}

fn lengths(offsets: &[usize]) -> impl Iterator<Item = usize> {
    offsets.windows(2).map(|pair| pair[1] - pair[0])
}

fn last(offsets: &[usize]) -> usize {
    offsets.last().copied().unwrap_or(0)
}

/// Copying rows to a cache: in and out.
pub fn kv_append_cost(rows: &Tensor) -> Cost {
    Cost::of(&[rows], &[rows])
}

/// Inputs of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[tokens_q, num_heads, head_dim]`
    pub q: &'a Tensor,
    /// `[tokens_k, num_kv_heads, head_dim]`
    pub k: &'a Tensor,
    /// `[tokens_k, num_kv_heads, head_dim]`
    pub v: &'a Tensor,
    /// Sequences of the queries.
    pub seq_q: &'a Sequences,
    /// Sequences of the keys, as many as of the queries.
    pub seq_k: &'a Sequences,
}

/// Results of the forward pass.
#[derive(Debug)]
pub struct Forward {
    /// `[tokens_q, num_heads, head_dim]`
    pub out: Tensor,
    /// f32 `[num_heads, tokens_q]`, natural log.
    pub lse: Tensor,
}

/// What the backward pass reads besides the inputs.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// Gradient of `out`.
    pub dout: &'a Tensor,
    /// From the forward pass.
    pub out: &'a Tensor,
    /// From the forward pass.
    pub lse: &'a Tensor,
}

/// Gradients of the inputs.
#[derive(Debug)]
pub struct Gradients {
    /// `[tokens_q, num_heads, head_dim]`
    pub dq: Tensor,
    /// `[tokens_k, num_kv_heads, head_dim]`
    pub dk: Tensor,
    /// `[tokens_k, num_kv_heads, head_dim]`
    pub dv: Tensor,
}

/// Attention of a backend.
pub trait Attention {
    /// `out` and `lse`.
    fn attention_forward(&self, spec: &Spec, inputs: Inputs<'_>) -> Result<Forward>;
    /// Gradients by recomputing the probabilities from `lse`.
    fn attention_backward(&self, spec: &Spec, inputs: Inputs<'_>, backward: Backward<'_>) -> Result<Gradients>;
    /// `out` of queries against cached keys, where sequence `s` has `kv.lens[s]` keys, its newest ones included.
    fn attention_cached(&self, spec: &Spec, q: &Tensor, seq_q: &Sequences, kv: KvView<'_>) -> Result<Tensor>;
    /// Copies the rows of sequence `s` to `cache[s, start[s] ..]`; `cache` is `[num_seqs, capacity, num_kv_heads, head_dim]`.
    fn kv_append(&self, cache: &mut Tensor, rows: &Tensor, seqs: &Sequences, start: &Lengths) -> Result<()>;
}

const OP: &str = "attention";

fn spec(q: &Tensor, num_kv_heads: usize, options: Options) -> Result<Spec> {
    check::float(OP, "q", q.dtype())?;
    check::rank(OP, "q", q, 3, "[tokens, num_heads, head_dim]")?;
    let (num_heads, head_dim) = (q.shape()[1], q.shape()[2]);
    if num_kv_heads == 0 || num_heads % num_kv_heads != 0 {
        return check::invalid(OP, "num_kv_heads", num_kv_heads, "a divisor of num_heads");
    }
    if !(1..=256).contains(&head_dim) {
        return check::invalid(OP, "head_dim", head_dim, "1 to 256");
    }
    if !options.scale.is_finite() {
        return check::invalid(OP, "scale", options.scale, "finite");
    }
    if let Some(softcap) = options.softcap {
        check::positive(OP, "softcap", softcap)?;
    }
    Ok(Spec { num_heads, num_kv_heads, head_dim, options, dtype: q.dtype() })
}

fn sequences(arg: &'static str, seqs: &Sequences, tokens: usize, q: &Tensor) -> Result<()> {
    check::on(OP, arg, seqs.cu_seqlens().device(), q.device())?;
    if seqs.num_tokens() != tokens {
        return check::invalid(OP, arg, seqs.num_tokens(), "as many tokens as the tensor has rows");
    }
    Ok(())
}

fn check_inputs(inputs: &Inputs<'_>, options: Options) -> Result<Spec> {
    let Inputs { q, k, v, seq_q, seq_k } = *inputs;
    check::rank(OP, "k", k, 3, "[tokens, num_kv_heads, head_dim]")?;
    let spec = spec(q, k.shape()[1], options)?;
    let keys = (&[k.shape()[0], spec.num_kv_heads, spec.head_dim][..], spec.dtype, q.device());
    check::tensor(OP, "k", k, keys)?;
    check::tensor(OP, "v", v, keys)?;
    sequences("seq_q", seq_q, q.shape()[0], q)?;
    sequences("seq_k", seq_k, k.shape()[0], q)?;
    if seq_q.num_seqs() != seq_k.num_seqs() {
        return check::invalid(OP, "seq_k", seq_k.num_seqs(), "as many sequences as seq_q");
    }
    Ok(spec)
}

/// Attention of packed sequences.
///
/// # Errors
/// Shape, dtype or device mismatch; a field of `options` out of its range; sequences that do not match the tensors.
pub fn forward(inputs: Inputs<'_>, options: Options) -> Result<Forward> {
    let spec = check_inputs(&inputs, options)?;
    inputs.q.device().backend().attention_forward(&spec, inputs)
}

/// Gradients of `q`, `k`, `v`.
///
/// # Errors
/// As [`forward`].
pub fn backward(inputs: Inputs<'_>, backward: Backward<'_>, options: Options) -> Result<Gradients> {
    let spec = check_inputs(&inputs, options)?;
    let (shape, device) = (inputs.q.shape(), inputs.q.device());
    check::tensor(OP, "dout", backward.dout, (shape, spec.dtype, device))?;
    check::tensor(OP, "out", backward.out, (shape, spec.dtype, device))?;
    check::tensor(OP, "lse", backward.lse, (&[spec.num_heads, shape[0]], DType::F32, device))?;
    device.backend().attention_backward(&spec, inputs, backward)
}

fn check_cache(
    arg: &'static str,
    cache: &Tensor,
    num_seqs: usize,
    row: (usize, usize),
    like: &Tensor,
) -> Result<usize> {
    check::rank(OP, arg, cache, 4, "[num_seqs, capacity, num_kv_heads, head_dim]")?;
    let capacity = cache.shape()[1];
    check::tensor(OP, arg, cache, (&[num_seqs, capacity, row.0, row.1], like.dtype(), like.device()))?;
    Ok(capacity)
}

/// Attention of new queries against cached keys and values: generation. No gradient.
///
/// # Errors
/// Shape, dtype or device mismatch; a length above the cache's capacity.
pub fn cached(q: &Tensor, seq_q: &Sequences, kv: KvView<'_>, options: Options) -> Result<Tensor> {
    check::rank(OP, "k", kv.k, 4, "[num_seqs, capacity, num_kv_heads, head_dim]")?;
    let spec = spec(q, kv.k.shape()[2], options)?;
    sequences("seq_q", seq_q, q.shape()[0], q)?;
    let row = (spec.num_kv_heads, spec.head_dim);
    let capacity = check_cache("k", kv.k, seq_q.num_seqs(), row, q)?;
    check::tensor(OP, "v", kv.v, (kv.k.shape(), spec.dtype, q.device()))?;
    if kv.lens.host().len() != seq_q.num_seqs() {
        return check::invalid(OP, "lens", kv.lens.host().len(), "one length per sequence");
    }
    if let Some(&length) = kv.lens.host().iter().find(|&&length| length > capacity) {
        return check::invalid(OP, "lens", length, "at most the cache's capacity");
    }
    q.device().backend().attention_cached(&spec, q, seq_q, kv)
}

/// Appends the new rows `[tokens, num_kv_heads, head_dim]` of each sequence to its cache, from `start[s]` on.
///
/// # Errors
/// Shape, dtype or device mismatch; rows that do not fit the capacity; [`crate::Error::Shared`].
pub fn kv_append(cache: &mut Tensor, rows: &Tensor, seqs: &Sequences, start: &Lengths) -> Result<()> {
    check::float(OP, "rows", rows.dtype())?;
    check::rank(OP, "rows", rows, 3, "[tokens, num_kv_heads, head_dim]")?;
    sequences("seqs", seqs, rows.shape()[0], rows)?;
    let capacity = check_cache("cache", cache, seqs.num_seqs(), (rows.shape()[1], rows.shape()[2]), rows)?;
    if start.host().len() != seqs.num_seqs() {
        return check::invalid(OP, "start", start.host().len(), "one start per sequence");
    }
    for (pair, &start) in seqs.offsets().windows(2).zip(start.host()) {
        if start + (pair[1] - pair[0]) > capacity {
            return check::invalid(OP, "start", start, "so that the new rows fit the cache's capacity");
        }
    }
    let device = rows.device().clone();
    device.backend().kv_append(cache, rows, seqs, start)
}
