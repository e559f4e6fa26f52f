//! Scratch that the CPU backend takes within one call: the lengths, in f32 elements, of the buffers that it holds at once.
//! `tests/cpu.rs` holds every number here to what the backend enters in its ledger.

use unsloth_core::{DType, Lengths, Sequences, ops};

/// Queries of an attention tile.
const Q_BLOCK: usize = 128;
/// Keys of an attention tile.
const K_BLOCK: usize = 128;
/// Blocks of queries that visit keys together: in the forward pass at most, and in the backward pass.
const UNITS: [usize; 2] = [4, 2];
/// Up to this many queries of a sequence, each visits cached keys for itself.
const MAX_ROW_QUERIES: usize = 4;
/// Keys that it visits in one task.
const CACHED_KEYS: usize = 4 * K_BLOCK;
/// Elements of a chunk of logits that are made by the operator itself.
const LOGITS: usize = 8 << 20;
/// Rows of such a chunk where so many logits are no more than [`MOST_LOGITS`].
const LOSS_ROWS: usize = 256;
const MOST_LOGITS: usize = 42 << 20;
/// Fewest rows of such a chunk.
const MIN_ROWS: usize = 128;
/// Columns of a task of a product, and elements of the dimension summed over in a panel and in all panels at hand, at most.
const PRODUCT: Product = Product { cols: 256, depth: 1024, stage: 1024 + 128 };
/// Elements of a left factor that are packed at once where the dimension summed over may be cut, or so many rows where those
/// are more.
const LEFT_CUT: (usize, usize) = (9 << 18, 768);
/// The same where only rows may be cut.
const LEFT: (usize, usize) = (8 << 20, 192);
/// A product is computed as its transpose where it has so few columns, and so many times more rows.
const NARROW: (usize, usize) = (64, 4);
/// Rows of which dropout is at work at once.
const DROPOUT_ROWS: usize = 512;
/// Products of fewer multiplications run on one thread.
const SMALL_PRODUCT: usize = 64 * 64 * 64;
/// Rows of a tile, on any path, divide it.
const ROW_UNIT: usize = 96;
/// Up to this many rows are not packed, where the other factor is f32.
const FEW_ROWS: usize = 2;
/// Parts of the rows that gradients of a norm's parameters are summed in, at most, and rows of a part, at least.
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

/// Elements of a factor of an attention tile that is packed in three parts.
fn packed(lines: usize, depth: usize) -> usize {
    3 * lines.next_multiple_of(16) * depth.div_ceil(2).next_multiple_of(16)
}

/// Room for rows of `d` channels as a factor that sums over channels or over rows.
fn factor(rows: usize, d: usize) -> usize {
    (rows * stride(d)).max(packed(rows, d)).max(packed(d, rows))
}

/// Room for one of either kind.
fn factors(rows: usize, d: usize) -> usize {
    (rows * stride(d)).max(packed(rows, d) + packed(d, rows))
}

/// Room for their columns as a factor.
fn columns(rows: usize, d: usize) -> usize {
    (d * stride(rows)).max(packed(rows, d))
}

/// Room for scores `[keys, queries]` as a factor.
fn scores(k: usize, q: usize) -> usize {
    (k.div_ceil(2) * stride(q)).max(packed(k, q)).max(packed(q, k))
}

/// Tiles of a task of the forward pass in which so many blocks of queries visit keys together.
fn forward_slab(spec: &ops::attention::Spec, num_units: usize) -> usize {
    let (d, width) = (spec.head_dim, stride(Q_BLOCK));
    let own = columns(Q_BLOCK, d) + d * width + 3 * Q_BLOCK;
    Q_BLOCK * stride(d) + 2 * factor(K_BLOCK, d) + K_BLOCK * width + scores(K_BLOCK, Q_BLOCK) + num_units * own
}

fn forward_tiles(spec: &ops::attention::Spec, lengths: impl Iterator<Item = usize>, num_threads: usize) -> usize {
    let lengths: Vec<usize> = lengths.collect();
    let blocks: usize = lengths.iter().map(|seq_q| seq_q.div_ceil(Q_BLOCK)).sum();
    let num_units = (blocks * spec.num_heads / (8 * num_threads)).clamp(1, UNITS[0]);
    let group = spec.num_heads / spec.num_kv_heads.max(1);
    let num_heads = group.clamp(1, num_units);
    let of_heads = group.div_ceil(num_heads) * spec.num_kv_heads;
    let of_queries = |seq_q: &usize| seq_q.div_ceil(num_units / num_heads * Q_BLOCK);
    let num_tasks = lengths.iter().map(of_queries).sum::<usize>() * of_heads;
    slabs(num_tasks, num_threads) * forward_slab(spec, num_units)
}

pub(crate) fn attention_forward(spec: &ops::attention::Spec, seq_q: &Sequences, num_threads: usize) -> usize {
    forward_tiles(spec, lengths(seq_q), num_threads)
}

pub(crate) fn attention_backward(
    spec: &ops::attention::Spec,
    (seq_q, seq_k): (&Sequences, &Sequences),
    num_threads: usize,
) -> usize {
    let (d, wide) = (spec.head_dim, stride(spec.head_dim));
    let (q, k) = (seq_q.max_seqlen().min(Q_BLOCK), seq_k.max_seqlen().min(K_BLOCK));
    let shared = (q + 2 * seq_k.max_seqlen()) * wide + 2 * k * stride(q) + factors(k, d) + factor(k, d) + scores(k, q);
    let own = 2 * (factor(q, d) + columns(q, d) + q.next_multiple_of(16)) + d * stride(q);
    let slab = shared + seq_q.max_seqlen().div_ceil(Q_BLOCK).min(UNITS[1]) * own;
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
    [partials, slabs(parts * spec.num_kv_heads, num_threads) * forward_slab(spec, 1)]
}

