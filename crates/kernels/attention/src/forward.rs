//! `out` and `lse`, by online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867).
//!
//! Work: one cube per block of query rows, key head and sequence, walking over the tiles of keys that some row sees.
//! Traffic: q once; k and v once per block of query rows; out and lse once.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError};

use crate::{
    block::{LOWEST, Problem, Scoring, Sizes, accumulate, filled, load, problem, products, score, store, unit, zeros},
    shape::Shape,
    tile::{Need, Tile},
};

/// Queries stay; keys, then values, pass by.
const NEED: Need = Need { held: 1, streamed: 1, weights: 1, reduces: true };

/// Buffers of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[tokens_q, num_heads, head_dim]` of `E`.
    pub q: &'a Handle,
    /// `[tokens_k, num_kv_heads, head_dim]` of `E`.
    pub k: &'a Handle,
    /// `[tokens_k, num_kv_heads, head_dim]` of `E`.
    pub v: &'a Handle,
    /// i32 `[num_seqs + 1]`, from 0 to `tokens_q`, not decreasing.
    pub cu_seqlens_q: &'a Handle,
    /// i32 `[num_seqs + 1]`, from 0 to `tokens_k`, not decreasing.
    pub cu_seqlens_k: &'a Handle,
    /// `[tokens_q, num_heads, head_dim]` of `E`, overwritten.
    pub out: &'a Handle,
    /// f32 `[num_heads, tokens_q]`, natural log, overwritten.
    pub lse: &'a Handle,
}

/// Launches `out, lse = attention(q, k, v)` over packed sequences.
///
/// # Errors
/// [`LaunchError`] for a field of `shape` out of its range, an element type that the device lacks, a buffer that is too small,
/// or a limit exceeded.
pub fn forward<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "attention_forward");
    let Some(Plan { width, tile, count, dim }) = plan::<R, E>(&launch, shape)? else {
        return Ok(());
    };
    forward_kernel::launch::<E, R>(
        client,
        count,
        dim,
        width,
        launch.vectors::<E>("q", args.q, shape.len_q(), width)?,
        launch.vectors::<E>("k", args.k, shape.len_k(), width)?,
        launch.vectors::<E>("v", args.v, shape.len_k(), width)?,
        launch.array::<i32>("cu_seqlens_q", args.cu_seqlens_q, shape.num_seqs + 1)?,
        launch.array::<i32>("cu_seqlens_k", args.cu_seqlens_k, shape.num_seqs + 1)?,
        launch.vectors::<E>("out", args.out, shape.len_q(), width)?,
        launch.array::<f32>("lse", args.lse, shape.num_heads * shape.tokens_q)?,
        shape.sizes(width),
        shape.scoring(),
        f32::NEG_INFINITY,
        shape.softcap.is_some(),
        tile,
    );
    Ok(())
}

/// Buffers of attention to a cache.
#[derive(Clone, Copy, Debug)]
pub struct Cached<'a> {
    /// `[tokens_q, num_heads, head_dim]` of `E`.
    pub q: &'a Handle,
    /// `[num_seqs, max_seqlen_k, num_kv_heads, head_dim]` of `E`.
    pub k: &'a Handle,
    /// `[num_seqs, max_seqlen_k, num_kv_heads, head_dim]` of `E`.
    pub v: &'a Handle,
    /// i32 `[num_seqs + 1]`, from 0 to `tokens_q`, not decreasing.
    pub cu_seqlens_q: &'a Handle,
    /// i32 `[num_seqs]`: valid keys of each sequence, the newest ones included, at most `max_seqlen_k`.
    pub lens: &'a Handle,
    /// `[tokens_q, num_heads, head_dim]` of `E`, overwritten.
    pub out: &'a Handle,
}

/// Launches `out = attention(q, k, v)` of new queries against the first `lens[s]` keys of each sequence's cache.
///
/// # Errors
/// As [`forward`].
pub fn cached<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Cached<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "attention_cached");
    if shape.tokens_k != shape.num_seqs * shape.max_seqlen_k {
        let (value, rule) = (shape.tokens_k as u64, "num_seqs * max_seqlen_k");
        return Err(LaunchError::Invalid { kernel: launch.kernel(), field: "tokens_k", value, rule });
    }
    let Some(Plan { width, tile, count, dim }) = plan::<R, E>(&launch, shape)? else {
        return Ok(());
    };
    cached_kernel::launch::<E, R>(
        client,
        count,
        dim,
        width,
        launch.vectors::<E>("q", args.q, shape.len_q(), width)?,
        launch.vectors::<E>("k", args.k, shape.len_k(), width)?,
        launch.vectors::<E>("v", args.v, shape.len_k(), width)?,
        launch.array::<i32>("cu_seqlens_q", args.cu_seqlens_q, shape.num_seqs + 1)?,
        launch.array::<i32>("lens", args.lens, shape.num_seqs)?,
        launch.vectors::<E>("out", args.out, shape.len_q(), width)?,
        shape.sizes(width),
        shape.scoring(),
        shape.softcap.is_some(),
        tile,
    );
    Ok(())
}

