//! The kernel of parts where the units of a plane can pass on what they hold.
//!
//! Neighbouring units share the channels of a key, and go over keys of their own, with statistics and sums of their own in registers: there is
//! no barrier between the first key and the last. A load takes as many bytes as the device carries at once, and several keys are under way
//! before the first is used. What the groups of units have found is put together at the end: within a plane by shuffles, between planes in
//! shared memory.

use cubecl::{ir::DeviceProperties, prelude::*};
use unsloth_common::{
    LaunchError,
    math::quick_exp,
    mma::{PLANE, has_planes},
    unchecked, vector_sum,
};

use super::{FACTS, Parts, part};
use crate::{
    block::{LOWEST, Scoring, Sizes, score},
    shape::Shape,
};

/// Units of a cube. For so many an assembler has few numbers of registers to aim at: for fewer, it spills some to make room for one more cube.
const UNITS: usize = 512;
/// Heads that a cube takes, at most: each has sums of its own in a unit.
const MAX_HEADS: usize = 4;

/// Whether planes are of the size that the kernel is made for, and shuffle.
pub(super) fn is_supported(properties: &DeviceProperties) -> bool {
    has_planes(properties) && properties.hardware.max_units_per_cube >= UNITS as u32
}

/// How much of a cache of one storage type a unit has under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Load {
    /// Keys of a group of units.
    keys: usize,
    /// Channels of a head that are loaded together.
    width: usize,
}

/// Cubes that fill a multiprocessor: as many as find registers.
pub(super) fn cubes_per_processor<E: Float>() -> usize {
    if is_half::<E>() { 1 } else { 2 }
}

impl Load {
    /// A unit has twice as much of half precision under way as of f32, in numbers four times as many, and there are half as many units.
    const HALF: Self = Self { keys: 4, width: 8 };
    const F32: Self = Self { keys: 2, width: 4 };

    fn of<E: Float>() -> Self {
        if is_half::<E>() { Self::HALF } else { Self::F32 }
    }

    /// Fewer keys where a softcap, or a second vector of each key, takes the registers.
    fn with(self, capped: bool, held: usize) -> Self {
        let keys = if capped { self.keys / 2 } else { self.keys };
        Self { keys: (keys / held).max(1), ..self }
    }
}

fn is_half<E: Float>() -> bool {
    size_of::<E>() == 2
}

/// Heads of a cube, of which some may not exist: a power of two, so that few kernels serve groups of all sizes. Fewer long ones, whose sums would
/// take more shared memory than some devices have, and registers.
pub(super) fn heads(shape: &Shape) -> usize {
    let most = if shape.head_dim > 128 { MAX_HEADS / 2 } else { MAX_HEADS };
    shape.group().next_power_of_two().min(most)
}

/// What a cube is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Block {
    load: Load,
    heads: usize,
    /// Vectors of channels.
    vectors: usize,
    capped: bool,
    /// Whether weights are as precise as f32, not as half of it.
    precise: bool,
}

impl Block {
    /// Neighbouring units that share a key.
    fn lanes(&self) -> usize {
        self.vectors.next_power_of_two().min(PLANE)
    }

    /// Vectors of a key that each of them has; the last may lie beyond its end.
    fn held(&self) -> usize {
        self.vectors.div_ceil(self.lanes())
    }

    /// Groups of units with keys of their own.
    fn groups(&self) -> usize {
        UNITS / self.lanes()
    }

    fn planes(&self) -> usize {
        UNITS / PLANE
    }

    fn shared_bytes(&self, width: usize) -> usize {
        let row = self.held() * self.lanes() * width;
        let found = self.planes() * self.heads * (row + 2);
        (self.heads * row + found + FACTS) * size_of::<f32>()
    }
}

