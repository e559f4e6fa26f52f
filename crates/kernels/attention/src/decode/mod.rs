//! Attention of single new queries to caches: the keys of a query are cut into parts that different cubes take, and the parts are
//! put together by their statistics.                                Dao et al. 2023, "Flash-Decoding for long-context inference"
//!
//! Work: one cube per part, block of heads that read one key head, and query, [by planes](planes) where units of a plane can pass on what
//! they hold, else [by shared memory](shared). Then one cube per query and head.
//! Traffic: the visible keys and values once per block of heads; partial sums, f32, out and in again.
//! Numerics: f32; which keys make a part follows from sizes and device alone, and parts are added in a fixed order.

mod planes;
mod shared;

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, cube_max, cube_reduce_bytes, cube_sum, unchecked};

use crate::{
    block::{LOWEST, Mask, Scoring, Sizes},
    forward::Cached,
    shape::Shape,
};

/// Keys of a part, at least, and what their number is a multiple of.
const MIN_PART: usize = 64;
/// Parts of the keys of one query, at most: their sums are gone over by one cube.
const MAX_PARTS: usize = 512;
/// Multiprocessors of a device that does not say.
const PROCESSORS: usize = 32;

/// How the keys of single queries are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Parts of each query's keys, 1 to 512.
    pub parts: usize,
    /// Keys of a part.
    pub part_len: usize,
}

impl Split {
    /// The cut that fills this device, for sequences of at most `longest` keys with one query each and storage of `E`; `None` where a
    /// sequence has more queries, or the keys are too few to be cut and [`crate::cached()`] does as well.
    pub fn for_device<R: Runtime, E: Float>(client: &ComputeClient<R>, shape: &Shape, longest: usize) -> Option<Self> {
        if shape.max_seqlen_q != 1 || shape.num_kv_heads == 0 {
            return None;
        }
        let by_planes = planes::is_supported(client.properties());
        let (heads, per_processor) = if by_planes {
            (planes::heads(shape), planes::cubes_per_processor::<E>())
        } else {
            (shared::MAX_HEADS, shared::CUBES_PER_PROCESSOR)
        };
        let visible = if shape.causal { shape.left.map_or(longest, |left| longest.min(left + 1)) } else { longest };
        let hardware = &client.properties().hardware;
        let processors = hardware.num_streaming_multiprocessors.map_or(PROCESSORS, |count| count as usize);
        let cubes = shape.tokens_q * shape.num_kv_heads * shape.group().div_ceil(heads);
        // Not one more than fits: it would run when the others have left.
        let wanted = (processors * per_processor / cubes.max(1)).clamp(1, MAX_PARTS);
        let part_len = visible.div_ceil(wanted).next_multiple_of(MIN_PART).max(MIN_PART);
        let parts = visible.div_ceil(part_len).max(1);
        (parts > 1 || by_planes).then_some(Self { parts, part_len })
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

/// One launch of the kernel that gives partial results.
struct Parts<'a, R: Runtime> {
    launch: &'a Launch<'a, R>,
    shape: Shape,
    split: Split,
    args: Cached<'a>,
    partial: Partial<'a>,
}

/// Launches [`crate::cached()`] for sequences with one query each, in parts.
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
    if !(1..=MAX_PARTS).contains(&split.parts) {
        let value = split.parts as u64;
        return Err(LaunchError::Invalid { kernel: launch.kernel(), field: "parts", value, rule: "1 to 512" });
    }
    if shape.num_heads == 0 || shape.tokens_q == 0 {
        return Ok(());
    }
    let parts = Parts { launch: &launch, shape, split, args, partial };
    if planes::is_supported(client.properties()) {
        planes::launch::<R, E>(&parts)?;
    } else {
        shared::launch::<R, E>(&parts)?;
    }
    join::<R, E>(&parts)
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

/// The heads of this cube, and what their query sees of the part. Grid: x = part, y = block of heads, z = query. Every unit calls it.
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

/// Units of a cube that joins the parts of one row.
const JOINERS: usize = 256;

/// What a cube that joins parts is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Joiner {
    units: usize,
    /// Vectors of a row.
    vectors: usize,
}

