//! Attention of single new queries to long caches: the keys of a query are cut into parts that different cubes take, and the parts are
//! put together by their statistics.                                Dao et al. 2023, "Flash-Decoding for long-context inference"
//!
//! Work: one cube per part, block of heads that read one key head, and query. A cube goes over its keys some at a time: a few
//! neighbouring units share the products with one key, for all heads of the block, so that a key is read once.
//! Traffic: the visible keys and values once per block of heads; partial sums, f32, out and in again.
//! Numerics: f32; which keys make a part follows from sizes and device alone, and parts are added in their order.

use cubecl::{ir::DeviceProperties, prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, vector_sum};

use crate::{
    block::{LOWEST, Mask, Scoring, Sizes, score},
    forward::Cached,
    shape::Shape,
};

/// Units of a cube, where the device takes as many.
const UNITS: usize = 128;
/// Neighbouring units that share a key.
const LANES: usize = 8;
/// Heads that a cube takes, at most: each has sums of its own in a unit.
const MAX_HEADS: usize = 8;
/// Keys of a part, at least; a multiple of the keys that a cube takes at a time.
const MIN_PART: usize = 64;
/// Cubes that fill a multiprocessor.
const CUBES_PER_PROCESSOR: usize = 8;
/// Multiprocessors of a device that does not say.
const PROCESSORS: usize = 32;

/// How the keys of single queries are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Parts of each query's keys, 2 or more.
    pub parts: usize,
    /// Keys of a part.
    pub part_len: usize,
}

impl Split {
    /// The cut that fills this device, for sequences of at most `longest` keys with one query each; `None` where the keys are too
    /// few to be cut, or a sequence has more queries.
    pub fn for_device(properties: &DeviceProperties, shape: &Shape, longest: usize) -> Option<Self> {
        if shape.max_seqlen_q != 1 || shape.num_kv_heads == 0 {
            return None;
        }
        let visible = if shape.causal { shape.left.map_or(longest, |left| longest.min(left + 1)) } else { longest };
        let processors = properties.hardware.num_streaming_multiprocessors.map_or(PROCESSORS, |count| count as usize);
        let cubes = shape.tokens_q * shape.num_kv_heads * shape.group().div_ceil(MAX_HEADS);
        let wanted = (processors * CUBES_PER_PROCESSOR).div_ceil(cubes.max(1));
        let part_len = visible.div_ceil(wanted.max(1)).next_multiple_of(MIN_PART).max(MIN_PART);
        let parts = visible.div_ceil(part_len);
        (parts > 1).then_some(Self { parts, part_len })
    }

    /// Rows of partial results: one for each part, query and head.
    pub fn rows(&self, shape: &Shape) -> usize {
        self.parts * shape.tokens_q * shape.num_heads
    }
}

/// Partial results of [`split_cached`], overwritten.
#[derive(Clone, Copy, Debug)]
pub struct Partial<'a> {
    /// f32 `[rows, head_dim]`: values by their weights, not divided by the sum of those.
    pub sums: &'a Handle,
    /// f32 `[rows, 2]`: greatest score, and sum of the weights relative to it.
    pub statistics: &'a Handle,
}

/// What a cube is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Block {
    units: usize,
    /// Heads of a cube.
    heads: usize,
    /// Vectors of channels.
    vectors: usize,
    capped: bool,
}

impl Block {
    /// Keys that a cube takes at a time.
    fn keys(&self) -> usize {
        self.units / LANES
    }

    fn shared_bytes(&self, width: usize) -> usize {
        let rows = 2 * self.heads * self.vectors * width;
        let products = self.heads * self.units + self.heads * self.keys();
        (rows + products + 3 * self.heads + 1) * size_of::<f32>()
    }
}