/// Launches it.
pub(super) fn launch<R: Runtime, E: Float>(parts: &Parts<'_, R>) -> Result<(), LaunchError> {
    let &Parts { launch, shape, split, args, partial } = parts;
    let load = Load::of::<E>();
    let width = launch.vector_width::<E>(shape.head_dim).min(load.width);
    let (vectors, capped) = (shape.head_dim / width, shape.softcap.is_some());
    let block = Block { load, heads: heads(&shape), vectors, capped, precise: !is_half::<E>() };
    let block = Block { load: load.with(capped, block.held()), ..block };
    let dim = CubeDim::new_1d(UNITS as u32);
    launch.cube(dim, block.shared_bytes(width))?;
    let blocks = shape.num_kv_heads * shape.group().div_ceil(block.heads);
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

/// What a unit has found of each head.
#[derive(CubeType)]
struct Found<N: Size> {
    /// `[heads, held]`: values by their weights.
    sums: Array<Vector<f32, N>>,
    /// `[heads]`: greatest score.
    greatest: Array<f32>,
    /// `[heads]`: sum of the weights.
    total: Array<f32>,
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
    let (heads, vectors, lanes, held) = comptime!((block.heads, block.vectors, block.lanes(), block.held()));
    let unit = UNIT_POS_X as usize;
    let part = part(bounds_q, lens, &sizes, &scoring, part_len, heads);
    let mut queries = SharedMemory::<Vector<f32, N>>::new(comptime!(heads * held * lanes));
    let mut item = unit;
    while item < comptime!(heads * held * lanes) {
        let (head, t) = (item / comptime!(held * lanes), item % comptime!(held * lanes));
        queries[item] = Vector::new(0.0);
        if head < part.num_heads() && t < vectors {
            queries[item] = Vector::cast_from(q[(part.first_row() + head) * vectors + t]);
        }
        item += UNITS;
    }
    sync_cube();
    let mut found = nothing::<N>(block);
    let step = sizes.num_kv_heads as usize * vectors;
    let mut first = 0usize.runtime();
    while first < part.len() {
        attend::<E, N>(k, v, &queries, &mut found, (part.row() * vectors, step), (first, part.len()), &scoring, block);
        first += comptime!(block.load.keys * block.groups());
    }
    join_groups::<N>(&mut found, block);
    let to = CUBE_POS_X as usize * (sizes.tokens_q * sizes.num_heads) as usize + part.first_row();
    write::<N>(&found, sums, statistics, (to, part.num_heads()), block);
}

#[cube]
fn nothing<N: Size>(#[comptime] block: Block) -> Found<N> {
    let (heads, held) = comptime!((block.heads, block.held()));
    let mut found =
        Found::<N> { sums: Array::new(comptime!(heads * held)), greatest: Array::new(heads), total: Array::new(heads) };
    #[unroll]
    for i in 0..comptime!(heads * held) {
        found.sums[i] = Vector::new(0.0);
    }
    #[unroll]
    for head in 0..heads {
        found.greatest[head] = LOWEST;
        found.total[head] = 0.0;
    }
    found
}

/// Some keys of this unit's group, from the `keys.0`-th of `keys.1` on; the first key is at `rows.0`, one is `rows.1` vectors from the next.
#[cube]
fn attend<E: Float, N: Size>(
    k: &Array<Vector<E, N>>,
    v: &Array<Vector<E, N>>,
    queries: &SharedMemory<Vector<f32, N>>,
    found: &mut Found<N>,
    rows: (usize, usize),
    keys: (usize, usize),
    scoring: &Scoring,
    #[comptime] block: Block,
) {
    let (heads, vectors, lanes, held) = comptime!((block.heads, block.vectors, block.lanes(), block.held()));
    let (lane, group) = (UNIT_POS_X as usize % lanes, UNIT_POS_X as usize / lanes);
    let mut channels = Array::<Vector<E, N>>::new(comptime!(block.load.keys * held));
    let mut values = Array::<Vector<E, N>>::new(comptime!(block.load.keys * held));
    #[unroll]
    for i in 0..block.load.keys {
        // Keys and channels beyond the last are read as the last, and count for nothing.
        let key = min(keys.0 + group + comptime!(i * block.groups()), keys.1 - 1);
        #[unroll]
        for t in 0..held {
            let vector = min(lane + comptime!(t * lanes), comptime!(vectors - 1).runtime());
            let at = rows.0 + key * rows.1 + vector;
            channels[i * held + t] = k[at];
            values[i * held + t] = v[at];
        }
    }
    // Keys that are left from this group's first on, if any.
    let left = max(keys.1 as i32 - (keys.0 + group) as i32, 0);
    let mut weights = Array::<f32>::new(comptime!(heads * block.load.keys));
    #[unroll]
    for head in 0..heads {
        let mut most = found.greatest[head];
        #[unroll]
        for i in 0..block.load.keys {
            let mut sum = 0.0f32;
            #[unroll]
            for t in 0..held {
                let query = queries[comptime!((head * held + t) * lanes) + lane];
                sum += vector_sum::<N>(Vector::<f32, N>::cast_from(channels[i * held + t]) * query);
            }
            let score = score(lane_sum(sum, lanes), scoring, block.capped);
            weights[head * block.load.keys + i] = score;
            if comptime!((i * block.groups()) as i32) < left {
                most = max(most, score);
            }
        }
        let rescale = weight(found.greatest[head] - most, block.precise);
        let mut total = found.total[head] * rescale;
        #[unroll]
        for i in 0..block.load.keys {
            let exists = comptime!((i * block.groups()) as i32) < left;
            let at = comptime!(head * block.load.keys + i);
            let weight = select(exists, weight(weights[at] - most, block.precise), 0.0);
            weights[at] = weight;
            total += weight;
        }
        #[unroll]
        for t in 0..held {
            found.sums[head * held + t] *= Vector::new(rescale);
        }
        found.greatest[head] = most;
        found.total[head] = total;
    }
    // Behind all products with keys: wide, keys and values have no room in registers side by side.
    #[unroll]
    for i in 0..block.load.keys {
        #[unroll]
        for t in 0..held {
            let value = Vector::<f32, N>::cast_from(values[i * held + t]);
            #[unroll]
            for head in 0..heads {
                found.sums[head * held + t] += Vector::new(weights[head * block.load.keys + i]) * value;
            }
        }
    }
}

/// `e^difference`.
#[cube]
fn weight(difference: f32, #[comptime] precise: bool) -> f32 {
    if comptime!(precise) { f32::exp(difference) } else { quick_exp(difference) }
}

/// Sum over neighbouring units, in one order on all of them.
#[cube]
fn lane_sum(value: f32, #[comptime] lanes: usize) -> f32 {
    let mut sum = value;
    #[unroll]
    for step in 0..comptime!(lanes.ilog2()) {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << step));
    }
    sum
}