/// Geometry of a launch.
struct Plan {
    width: usize,
    tile: Tile,
    count: CubeCount,
    dim: CubeDim,
}

/// Checks what both launches need; `None` when there is nothing to compute.
fn plan<R: Runtime, E: Float>(launch: &Launch<'_, R>, shape: Shape) -> Result<Option<Plan>, LaunchError> {
    launch.element::<E>()?;
    shape.check(launch.kernel())?;
    if shape.num_heads == 0 || shape.tokens_q == 0 {
        return Ok(None);
    }
    let width = launch.vector_width::<f32>(shape.head_dim);
    let tile = shape.tile(launch, NEED, width)?;
    let (count, dim) = shape.grid(launch, shape.max_seqlen_q * shape.group(), tile)?;
    Ok(Some(Plan { width, tile, count, dim }))
}

/// Grid: x = block of query rows, y = key head, z = sequence.
#[cube(launch)]
fn forward_kernel<E: Float, N: Size>(
    q: &Array<Vector<E, N>>,
    k: &Array<Vector<E, N>>,
    v: &Array<Vector<E, N>>,
    bounds_q: &Array<i32>,
    bounds_k: &Array<i32>,
    out: &mut Array<Vector<E, N>>,
    lse: &mut Array<f32>,
    sizes: Sizes,
    scoring: Scoring,
    minus_infinity: f32,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let problem = problem(bounds_q, bounds_k, &sizes, &scoring, false);
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    let vectors = sizes.vectors as usize;
    if start < problem.queries.len {
        let rows = attend::<E, N>(q, k, v, out, &problem, start, &scoring, vectors, capped, tile);
        let (held_unit, streamed_unit) = unit(tile);
        #[unroll]
        for i in 0..tile.held_rows {
            let row = start + held_unit + i * tile.held_units;
            if streamed_unit == 0 && row < problem.queries.len {
                let at = problem.queries.statistic(row, sizes.tokens_q as usize);
                let (greatest, total) = (rows.greatest[i], rows.total[i]);
                lse[at] = select(total == 0.0, minus_infinity, greatest + f32::ln(total));
            }
        }
    }
}

/// Grid as [`forward_kernel`].
#[cube(launch)]
fn cached_kernel<E: Float, N: Size>(
    q: &Array<Vector<E, N>>,
    k: &Array<Vector<E, N>>,
    v: &Array<Vector<E, N>>,
    bounds_q: &Array<i32>,
    lens: &Array<i32>,
    out: &mut Array<Vector<E, N>>,
    sizes: Sizes,
    scoring: Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let problem = problem(bounds_q, lens, &sizes, &scoring, true);
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    if start < problem.queries.len {
        attend::<E, N>(q, k, v, out, &problem, start, &scoring, sizes.vectors as usize, capped, tile);
    }
}

/// Statistics of this unit's held rows, each `[held_rows]`; the same for all units of a row.
#[derive(CubeType)]
struct RowStatistics {
    /// Greatest score seen.
    greatest: Array<f32>,
    /// Sum of `exp(score - greatest)`; while tiles pass by, of this unit's columns.
    total: Array<f32>,
}

/// Output of the query rows from `start` on, and their statistics.
#[cube]
fn attend<E: Float, N: Size>(
    q: &Array<Vector<E, N>>,
    k: &Array<Vector<E, N>>,
    v: &Array<Vector<E, N>>,
    out: &mut Array<Vector<E, N>>,
    problem: &Problem,
    start: usize,
    scoring: &Scoring,
    vectors: usize,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) -> RowStatistics {
    let mut q_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.held() * tile.stride()));
    let mut kv_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.streamed() * tile.stride()));
    let mut weights = SharedMemory::<f32>::new(comptime!(tile.held() * tile.weights_stride()));
    let mut reduced = SharedMemory::<f32>::new(comptime!(tile.held() * tile.streamed_units));
    let mut rows = RowStatistics { greatest: filled(LOWEST, tile), total: filled(0.0, tile) };
    let mut sums = zeros::<N>(tile);
    load::<E, N>(q, &mut q_tile, &problem.queries, start, vectors, comptime!(tile.held()), tile);
    let group = problem.queries.group;
    let last = min(start + comptime!(tile.held()), problem.queries.len) - 1;
    let (first_key, end) = problem.mask.keys(start / group, last / group);
    let mut first = first_key;
    while first < end {
        sync_cube();
        load::<E, N>(k, &mut kv_tile, &problem.keys, first, vectors, comptime!(tile.streamed()), tile);
        sync_cube();
        let mut scores = products::<N>(&q_tile, &kv_tile, vectors, tile);
        mask(&mut scores, &mut reduced, problem, (start, first, end), scoring, capped, tile);
        sync_cube();
        load::<E, N>(v, &mut kv_tile, &problem.keys, first, vectors, comptime!(tile.streamed()), tile);
        exponentials::<N>(&scores, &reduced, &mut rows, &mut sums, &mut weights, end - first, tile);
        sync_cube();
        accumulate::<N>(&mut sums, &weights, &kv_tile, min(end - first, comptime!(tile.streamed())), tile);
        first += comptime!(tile.streamed());
    }
    sum_units(&mut rows.total, &mut reduced, end - first_key, tile);
    let mut factors = Array::<f32>::new(tile.held_rows);
    #[unroll]
    for i in 0..tile.held_rows {
        // Nothing seen: zeros, not 0 / 0. NaN stays NaN.
        factors[i] = select(rows.total[i] == 0.0, 0.0, 1.0 / rows.total[i]);
    }
    store::<E, N>(&sums, &factors, out, &problem.queries, start, vectors, tile);
    rows
}