struct Product {
    cols: usize,
    depth: usize,
    stage: usize,
}

/// Rows and elements of the dimension summed over of a left factor that are packed at once; the latter may be cut where the
/// result is f32.
fn packed_left(rows: usize, depth: usize, may_cut: bool) -> (usize, usize) {
    let (elements, min_rows) = if may_cut { LEFT_CUT } else { LEFT };
    if rows * depth <= elements {
        return (rows, depth);
    }
    let even = |total: usize, most: usize, unit: usize| total.div_ceil(total.div_ceil(most)).next_multiple_of(unit);
    let rows = rows.min(even(rows, (elements / depth / ROW_UNIT * ROW_UNIT).max(min_rows), ROW_UNIT));
    let step = (elements / rows / PRODUCT.depth).max(1) * PRODUCT.depth;
    (rows, if may_cut { depth.min(even(depth, step, PRODUCT.depth)) } else { depth })
}

/// Panels and sums of a product `[rows, cols]` that sums over `depth` elements of all its terms, and its transpose where that is
/// what is computed.
pub(crate) fn product(may_cut: bool, [rows, cols, depth]: [usize; 3], num_threads: usize) -> usize {
    let (most_cols, ratio) = NARROW;
    if cols <= most_cols && cols * ratio <= rows {
        return (rows * cols).next_multiple_of(16) + panels(true, [cols, rows, depth], num_threads);
    }
    panels(may_cut, [rows, cols, depth], num_threads)
}

fn panels(may_cut: bool, [rows, cols, depth]: [usize; 3], num_threads: usize) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    let num_threads = if rows * cols * depth < SMALL_PRODUCT { 1 } else { num_threads };
    let (rows, depth) = packed_left(rows, depth, may_cut);
    let (cols, length) = (cols.next_multiple_of(64).min(PRODUCT.cols), (depth.next_multiple_of(32) + 32) * 3 / 2);
    let sums = rows.next_multiple_of(32).max(rows.next_multiple_of(6)) * cols;
    rows.next_multiple_of(16) * length + num_threads * (cols * length.min(PRODUCT.stage) + sums)
}

/// Whether a product of factors that are read by whole rows does not pack them.
pub(crate) fn is_few(rows: usize, right: DType) -> bool {
    rows <= if right == DType::F32 { FEW_ROWS } else { 1 }
}

/// [`product`] with a factor that is read by whole rows: few of them are widened instead.
pub(crate) fn product_of_rows(
    (dtype, right): (DType, DType),
    may_cut: bool,
    [rows, cols, depth]: [usize; 3],
    num_threads: usize,
) -> usize {
    match !is_few(rows, right) || cols == 0 {
        true => product(may_cut, [rows, cols, depth], num_threads),
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
        return [
            0,
            product_of_rows((base.dtype, spec.adapter_dtype), true, [base.rows, rank, base.in_features], num_threads),
        ];
    }
    let (elements, rows) = dropped(spec);
    [elements, product_of_rows((DType::F32, spec.adapter_dtype), true, [rows, rank, base.in_features], num_threads)]
}

/// The same input, and its product with the gradient of the update.
pub(crate) fn lora_input_transposed(spec: &ops::lora_linear::Spec, num_threads: usize) -> [usize; 2] {
    let (elements, rows) = if spec.dropout.is_some() { dropped(spec) } else { (0, spec.base.rows) };
    [elements, product(true, [spec.rank, spec.base.in_features, rows], num_threads)]
}

/// An input gradient in f32 where the update's is dropped from and it is not f32 itself, and the largest of its products.
pub(crate) fn lora_input_gradient(spec: &ops::lora_linear::Spec, num_threads: usize) -> [usize; 2] {
    let (base, rank) = (&spec.base, spec.rank);
    let by_blocks = spec.dropout.is_some() && base.dtype != DType::F32;
    let (elements, rows) = if by_blocks { dropped(spec) } else { (0, base.rows) };
    let size = |depth| [rows, base.in_features, depth];
    let products = if spec.dropout.is_some() {
        let update = product(true, size(rank), num_threads);
        update.max(product(true, size(base.out_features), num_threads))
    } else {
        product(base.dtype == DType::F32, size(base.out_features + rank), num_threads)
    };
    [elements, products]
}

/// A norm's weight with its offset, and the parts of so many gradients of parameters.
pub(crate) fn norm_backward([rows, hidden_size]: [usize; 2], num_gradients: usize) -> [usize; 2] {
    let (max_parts, min_rows) = NORM_PARTS;
    let num_parts = rows.div_ceil(rows.div_ceil(max_parts).max(min_rows));
    [hidden_size, num_gradients * num_parts * hidden_size]
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
    let most = (LOGITS / vocab).max(LOSS_ROWS.min(MOST_LOGITS / vocab)).max(MIN_ROWS);
    let rows = rows_with_target(spec).min(spec.tokens.div_ceil(spec.tokens.div_ceil(most).max(1)));
    let logits = product_of_rows((spec.dtype, spec.weight_dtype), true, [rows, vocab, hidden], num_threads);
    let dweight = if with_dweight { product(true, [vocab, hidden, rows], num_threads) } else { 0 };
    let dx = if spec.needs_dx { product(true, [rows, hidden, vocab], num_threads) } else { 0 };
    [rows * hidden, rows * vocab, logits.max(dweight).max(dx)]
}

/// Sums over the columns of each part of a matrix.
pub(crate) fn adafactor([rows, columns]: [usize; 2]) -> usize {
    const MAX_PARTS: usize = 16;
    if rows * columns == 0 { 0 } else { rows.div_ceil(rows.div_ceil(MAX_PARTS)) * columns }
}