/// Gives the first group of a plane what all of its groups have found.
#[cube]
fn join_groups<N: Size>(found: &mut Found<N>, #[comptime] block: Block) {
    let (heads, lanes, held) = comptime!((block.heads, block.lanes(), block.held()));
    #[unroll]
    for step in comptime!(lanes.ilog2())..comptime!(PLANE.ilog2()) {
        let distance = comptime!(1u32 << step);
        #[unroll]
        for head in 0..heads {
            let (own, other) = (found.greatest[head], plane_shuffle_xor(found.greatest[head], distance));
            let most = max(own, other);
            let (own, other) = (f32::exp(own - most), f32::exp(other - most));
            found.greatest[head] = most;
            found.total[head] = found.total[head] * own + plane_shuffle_xor(found.total[head], distance) * other;
            #[unroll]
            for t in 0..held {
                let sum = found.sums[head * held + t];
                let theirs = plane_shuffle_xor(sum, distance);
                found.sums[head * held + t] = sum * Vector::new(own) + theirs * Vector::new(other);
            }
        }
    }
}

/// Puts together what the planes have found of `rows.1` heads, and writes it from row `rows.0` on.
#[cube]
fn write<N: Size>(
    found: &Found<N>,
    sums: &mut Array<Vector<f32, N>>,
    statistics: &mut Array<f32>,
    rows: (usize, usize),
    #[comptime] block: Block,
) {
    let (heads, vectors, lanes, held) = comptime!((block.heads, block.vectors, block.lanes(), block.held()));
    let (planes, row) = comptime!((block.planes(), held * lanes));
    let unit = UNIT_POS_X as usize;
    let mut of_planes = SharedMemory::<Vector<f32, N>>::new(comptime!(planes * heads * row));
    let mut greatest = SharedMemory::<f32>::new(comptime!(planes * heads));
    let mut totals = SharedMemory::<f32>::new(comptime!(planes * heads));
    let (plane, lane) = (unit / PLANE, unit % PLANE);
    if lane < lanes {
        #[unroll]
        for head in 0..heads {
            #[unroll]
            for t in 0..held {
                of_planes[(plane * heads + head) * row + comptime!(t * lanes) + lane] = found.sums[head * held + t];
            }
            if lane == 0 {
                greatest[plane * heads + head] = found.greatest[head];
                totals[plane * heads + head] = found.total[head];
            }
        }
    }
    sync_cube();
    let mut item = unit;
    while item < comptime!(heads * vectors) {
        let (head, t) = (item / vectors, item % vectors);
        if head < rows.1 {
            let mut most = LOWEST.runtime();
            for plane in 0..planes.runtime() {
                most = max(most, greatest[plane * heads + head]);
            }
            let mut total = 0.0f32;
            let mut sum = Vector::<f32, N>::new(0.0);
            for plane in 0..planes.runtime() {
                let weight = f32::exp(greatest[plane * heads + head] - most);
                total += weight * totals[plane * heads + head];
                sum += Vector::new(weight) * of_planes[(plane * heads + head) * row + t];
            }
            sums[(rows.0 + head) * vectors + t] = sum;
            if t == 0 {
                statistics[(rows.0 + head) * 2] = most;
                statistics[(rows.0 + head) * 2 + 1] = total;
            }
        }
        item += UNITS;
    }
}
