//! Attention of single new queries to long caches: the keys of a query are cut into parts that different cubes take, and the parts are
//! put together by their statistics.                                Dao et al. 2023, "Flash-Decoding for long-context inference"
//!
//! Work: one cube per part, block of heads that read one key head, and query. A cube goes over its keys some at a time: a few
//! neighbouring units share the products with one key, for all heads of the block, so that a key is read once.
//! Traffic: the visible keys and values once per block of heads; partial sums, f32, out and in again.
//! Numerics: f32; which keys make a part follows from sizes and device alone, and parts are added in their order.

use cubecl::{ir::DeviceProperties, prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked, vector_sum};

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
/// So that a unit has one score at most.
const _: () = assert!(MAX_HEADS <= LANES);
/// Vectors of channels of a key that a unit holds at a time.
const HELD: usize = 2;
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

    /// Vectors from one query row in shared memory to the next: the end is zeros.
    fn stride(&self) -> usize {
        self.vectors.next_multiple_of(HELD * LANES)
    }

    fn shared_bytes(&self, width: usize) -> usize {
        let rows = self.heads * (self.vectors + self.stride()) * width;
        let products = self.heads * self.units + self.heads * self.keys();
        (rows + products + 3 * self.heads + FACTS) * size_of::<f32>()
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
    unchecked!(part_kernel::launch_unchecked::<E, R>(
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
    ));
    let items = shape.len_q() / width;
    let grid = launch.flat(items);
    launch.cube(grid.dim, 0)?;
    unchecked!(join_kernel::launch_unchecked::<E, R>(
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
    ));
    Ok(())
}

/// Grid: x = part, y = block of heads, z = query.
#[cube(launch_unchecked)]
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
    let (num_keys, stride) = comptime!((block.keys(), block.stride()));
    let unit = UNIT_POS_X as usize;
    let mut q_rows = SharedMemory::<Vector<f32, N>>::new(comptime!(heads * stride));
    let mut state = State::<N> {
        sums: SharedMemory::new(comptime!(heads * vectors)),
        weights: SharedMemory::new(comptime!(heads * num_keys)),
        greatest: SharedMemory::new(heads),
        total: SharedMemory::new(heads),
        rescale: SharedMemory::new(heads),
    };
    let part = part(bounds_q, lens, &sizes, &scoring, part_len, heads);
    let mut item = unit;
    while item < comptime!(heads * stride) {
        let (head, t) = (item / stride, item % stride);
        q_rows[item] = Vector::new(0.0);
        if head < part.num_heads() && t < vectors {
            q_rows[item] = Vector::cast_from(q[(part.first_row() + head) * vectors + t]);
        }
        item += units;
    }
    let mut item = unit;
    while item < comptime!(heads * vectors) {
        state.sums[item] = Vector::new(0.0);
        item += units;
    }
    if unit < heads {
        state.greatest[unit] = LOWEST;
        state.total[unit] = 0.0;
    }
    sync_cube();
    let (mut row, mut left) = (part.row(), part.len());
    while left > 0 {
        put_scores::<E, N>(k, &q_rows, &mut state.weights, row, left, &sizes, &scoring, block);
        sync_cube();
        put_weights::<N>(&mut state, min(left, num_keys), heads);
        sync_cube();
        add_values::<E, N>(v, &mut state, row, min(left, num_keys), &sizes, block);
        row += num_keys * sizes.num_kv_heads as usize;
        left -= min(left, num_keys);
    }
    let to = CUBE_POS_X as usize * (sizes.tokens_q * sizes.num_heads) as usize + part.first_row();
    // Each unit reads back only what it wrote itself.
    let mut item = unit;
    while item < comptime!(heads * vectors) {
        let (head, t) = (item % heads, item / heads);
        if head < part.num_heads() {
            sums[(to + head) * vectors + t] = state.sums[item];
        }
        item += units;
    }
    if unit < part.num_heads() {
        statistics[(to + unit) * 2] = state.greatest[unit];
        statistics[(to + unit) * 2 + 1] = state.total[unit];
    }
}