impl Joiner {
    /// Units that share a vector, each with some of the parts.
    fn sharers(&self) -> usize {
        (self.units / self.vectors).max(1)
    }
}

/// Launches the kernel that puts parts together.
fn join<R: Runtime, E: Float>(parts: &Parts<'_, R>) -> Result<(), LaunchError> {
    let Parts { launch, shape, split, args, partial } = parts;
    let width = launch.vector_width::<f32>(shape.head_dim);
    let joiner = Joiner { units: launch.units_for(JOINERS), vectors: shape.head_dim / width };
    let dim = CubeDim::new_1d(joiner.units as u32);
    let floats = MAX_PARTS + joiner.sharers() * joiner.vectors * width;
    launch.cube(dim, floats * size_of::<f32>() + 2 * cube_reduce_bytes(joiner.units))?;
    let rows = split.rows(shape);
    unchecked!(join_kernel::launch_unchecked::<E, R>(
        launch.client(),
        launch.cubes(shape.num_heads, shape.tokens_q, 1)?,
        dim,
        width,
        launch.vectors::<f32>("sums", partial.sums, rows * shape.head_dim, width)?,
        launch.vectors::<f32>("statistics", partial.statistics, rows * 2, 2)?,
        launch.vectors::<E>("out", args.out, shape.len_q(), width)?,
        (shape.tokens_q * shape.num_heads) as u32,
        split.parts as u32,
        joiner,
    ));
    Ok(())
}

/// Grid: cube = row of `out`: x = head, y = query.
#[cube(launch_unchecked)]
fn join_kernel<E: Float, N: Size>(
    sums: &Array<Vector<f32, N>>,
    statistics: &Array<Vector<f32, Const<2>>>,
    out: &mut Array<Vector<E, N>>,
    rows: u32,
    parts: u32,
    #[comptime] joiner: Joiner,
) {
    let (units, vectors, sharers) = comptime!((joiner.units, joiner.vectors, joiner.sharers()));
    let (rows, parts, unit) = (rows as usize, parts as usize, UNIT_POS as usize);
    let row = CUBE_POS;
    let mut weights = SharedMemory::<f32>::new(MAX_PARTS);
    let mut most = LOWEST.runtime();
    let mut part = unit;
    while part < parts {
        most = max(most, statistics[part * rows + row][0]);
        part += units;
    }
    let most = cube_max(most, units);
    let mut total = 0.0f32;
    part = unit;
    while part < parts {
        let of_part = statistics[part * rows + row];
        let weight = f32::exp(of_part[0] - most);
        weights[part] = weight;
        total += weight * of_part[1];
        part += units;
    }
    let total = cube_sum(total, units);
    let mut shared = SharedMemory::<Vector<f32, N>>::new(comptime!(sharers * vectors));
    let mut item = unit;
    while item < comptime!(sharers * vectors) {
        let (sharer, t) = (item / vectors, item % vectors);
        let mut sum = Vector::<f32, N>::new(0.0);
        let mut part = sharer;
        while part < parts {
            sum += Vector::new(weights[part]) * sums[(part * rows + row) * vectors + t];
            part += sharers;
        }
        shared[item] = sum;
        item += units;
    }
    sync_cube();
    let mut t = unit;
    while t < vectors {
        let mut sum = shared[t];
        for sharer in 1..sharers.runtime() {
            sum += shared[sharer * vectors + t];
        }
        // Nothing seen: zeros, not 0 / 0. NaN stays NaN.
        out[row * vectors + t] = Vector::cast_from(sum * Vector::new(select(total == 0.0, 0.0, 1.0 / total)));
        t += units;
    }
}