/// Turns products into scores, [`LOWEST`] where masked, and leaves the greatest of each row and unit in `reduced`.
#[cube]
fn mask(
    scores: &mut Array<f32>,
    reduced: &mut SharedMemory<f32>,
    problem: &Problem,
    at: (usize, usize, usize),
    scoring: &Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let (start, first, end) = at;
    let (held_unit, streamed_unit) = unit(tile);
    let (rows, cols) = comptime!((tile.held_rows, tile.streamed_rows));
    #[unroll]
    for i in 0..rows {
        let row = held_unit + i * tile.held_units;
        let query = (start + row) / problem.queries.group;
        let mut most = LOWEST.runtime();
        #[unroll]
        for j in 0..cols {
            let key = first + streamed_unit + j * tile.streamed_units;
            let seen = key < end && problem.mask.sees(query, key);
            scores[i * cols + j] = select(seen, score(scores[i * cols + j], scoring, capped), LOWEST);
            most = max(most, scores[i * cols + j]);
        }
        reduced[row * tile.streamed_units + streamed_unit] = most;
    }
}

/// Turns scores into weights relative to the new maxima, and rescales what was summed before.
#[cube]
fn exponentials<N: Size>(
    scores: &Array<f32>,
    reduced: &SharedMemory<f32>,
    statistics: &mut RowStatistics,
    sums: &mut Array<Vector<f32, N>>,
    weights: &mut SharedMemory<f32>,
    keys: usize,
    #[comptime] tile: Tile,
) {
    let (held_unit, streamed_unit) = unit(tile);
    let (rows, cols) = comptime!((tile.held_rows, tile.streamed_rows));
    #[unroll]
    for i in 0..rows {
        let row = held_unit + i * tile.held_units;
        let mut most = statistics.greatest[i];
        for u in 0..min(keys, tile.streamed_units) {
            most = max(most, reduced[row * tile.streamed_units + u]);
        }
        let rescale = f32::exp(statistics.greatest[i] - most);
        let mut total = statistics.total[i] * rescale;
        statistics.greatest[i] = most;
        #[unroll]
        for t in 0..tile.vectors {
            sums[i * tile.vectors + t] = sums[i * tile.vectors + t] * Vector::new(rescale);
        }
        #[unroll]
        for j in 0..cols {
            let s = scores[i * cols + j];
            // What is masked stays out even where nothing was seen yet and the difference is 0.
            let p = select(s <= LOWEST, 0.0, f32::exp(s - most));
            total += p;
            weights[row * comptime!(tile.weights_stride()) + streamed_unit + j * tile.streamed_units] = p;
        }
        statistics.total[i] = total;
    }
}

/// Replaces each unit's part of a sum over the units of a row by the whole; only as many units as `keys` have a part.
#[cube]
fn sum_units(parts: &mut Array<f32>, reduced: &mut SharedMemory<f32>, keys: usize, #[comptime] tile: Tile) {
    let (held_unit, streamed_unit) = unit(tile);
    sync_cube();
    #[unroll]
    for i in 0..tile.held_rows {
        reduced[(held_unit + i * tile.held_units) * tile.streamed_units + streamed_unit] = parts[i];
    }
    sync_cube();
    #[unroll]
    for i in 0..tile.held_rows {
        let mut sum = 0.0f32;
        for u in 0..min(keys, tile.streamed_units) {
            sum += reduced[(held_unit + i * tile.held_units) * tile.streamed_units + u];
        }
        parts[i] = sum;
    }
}