/// Launches [`crate::cached`] for sequences with one query each, in parts.
///
/// # Errors
/// [`LaunchError`] for a field of `shape` out of its range, an element type that the device lacks, a buffer that is too small,
/// or a limit exceeded.
pub fn split_cached<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    (shape, split): (Shape, Split),
    args: Cached<'_>,
    partial: Partial<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "attention_split_cached");
    launch.element::<E>()?;
    shape.check(launch.kernel())?;
    if shape.tokens_k != shape.num_seqs * shape.max_seqlen_k {
        let (value, rule) = (shape.tokens_k as u64, "num_seqs * max_seqlen_k");
        return Err(LaunchError::Invalid { kernel: launch.kernel(), field: "tokens_k", value, rule });
    }
    if shape.num_heads == 0 || shape.tokens_q == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(shape.head_dim);
    let (units, heads) = (launch.units_for(UNITS).clamp(LANES, UNITS), shape.group().min(MAX_HEADS));
    let block = Block { units, heads, vectors: shape.head_dim / width, capped: shape.softcap.is_some() };
    let dim = CubeDim::new_1d(units as u32);
    launch.cube(dim, block.shared_bytes(width))?;
    let blocks = shape.num_kv_heads * shape.group().div_ceil(heads);
    let rows = split.rows(&shape);
    let sums = || launch.vectors::<f32>("sums", partial.sums, rows * shape.head_dim, width);
    let statistics = || launch.array::<f32>("statistics", partial.statistics, rows * 2);
    part_kernel::launch::<E, R>(
        client,
        launch.cubes(split.parts, blocks, shape.tokens_q)?,
        dim,
        width,
        launch.vectors::<E>("q", args.q, shape.len_q(), width)?,
        launch.vectors::<E>("k", args.k, shape.len_k(), width)?,
        launch.vectors::<E>("v", args.v, shape.len_k(), width)?,
        launch.array::<i32>("cu_seqlens_q", args.cu_seqlens_q, shape.num_seqs + 1)?,
        launch.array::<i32>("lens", args.lens, shape.num_seqs)?,
        sums()?,
        statistics()?,
        shape.sizes(width),
        shape.scoring(),
        split.part_len as u32,
        block,
    );
    let items = shape.len_q() / width;
    let grid = launch.flat(items);
    launch.cube(grid.dim, 0)?;
    join_kernel::launch::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        sums()?,
        statistics()?,
        launch.vectors::<E>("out", args.out, shape.len_q(), width)?,
        items as u32,
        block.vectors as u32,
        split.parts as u32,
    );
    Ok(())
}

/// Grid: x = part, y = block of heads, z = query.
#[cube(launch)]
fn part_kernel<E: Float, N: Size>(
    q: &Array<Vector<E, N>>,
    k: &Array<Vector<E, N>>,
    v: &Array<Vector<E, N>>,
    bounds_q: &Array<i32>,
    lens: &Array<i32>,
    sums: &mut Array<Vector<f32, N>>,
    statistics: &mut Array<f32>,
    sizes: Sizes,
    scoring: Scoring,
    part_len: u32,
    #[comptime] block: Block,
) {
    let (heads, vectors, units) = comptime!((block.heads, block.vectors, block.units));
    let (unit, token, group) = (UNIT_POS as usize, CUBE_POS_Z as usize, sizes.group as usize);
    let blocks = group.div_ceil(heads);
    let kv_head = CUBE_POS_Y as usize / blocks;
    let skipped = CUBE_POS_Y as usize % blocks * heads;
    let first_row = token * sizes.num_heads as usize + kv_head * group + skipped;
    let num_heads = min(group - skipped, heads);

    let mut q_rows = SharedMemory::<Vector<f32, N>>::new(comptime!(heads * vectors));
    let mut state = State::<N> {
        sums: SharedMemory::new(comptime!(heads * vectors)),
        weights: SharedMemory::new(comptime!(heads * block.keys())),
        greatest: SharedMemory::new(heads),
        total: SharedMemory::new(heads),
        rescale: SharedMemory::new(heads),
    };
    let mut item = unit;
    while item < comptime!(heads * vectors) {
        let mut row = Vector::<f32, N>::new(0.0);
        if item / vectors < num_heads {
            row = Vector::<f32, N>::cast_from(q[first_row * vectors + item]);
        }
        q_rows[item] = row;
        state.sums[item] = Vector::new(0.0);
        item += units;
    }
    if unit < heads {
        state.greatest[unit] = LOWEST;
        state.total[unit] = 0.0;
    }
    let keys = visible(bounds_q, lens, &sizes, &scoring, part_len, kv_head);
    sync_cube();
    let mut first = keys.start;
    while first < keys.end {
        put_scores::<E, N>(k, &q_rows, &mut state.weights, &keys, first, &scoring, block);
        sync_cube();
        put_weights(&mut state, block);
        sync_cube();
        add_values::<E, N>(v, &mut state, &keys, first, block);
        first += comptime!(block.keys());
    }
    let to = CUBE_POS_X as usize * (sizes.tokens_q * sizes.num_heads) as usize + first_row;
    // Each unit reads back only what it wrote itself.
    let mut item = unit;
    while item < num_heads * vectors {
        sums[to * vectors + item] = state.sums[item];
        item += units;
    }
    if unit < num_heads {
        statistics[(to + unit) * 2] = state.greatest[unit];
        statistics[(to + unit) * 2 + 1] = state.total[unit];
    }
}

