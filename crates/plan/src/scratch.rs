//! Scratch that the CPU backend takes within one call: the lengths, in f32 elements, of the buffers that it holds at once.
//! `tests/cpu.rs` holds every number here to what the backend enters in its ledger.

use unsloth_core::{DType, Sequences, ops};

/// Queries of an attention tile.
const Q_BLOCK: usize = 64;
/// Keys of an attention tile.
const K_BLOCK: usize = 120;
/// Up to this many queries of a sequence, cached keys are visited row by row.
const MAX_ROW_QUERIES: usize = 4;
/// Elements of a chunk of logits that are made by the operator itself.
const LOGITS: usize = 8 << 20;
/// Fewest rows of such a chunk.
const MIN_ROWS: usize = 128;
/// Elements of a widened chunk of given logits.
const GIVEN_LOGITS: usize = 1 << 20;
/// Elements of a widened weight block.
const WEIGHT_BLOCK: usize = 1 << 20;
/// Rows that share a widened weight block.
const ROW_BLOCK: usize = 512;
/// Parts of the rows that a norm's weight gradient is summed in, at most, and rows of a part, at least.
const NORM_PARTS: (usize, usize) = (64, 8);

/// Distance of the rows of an attention tile: whole vectors, and one more.
fn stride(columns: usize) -> usize {
    columns.next_multiple_of(16) + 16
}

/// Tasks share a slab per thread; a single task runs on the calling thread.
fn slabs(num_tasks: usize, num_threads: usize) -> usize {
    if num_tasks < 2 { 1 } else { num_threads }
}

fn lengths(seqs: &Sequences) -> impl Iterator<Item = usize> {
    seqs.offsets().windows(2).map(|pair| pair[1] - pair[0])
}

fn forward_tiles(spec: &ops::attention::Spec, lengths: impl Iterator<Item = usize>, num_threads: usize) -> usize {
    let blocks: usize = lengths.map(|seq_q| seq_q.div_ceil(Q_BLOCK)).sum();
    let (wide, width) = (stride(spec.head_dim), stride(Q_BLOCK));
    let slab = (2 * Q_BLOCK + 2 * K_BLOCK) * wide + (spec.head_dim + K_BLOCK) * width + 3 * Q_BLOCK;
    slabs(blocks * spec.num_heads, num_threads) * slab
}

pub(crate) fn attention_forward(spec: &ops::attention::Spec, seq_q: &Sequences, num_threads: usize) -> usize {
    forward_tiles(spec, lengths(seq_q), num_threads)
}

pub(crate) fn attention_backward(spec: &ops::attention::Spec, seq_k: &Sequences, num_threads: usize) -> usize {
    let (wide, width) = (stride(spec.head_dim), stride(Q_BLOCK));
    let tiles = (3 * Q_BLOCK + 2 * K_BLOCK) * wide + 2 * (spec.head_dim + K_BLOCK) * width + 2 * Q_BLOCK;
    let slab = tiles + 2 * seq_k.max_seqlen() * wide;
    slabs(seq_k.num_seqs() * spec.num_kv_heads, num_threads) * slab
}

/// Scratch of the sequences with many queries, then, after it is given back, of those with few.
pub(crate) fn attention_cached(spec: &ops::attention::Spec, seq_q: &Sequences, num_threads: usize) -> [usize; 2] {
    let tiles = forward_tiles(spec, lengths(seq_q).filter(|&seq_q| seq_q > MAX_ROW_QUERIES), num_threads);
    let num_rows = lengths(seq_q).filter(|&seq_q| seq_q <= MAX_ROW_QUERIES).count();
    [tiles, slabs(num_rows * spec.num_heads, num_threads) * (3 * spec.head_dim + K_BLOCK)]
}

/// Elements of a block that is widened because its type is not f32.
fn widened(dtype: DType, elements: usize) -> usize {
    if dtype == DType::F32 { 0 } else { elements }
}

/// How many of `total` rows (or columns), each of `across` elements, of a weight are at work at once.
fn weight_block(dtype: DType, total: usize, across: usize) -> usize {
    if dtype == DType::F32 { total } else { (WEIGHT_BLOCK / across.max(1)).clamp(64, 4096).min(total) }
}