/// Results of the heads of a cube, and the weights of the keys at hand. Heads run fastest, so that a unit that takes every so many-th
/// place stays with one head.
#[derive(CubeType)]
struct State<N: Size> {
    /// `[vectors, heads]`
    sums: SharedMemory<Vector<f32, N>>,
    /// `[keys, heads]`: scores, then weights.
    weights: SharedMemory<f32>,
    /// `[heads]`
    greatest: SharedMemory<f32>,
    /// `[heads]`
    total: SharedMemory<f32>,
    /// `[heads]`: factor of what was summed before the keys at hand.
    rescale: SharedMemory<f32>,
}

/// First row of queries, heads, row of the first key, keys.
const FACTS: usize = 4;

/// The heads and keys of a cube.
///
/// Found by one unit and kept in shared memory, read where they are used: as [`crate::block::Problem`].
#[derive(CubeType, Clone, Copy)]
struct Part {
    facts: SharedMemory<u32>,
}

#[cube]
impl Part {
    /// Row of the first head in `[tokens_q, num_heads]`.
    fn first_row(&self) -> usize {
        self.facts[0] as usize
    }

    /// Heads that exist.
    fn num_heads(&self) -> usize {
        self.facts[1] as usize
    }

    /// Row of the first key in the cache, heads counted.
    fn row(&self) -> usize {
        self.facts[2] as usize
    }

    /// Number of keys.
    fn len(&self) -> usize {
        self.facts[3] as usize
    }
}

/// The heads of this cube, and what their query sees of the part. Every unit calls it.
#[cube]
fn part(
    bounds_q: &Array<i32>,
    lens: &Array<i32>,
    sizes: &Sizes,
    scoring: &Scoring,
    part_len: u32,
    #[comptime] heads: usize,
) -> Part {
    let mut facts = SharedMemory::<u32>::new(FACTS);
    if UNIT_POS_X == 0 {
        let group = sizes.group as usize;
        let blocks = group.div_ceil(heads);
        let kv_head = CUBE_POS_Y as usize / blocks;
        let skipped = CUBE_POS_Y as usize % blocks * heads;
        facts[0] = CUBE_POS_Z * sizes.num_heads + (kv_head * group + skipped) as u32;
        facts[1] = min(group - skipped, heads) as u32;

        let token = CUBE_POS_Z as i32;
        let mut seq = 0usize.runtime();
        while bounds_q[seq + 1] <= token {
            seq += 1;
        }
        let (seq_q, seq_k) = (bounds_q[seq + 1] - bounds_q[seq], lens[seq]);
        let mask = Mask { first: seq_k - seq_q, left: scoring.left, right: scoring.right, seq_q, seq_k };
        let (first, last) = mask.seen_by((token - bounds_q[seq]) as usize);
        let start = first + (CUBE_POS_X * part_len) as i32;
        facts[2] = (seq as u32 * sizes.capacity + start as u32) * sizes.num_kv_heads + kv_head as u32;
        facts[3] = max(min(part_len as i32, last + 1 - start), 0) as u32;
    }
    sync_cube();
    Part { facts }
}

