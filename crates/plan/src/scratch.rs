//! Scratch that the CPU backend takes within one call: the lengths, in f32 elements, of the buffers that it holds at once.
//! `tests/cpu.rs` holds every number here to what the backend enters in its ledger.

use unsloth_core::{DType, Lengths, Sequences, ops};

/// Queries of an attention tile.
const Q_BLOCK: usize = 64;
/// Keys of an attention tile.
const K_BLOCK: usize = 120;
/// Up to this many queries of a sequence, each visits cached keys for itself.
const MAX_ROW_QUERIES: usize = 4;
/// Keys that it visits in one task.
const CACHED_KEYS: usize = 4 * K_BLOCK;
/// Elements of a chunk of logits that are made by the operator itself.
const LOGITS: usize = 8 << 20;
/// Fewest rows of such a chunk.
const MIN_ROWS: usize = 128;
/// Rows and columns of a task of a product, at most; rows of its left factor, and elements of the dimension summed over, that
/// are packed at a time.
const PRODUCT: Product = Product { rows: 504, cols: 480, strip: 96, depth: 256 };
/// Rows of which dropout is at work at once.
const DROPOUT_ROWS: usize = 512;
/// Products of fewer multiplications run on one thread.
const SMALL_PRODUCT: usize = 64 * 64 * 64;
/// Up to this many rows are not packed.
pub(crate) const FEW_ROWS: usize = 2;
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

/// Tiles of a task of the forward pass.
fn forward_slab(spec: &ops::attention::Spec) -> usize {
    let (wide, width) = (stride(spec.head_dim), stride(Q_BLOCK));
    (2 * Q_BLOCK + 2 * K_BLOCK) * wide + (spec.head_dim + K_BLOCK + K_BLOCK / 2) * width + 3 * Q_BLOCK
}

fn forward_tiles(spec: &ops::attention::Spec, lengths: impl Iterator<Item = usize>, num_threads: usize) -> usize {
    let blocks: usize = lengths.map(|seq_q| seq_q.div_ceil(Q_BLOCK)).sum();
    slabs(blocks * spec.num_heads, num_threads) * forward_slab(spec)
}

pub(crate) fn attention_forward(spec: &ops::attention::Spec, seq_q: &Sequences, num_threads: usize) -> usize {
    forward_tiles(spec, lengths(seq_q), num_threads)
}

pub(crate) fn attention_backward(spec: &ops::attention::Spec, seq_k: &Sequences, num_threads: usize) -> usize {
    let (wide, width) = (stride(spec.head_dim), stride(Q_BLOCK));
    let scores = 2 * (spec.head_dim + K_BLOCK) + K_BLOCK / 2;
    let tiles = (3 * Q_BLOCK + 2 * K_BLOCK) * wide + scores * width + 2 * Q_BLOCK;
    let slab = tiles + 2 * seq_k.max_seqlen() * wide;
    slabs(seq_k.num_seqs() * spec.num_kv_heads, num_threads) * slab
}

/// Scratch of the sequences with many queries.
pub(crate) fn attention_cached(spec: &ops::attention::Spec, seq_q: &Sequences, num_threads: usize) -> usize {
    forward_tiles(spec, lengths(seq_q).filter(|&seq_q| seq_q > MAX_ROW_QUERIES), num_threads)
}

/// Scratch of the sequences with few queries: what is known of each row after each part of the keys, and tiles.
pub(crate) fn attention_cached_rows(
    spec: &ops::attention::Spec,
    (seq_q, seq_k): (&Sequences, &Lengths),
    num_threads: usize,
) -> [usize; 2] {
    let few = lengths(seq_q).zip(seq_k.host()).filter(|&(seq_q, _)| seq_q <= MAX_ROW_QUERIES);
    let parts: usize = few.map(|(seq_q, seq_k)| seq_q * seq_k.div_ceil(CACHED_KEYS).max(1)).sum();
    let partials = parts * spec.num_heads * (spec.head_dim + 2);
    [partials, slabs(parts * spec.num_kv_heads, num_threads) * forward_slab(spec)]
}

struct Product {
    rows: usize,
    cols: usize,
    strip: usize,
    depth: usize,
}

/// Whether a product is one of f32 alone, which takes no scratch.
pub(crate) fn all_f32<const N: usize>(dtypes: [DType; N]) -> bool {
    dtypes.iter().all(|&dtype| dtype == DType::F32)
}

/// Panels and sums of a product `[rows, cols]` that sums over `depth` elements.
pub(crate) fn product(all_f32: bool, [rows, cols, depth]: [usize; 3], num_threads: usize) -> usize {
    if all_f32 || rows == 0 || cols == 0 {
        return 0;
    }
    let slabs = if rows * cols * depth < SMALL_PRODUCT { 1 } else { num_threads };
    let (rows, cols, depth) = (rows.next_multiple_of(24), cols.next_multiple_of(48), depth.min(PRODUCT.depth));
    let left = (rows.min(PRODUCT.strip) / 6 * 8 * depth).next_multiple_of(16);
    slabs * (left + cols.min(PRODUCT.cols) * depth + rows.min(PRODUCT.rows) * cols.min(PRODUCT.cols))
}

