//! Scratch that the CPU backend uses within one call, in f32 elements. Only what is large enough to move a peak is modelled; the
//! comparison with a measured run holds these numbers to the backend's.

use unsloth_core::{DType, ops};

/// Queries of an attention tile.
const Q_BLOCK: usize = 64;
/// Keys of an attention tile.
const K_BLOCK: usize = 128;
/// Elements of a chunk of logits.
const LOGITS: usize = 8 << 20;
/// Fewest rows of a chunk of logits.
const MIN_ROWS: usize = 128;
/// Elements of a widened weight block.
const WEIGHT_BLOCK: usize = 1 << 20;
/// Rows that share a widened weight block.
const ROW_BLOCK: usize = 512;

pub(crate) fn attention_forward(spec: &ops::attention::Spec, num_threads: usize) -> usize {
    let d = spec.head_dim;
    num_threads * (2 * Q_BLOCK * d + 2 * K_BLOCK * d + Q_BLOCK * K_BLOCK + 2 * Q_BLOCK)
}

pub(crate) fn attention_backward(spec: &ops::attention::Spec, max_seqlen_k: usize, num_threads: usize) -> usize {
    let d = spec.head_dim;
    let tiles = 3 * Q_BLOCK * d + 2 * K_BLOCK * d + 2 * Q_BLOCK * K_BLOCK + Q_BLOCK;
    num_threads * (tiles + 2 * max_seqlen_k * d)
}

/// Blocks of activations and weights that are widened to f32 for one product.
pub(crate) fn linear(spec: &ops::linear::Spec) -> usize {
    let rows = spec.rows.min(ROW_BLOCK);
    let inputs = if spec.dtype == DType::F32 { 0 } else { rows * spec.in_features.max(spec.out_features) };
    let columns = |across: usize| (WEIGHT_BLOCK / across.max(1)).clamp(64, 4096);
    let weight = if spec.weight_dtype == DType::F32 {
        0
    } else {
        spec.in_features * columns(spec.in_features).min(spec.out_features)
    };
    let result = if spec.dtype == DType::F32 { 0 } else { rows * columns(spec.in_features).min(spec.out_features) };
    inputs + weight + result
}

/// Logits of a chunk and its gathered rows.
pub(crate) fn linear_cross_entropy(spec: &ops::linear_cross_entropy::Spec) -> usize {
    let rows = spec.tokens.min((LOGITS / spec.vocab_size).max(MIN_ROWS));
    let columns = (WEIGHT_BLOCK / spec.hidden_size.max(1)).clamp(64, 4096).min(spec.vocab_size);
    let weight = if spec.weight_dtype == DType::F32 { 0 } else { columns * spec.hidden_size };
    rows * (spec.vocab_size + spec.hidden_size) + weight + spec.tokens
}