/// `y = x W^T + bias`: widened rows of `x`, of the weight, of the result, and the bias.
pub(crate) fn linear(spec: &ops::linear::Spec, bias: Option<DType>) -> [usize; 4] {
    let (rows, out) = (spec.rows.min(ROW_BLOCK), weight_block(spec.weight_dtype, spec.out_features, spec.in_features));
    [
        widened(spec.dtype, rows * spec.in_features),
        widened(spec.weight_dtype, out * spec.in_features),
        widened(spec.dtype, rows * out),
        bias.map_or(0, |dtype| widened(dtype, spec.out_features)),
    ]
}

/// `dx = dy W`: widened rows of `dy`, columns of the weight, and their product.
pub(crate) fn linear_input_gradient(spec: &ops::linear::Spec) -> [usize; 3] {
    let (rows, columns) =
        (spec.rows.min(ROW_BLOCK), weight_block(spec.weight_dtype, spec.in_features, spec.out_features));
    [
        widened(spec.dtype, rows * spec.out_features),
        widened(spec.weight_dtype, columns * spec.out_features),
        widened(spec.dtype, rows * columns),
    ]
}

/// Widened rows of a factor `[rows, columns]` of a product with few columns, or of one summed over the rows.
pub(crate) fn rows(dtype: DType, rows: usize, columns: usize) -> usize {
    widened(dtype, rows.min(ROW_BLOCK) * columns)
}

/// Rows of the input of a low-rank update as they are multiplied: widened, or without what is dropped.
pub(crate) fn lora_input(spec: &ops::lora_linear::Spec) -> usize {
    let elements = spec.base.rows.min(ROW_BLOCK) * spec.base.in_features;
    if spec.dropout.is_some() { elements } else { widened(spec.base.dtype, elements) }
}

/// The part of an input gradient that goes through a low-rank update, where some of it is dropped.
pub(crate) fn lora_input_gradient(spec: &ops::lora_linear::Spec) -> usize {
    let columns = weight_block(spec.base.weight_dtype, spec.base.in_features, spec.base.out_features);
    if spec.dropout.is_some() { spec.base.rows.min(ROW_BLOCK) * columns } else { 0 }
}

/// The weight with its offset, and the parts of its gradient where that is wanted.
pub(crate) fn rms_norm_backward(spec: &ops::rms_norm::Spec, with_dweight: bool) -> [usize; 2] {
    let (max_parts, min_rows) = NORM_PARTS;
    let num_parts = spec.rows.div_ceil(spec.rows.div_ceil(max_parts).max(min_rows));
    [spec.hidden_size, if with_dweight { num_parts * spec.hidden_size } else { 0 }]
}

/// Losses of the rows, and a chunk of logits.
pub(crate) fn cross_entropy(spec: &ops::cross_entropy::Spec) -> [usize; 2] {
    [spec.tokens, cross_entropy_chunk(spec)]
}

pub(crate) fn cross_entropy_chunk(spec: &ops::cross_entropy::Spec) -> usize {
    spec.tokens.min((GIVEN_LOGITS / spec.vocab_size).max(1)) * spec.vocab_size
}

/// Rows that are computed: only those with a target. Which they are is not known here; there are no more of them than in the
/// whole step.
fn rows_with_target(spec: &ops::linear_cross_entropy::Spec) -> usize {
    spec.tokens.min(spec.loss.num_targets)
}

/// Losses of the rows.
pub(crate) fn losses(spec: &ops::linear_cross_entropy::Spec) -> usize {
    rows_with_target(spec)
}

/// Gathered rows of a chunk, its logits, and a block of the weight.
pub(crate) fn loss_chunk(spec: &ops::linear_cross_entropy::Spec) -> [usize; 3] {
    let rows = rows_with_target(spec).min((LOGITS / spec.vocab_size).max(MIN_ROWS));
    let block = weight_block(spec.weight_dtype, spec.vocab_size, spec.hidden_size) * spec.hidden_size;
    [rows * spec.hidden_size, rows * spec.vocab_size, widened(spec.weight_dtype, block)]
}