/// Results of the heads of a cube, and the weights of the keys at hand.
#[derive(CubeType)]
struct State<N: Size> {
    /// `[heads, vectors]`
    sums: SharedMemory<Vector<f32, N>>,
    /// `[heads, keys]`: scores, then weights.
    weights: SharedMemory<f32>,
    /// `[heads]`
    greatest: SharedMemory<f32>,
    /// `[heads]`
    total: SharedMemory<f32>,
    /// `[heads]`: factor of what was summed before the keys at hand.
    rescale: SharedMemory<f32>,
}

/// The keys of a part.
#[derive(CubeType, Clone, Copy)]
struct Keys {
    start: usize,
    end: usize,
    /// Row of key 0 in the cache, heads counted.
    base: usize,
    /// Rows from one key to the next.
    stride: usize,
}

/// What this cube's query sees of its part.
#[cube]
fn visible(
    bounds_q: &Array<i32>,
    lens: &Array<i32>,
    sizes: &Sizes,
    scoring: &Scoring,
    part_len: u32,
    kv_head: usize,
) -> Keys {
    let token = CUBE_POS_Z as i32;
    let mut seq = 0usize.runtime();
    while bounds_q[seq + 1] <= token {
        seq += 1;
    }
    let (seq_q, seq_k) = (bounds_q[seq + 1] - bounds_q[seq], lens[seq]);
    let mask = Mask { first: seq_k - seq_q, left: scoring.left, right: scoring.right, seq_q, seq_k };
    let (first, last) = mask.seen_by((token - bounds_q[seq]) as usize);
    let start = first + (CUBE_POS_X * part_len) as i32;
    let end = max(min(start + part_len as i32, last + 1), start);
    let stride = sizes.num_kv_heads as usize;
    let base = seq * sizes.capacity as usize * stride + kv_head;
    Keys { start: start as usize, end: end as usize, base, stride }
}

/// Scores of the keys from `first` on, [`LOWEST`] beyond the part.
#[cube]
fn put_scores<E: Float, N: Size>(
    k: &Array<Vector<E, N>>,
    q_rows: &SharedMemory<Vector<f32, N>>,
    scores: &mut SharedMemory<f32>,
    keys: &Keys,
    first: usize,
    scoring: &Scoring,
    #[comptime] block: Block,
) {
    let (heads, vectors, units) = comptime!((block.heads, block.vectors, block.units));
    let num_keys = comptime!(block.keys());
    let mut products = SharedMemory::<f32>::new(comptime!(heads * units));
    let (unit, key) = (UNIT_POS as usize, first + UNIT_POS as usize / LANES);
    let mut sums = Array::<f32>::new(heads);
    #[unroll]
    for head in 0..heads {
        sums[head] = 0.0;
    }
    if key < keys.end {
        let row = (keys.base + key * keys.stride) * vectors;
        let mut t = unit % LANES;
        while t < vectors {
            let channels = Vector::<f32, N>::cast_from(k[row + t]);
            #[unroll]
            for head in 0..heads {
                sums[head] += vector_sum::<N>(channels * q_rows[head * vectors + t]);
            }
            t += LANES;
        }
    }
    #[unroll]
    for head in 0..heads {
        products[head * units + unit] = sums[head];
    }
    sync_cube();
    let mut item = unit;
    while item < comptime!(heads * num_keys) {
        let (head, key) = (item / num_keys, item % num_keys);
        let mut sum = 0.0f32;
        for lane in 0..LANES.runtime() {
            sum += products[head * units + key * LANES + lane];
        }
        scores[item] = select(first + key < keys.end, score(sum, scoring, block.capped), LOWEST);
        item += units;
    }
}