/// [`product`] with a factor that is read by whole rows: few of them are widened instead.
pub(crate) fn product_of_rows(
    dtype: DType,
    all_f32: bool,
    [rows, cols, depth]: [usize; 3],
    num_threads: usize,
) -> usize {
    match rows > FEW_ROWS || cols == 0 {
        true => product(all_f32, [rows, cols, depth], num_threads),
        false if dtype == DType::F32 => 0,
        false => rows * depth,
    }
}

/// Elements of the rows of which dropout is at work at once, and those rows.
fn dropped(spec: &ops::lora_linear::Spec) -> (usize, usize) {
    let rows = spec.base.rows.min(DROPOUT_ROWS);
    (rows * spec.base.in_features, rows)
}

/// The input of a low-rank update without what is dropped, and its product with the adapter's first matrix.
pub(crate) fn lora_input(spec: &ops::lora_linear::Spec, num_threads: usize) -> [usize; 2] {
    let (base, rank) = (&spec.base, spec.rank);
    if spec.dropout.is_none() {
        let all_f32 = all_f32([base.dtype, spec.adapter_dtype]);
        return [0, product_of_rows(base.dtype, all_f32, [base.rows, rank, base.in_features], num_threads)];
    }
    let (elements, rows) = dropped(spec);
    let all_f32 = all_f32([spec.adapter_dtype]);
    [elements, product_of_rows(DType::F32, all_f32, [rows, rank, base.in_features], num_threads)]
}

/// The same input, and its product with the gradient of the update.
pub(crate) fn lora_input_transposed(spec: &ops::lora_linear::Spec, num_threads: usize) -> [usize; 2] {
    let (elements, rows) = if spec.dropout.is_some() { dropped(spec) } else { (0, spec.base.rows) };
    let all_f32 = spec.dropout.is_some() || all_f32([spec.base.dtype]);
    [elements, product(all_f32, [spec.rank, spec.base.in_features, rows], num_threads)]
}

/// An input gradient in f32 where the update's is dropped from and it is not f32 itself, and the largest of its products.
pub(crate) fn lora_input_gradient(spec: &ops::lora_linear::Spec, num_threads: usize) -> [usize; 2] {
    let (base, rank) = (&spec.base, spec.rank);
    let by_blocks = spec.dropout.is_some() && base.dtype != DType::F32;
    let (elements, rows) = if by_blocks { dropped(spec) } else { (0, base.rows) };
    let (of_base, of_update) = (all_f32([base.dtype, base.weight_dtype]), all_f32([spec.adapter_dtype]));
    let size = |depth| [rows, base.in_features, depth];
    let products = if spec.dropout.is_some() {
        let update = product(of_update, size(rank), num_threads);
        update.max(product(of_base, size(base.out_features), num_threads))
    } else {
        product(of_base && of_update, size(base.out_features.max(rank)), num_threads)
    };
    [elements, products]
}

/// The weight with its offset, and the parts of its gradient where that is wanted.
pub(crate) fn rms_norm_backward(spec: &ops::rms_norm::Spec, with_dweight: bool) -> [usize; 2] {
    let (max_parts, min_rows) = NORM_PARTS;
    let num_parts = spec.rows.div_ceil(spec.rows.div_ceil(max_parts).max(min_rows));
    [spec.hidden_size, if with_dweight { num_parts * spec.hidden_size } else { 0 }]
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

/// Gathered rows of a chunk, its logits, and the largest of the products' scratch.
pub(crate) fn loss_chunk(spec: &ops::linear_cross_entropy::Spec, with_dweight: bool, num_threads: usize) -> [usize; 3] {
    let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
    let rows = rows_with_target(spec).min((LOGITS / vocab).max(MIN_ROWS));
    let (x, weight) = (all_f32([spec.dtype]), all_f32([spec.weight_dtype]));
    let logits = product_of_rows(spec.dtype, x && weight, [rows, vocab, hidden], num_threads);
    let dweight = if with_dweight { product(x, [vocab, hidden, rows], num_threads) } else { 0 };
    let dx = if spec.needs_dx { product(weight, [rows, hidden, vocab], num_threads) } else { 0 };
    [rows * hidden, rows * vocab, logits.max(dweight).max(dx)]
}

/// Sums over the columns of each part of a matrix.
pub(crate) fn adafactor(rows: usize, columns: usize) -> usize {
    const MAX_PARTS: usize = 16;
    if rows * columns == 0 { 0 } else { rows.div_ceil(rows.div_ceil(MAX_PARTS)) * columns }
}