/// Scores of the keys from `row` on, of which there are `left`. What belongs to keys that do not exist has no meaning.
///
/// A unit holds some channels of its key, and adds the products of one head after the other to what it has in shared memory: in
/// registers there would be a sum for each head.
#[cube]
fn put_scores<E: Float, N: Size>(
    k: &Array<Vector<E, N>>,
    q_rows: &SharedMemory<Vector<f32, N>>,
    scores: &mut SharedMemory<f32>,
    row: usize,
    left: usize,
    sizes: &Sizes,
    scoring: &Scoring,
    #[comptime] block: Block,
) {
    let (heads, vectors, units) = comptime!((block.heads, block.vectors, block.units));
    let (num_keys, stride) = comptime!((block.keys(), block.stride()));
    let mut products = SharedMemory::<f32>::new(comptime!(heads * units));
    let (unit, key) = (UNIT_POS_X as usize, UNIT_POS_X as usize / LANES);
    for head in 0..heads.runtime() {
        products[head * units + unit] = 0.0;
    }
    if key < left {
        let row = (row + key * sizes.num_kv_heads as usize) * vectors;
        for chunk in 0..comptime!(stride / (HELD * LANES)).runtime() {
            let t = unit % LANES + chunk * comptime!(HELD * LANES);
            let mut channels = Array::<Vector<f32, N>>::new(HELD);
            #[unroll]
            for i in 0..HELD {
                channels[i] = Vector::new(0.0);
                if comptime!(stride == vectors).runtime() || t + i * LANES < vectors {
                    channels[i] = Vector::cast_from(k[row + t + i * LANES]);
                }
            }
            for head in 0..heads.runtime() {
                let mut sum = products[head * units + unit];
                #[unroll]
                for i in 0..HELD {
                    sum += vector_sum::<N>(channels[i] * q_rows[head * stride + t + i * LANES]);
                }
                products[head * units + unit] = sum;
            }
        }
    }
    sync_cube();
    if unit < comptime!(heads * num_keys) {
        let (head, key) = (unit % heads, unit / heads);
        let mut sum = 0.0f32;
        for lane in 0..LANES.runtime() {
            sum += products[head * units + key * LANES + lane];
        }
        scores[unit] = score(sum, scoring, block.capped);
    }
}

/// Turns the scores of a head into weights relative to its greatest score so far, and adds them up.
#[cube]
fn put_weights<N: Size>(state: &mut State<N>, count: usize, #[comptime] heads: usize) {
    let unit = UNIT_POS_X as usize;
    if unit < heads {
        let before = state.greatest[unit];
        let mut most = before;
        let mut at = unit;
        for _ in 0..count {
            most = max(most, state.weights[at]);
            at += heads;
        }
        let rescale = f32::exp(before - most);
        let mut total = state.total[unit] * rescale;
        at = unit;
        for _ in 0..count {
            let weight = f32::exp(state.weights[at] - most);
            state.weights[at] = weight;
            total += weight;
            at += heads;
        }
        state.greatest[unit] = most;
        state.total[unit] = total;
        state.rescale[unit] = rescale;
    }
}

/// Adds the weighted values of `count` keys from `row` on. The next scores are written behind a barrier.
#[cube]
fn add_values<E: Float, N: Size>(
    v: &Array<Vector<E, N>>,
    state: &mut State<N>,
    row: usize,
    count: usize,
    sizes: &Sizes,
    #[comptime] block: Block,
) {
    let (heads, vectors, units) = comptime!((block.heads, block.vectors, block.units));
    let unit = UNIT_POS_X as usize;
    let step = sizes.num_kv_heads as usize * vectors;
    for i in 0..comptime!((heads * vectors).div_ceil(units)).runtime() {
        let item = unit + i * units;
        if item < comptime!(heads * vectors) {
            // A head that is the same for all places of a unit is found from what does not change.
            let (head, t) = if comptime!(units.is_multiple_of(heads)) {
                (unit % heads, unit / heads + i * comptime!(units / heads))
            } else {
                (item % heads, item / heads)
            };
            let mut sum = state.sums[item] * Vector::new(state.rescale[head]);
            let mut at = row * vectors + t;
            for key in 0..count {
                let values = Vector::<f32, N>::cast_from(v[at]);
                sum += Vector::new(state.weights[key * heads + head]) * values;
                at += step;
            }
            state.sums[item] = sum;
        }
    }
}

/// Grid: unit = vector of `out`, walking on by the number of units.
#[cube(launch_unchecked)]
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
