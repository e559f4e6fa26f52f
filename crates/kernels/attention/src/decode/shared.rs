//! The kernel of parts that every device runs.
//!
//! A few neighbouring units share the products with one key, for all heads of the block, so that a key is read once; products, weights and
//! sums lie in shared memory.

use cubecl::prelude::*;
use unsloth_common::{LaunchError, unchecked, vector_sum};

use super::{FACTS, Parts, part};
use crate::block::{LOWEST, Scoring, Sizes, score};

/// Units of a cube, where the device takes as many.
const UNITS: usize = 128;
/// Cubes that fill a multiprocessor.
pub(super) const CUBES_PER_PROCESSOR: usize = 8;
/// Neighbouring units that share a key.
const LANES: usize = 8;
/// Heads that a cube takes, at most: each has sums of its own in a unit.
pub(super) const MAX_HEADS: usize = 8;
/// So that a unit has one score at most.
const _: () = assert!(MAX_HEADS <= LANES);
/// Vectors of channels of a key that a unit holds at a time.
const HELD: usize = 2;

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

/// Launches it.
pub(super) fn launch<R: Runtime, E: Float>(parts: &Parts<'_, R>) -> Result<(), LaunchError> {
    let &Parts { launch, shape, split, args, partial } = parts;
    let width = launch.vector_width::<f32>(shape.head_dim);
    let (units, heads) = (launch.units_for(UNITS).clamp(LANES, UNITS), shape.group().min(MAX_HEADS));
    let block = Block { units, heads, vectors: shape.head_dim / width, capped: shape.softcap.is_some() };
    let dim = CubeDim::new_1d(units as u32);
    launch.cube(dim, block.shared_bytes(width))?;
    let blocks = shape.num_kv_heads * shape.group().div_ceil(heads);
    let rows = split.rows(&shape);
    unchecked!(part_kernel::launch_unchecked::<E, R>(
        launch.client(),
        launch.cubes(split.parts, blocks, shape.tokens_q)?,
        dim,
        width,
        launch.vectors::<E>("q", args.q, shape.len_q(), width)?,
        launch.vectors::<E>("k", args.k, shape.len_k(), width)?,
        launch.vectors::<E>("v", args.v, shape.len_k(), width)?,
        launch.array::<i32>("cu_seqlens_q", args.cu_seqlens_q, shape.num_seqs + 1)?,
        launch.array::<i32>("lens", args.lens, shape.num_seqs)?,
        launch.vectors::<f32>("sums", partial.sums, rows * shape.head_dim, width)?,
        launch.array::<f32>("statistics", partial.statistics, rows * 2)?,
        shape.sizes(width),
        shape.scoring(),
        split.part_len as u32,
        block,
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