/// Turns scores into weights relative to the greatest score so far.
#[cube]
fn put_weights<N: Size>(state: &mut State<N>, #[comptime] block: Block) {
    let (heads, num_keys) = comptime!((block.heads, block.keys()));
    let unit = UNIT_POS as usize;
    if unit < heads {
        let before = state.greatest[unit];
        let mut most = before;
        for key in 0..num_keys.runtime() {
            most = max(most, state.weights[unit * num_keys + key]);
        }
        state.greatest[unit] = most;
        state.rescale[unit] = f32::exp(before - most);
    }
    sync_cube();
    let mut item = unit;
    while item < comptime!(heads * num_keys) {
        let s = state.weights[item];
        // What is masked stays out even where nothing was seen yet and the difference is 0.
        state.weights[item] = select(s <= LOWEST, 0.0, f32::exp(s - state.greatest[item / num_keys]));
        item += comptime!(block.units);
    }
}

/// Adds weights and weighted values of the keys from `first` on. The next scores are written behind a barrier.
#[cube]
fn add_values<E: Float, N: Size>(
    v: &Array<Vector<E, N>>,
    state: &mut State<N>,
    keys: &Keys,
    first: usize,
    #[comptime] block: Block,
) {
    let (heads, vectors, num_keys) = comptime!((block.heads, block.vectors, block.keys()));
    let unit = UNIT_POS as usize;
    if unit < heads {
        let mut total = state.total[unit] * state.rescale[unit];
        for key in 0..num_keys.runtime() {
            total += state.weights[unit * num_keys + key];
        }
        state.total[unit] = total;
    }
    let count = min(keys.end - first, num_keys);
    let mut item = unit;
    while item < comptime!(heads * vectors) {
        let (head, t) = (item / vectors, item % vectors);
        let mut sum = state.sums[item] * Vector::new(state.rescale[head]);
        for key in 0..count {
            let values = Vector::<f32, N>::cast_from(v[(keys.base + (first + key) * keys.stride) * vectors + t]);
            sum += Vector::new(state.weights[head * num_keys + key]) * values;
        }
        state.sums[item] = sum;
        item += comptime!(block.units);
    }
}

/// Grid: unit = vector of `out`, walking on by the number of units.
#[cube(launch)]
fn join_kernel<E: Float, N: Size>(
    sums: &Array<Vector<f32, N>>,
    statistics: &Array<f32>,
    out: &mut Array<Vector<E, N>>,
    items: u32,
    vectors: u32,
    parts: u32,
) {
    let (items, vectors, parts) = (items as usize, vectors as usize, parts as usize);
    let rows = items / vectors;
    let mut item = ABSOLUTE_POS;
    while item < items {
        let row = item / vectors;
        let mut most = LOWEST.runtime();
        for part in 0..parts {
            most = max(most, statistics[(part * rows + row) * 2]);
        }
        let mut total = 0.0f32;
        let mut sum = Vector::<f32, N>::new(0.0);
        for part in 0..parts {
            let at = part * rows + row;
            let weight = f32::exp(statistics[at * 2] - most);
            total += weight * statistics[at * 2 + 1];
            sum += Vector::new(weight) * sums[at * vectors + item % vectors];
        }
        // Nothing seen: zeros, not 0 / 0. NaN stays NaN.
        out[item] = Vector::cast_from(sum * Vector::new(select(total == 0.0, 0.0, 1.0 / total)));
        item += CUBE_COUNT * CUBE_DIM as usize;
    }
}
