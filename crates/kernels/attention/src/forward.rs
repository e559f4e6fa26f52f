//! `out` and `lse`, by online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867).
//!
//! Work: one cube per block of query rows, key head and sequence, walking over the tiles of keys that some row sees.
//! Traffic: q once; k and v once per block of query rows; out and lse once.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

use crate::{
    block::{
        Form, LOWEST, Problem, Scoring, Seen, Sizes, accumulate, filled, load, problem, products, put, score, sees,
        store, streamed_row, unit, zeros,
    },
    shape::Shape,
    tensor,
    tile::{Need, Tile},
};

/// Queries stay; keys, then values, pass by.
const NEED: Need =
    Need { held: 1, streamed: 1, weights: 1, sums: 1, rows: 4, per_held: 4, per_streamed: 0, per_unit: 2 };

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
    if is_nothing::<R, E>(&launch, &shape)? {
        return Ok(());
    }
    if let Some(need) = tensor::forward::need::<R, E>(client, &shape) {
        return tensor::forward::forward::<R, E>(&launch, shape, need, args);
    }
    let Plan { width, tile, count, dim } = plan(&launch, shape)?;
    unchecked!(forward_kernel::launch_unchecked::<E, R>(
        client,
        count,
        dim,
        width,
        tile.held_rows,
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
    ));
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
    if is_nothing::<R, E>(&launch, &shape)? {
        return Ok(());
    }
    if let Some(need) = tensor::forward::need::<R, E>(client, &shape) {
        return tensor::forward::cached::<R, E>(&launch, shape, need, args);
    }
    let Plan { width, tile, count, dim } = plan(&launch, shape)?;
    unchecked!(cached_kernel::launch_unchecked::<E, R>(
        client,
        count,
        dim,
        width,
        tile.held_rows,
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
    ));
    Ok(())
}

/// Geometry of a launch.
struct Plan {
    width: usize,
    tile: Tile,
    count: CubeCount,
    dim: CubeDim,
}

/// Checks what every launch needs, and whether there is nothing to compute.
fn is_nothing<R: Runtime, E: Float>(launch: &Launch<'_, R>, shape: &Shape) -> Result<bool, LaunchError> {
    launch.element::<E>()?;
    shape.check(launch.kernel())?;
    Ok(shape.num_heads == 0 || shape.tokens_q == 0)
}

fn plan<R: Runtime>(launch: &Launch<'_, R>, shape: Shape) -> Result<Plan, LaunchError> {
    let width = launch.vector_width::<f32>(shape.head_dim);
    let tile = shape.tile(launch, NEED, width)?;
    let (count, dim) = shape.grid(launch, shape.max_seqlen_q * shape.group(), tile)?;
    Ok(Plan { width, tile, count, dim })
}

/// Grid: x = block of query rows, y = key head, z = sequence.
#[cube(launch_unchecked)]
fn forward_kernel<E: Float, N: Size, M: Size>(
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
    let problem = problem(
        bounds_q,
        bounds_k,
        &sizes,
        &scoring,
        comptime!(Form { holds_keys: false, cached: false }),
        comptime!(tile.held()),
    );
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    let vectors = sizes.vectors as usize;
    if start < problem.queries().len {
        let rows = attend::<E, N, M>(q, k, v, out, &problem, start, &scoring, vectors, capped, tile);
        let (held_unit, streamed_unit) = unit(tile);
        #[unroll]
        for i in 0..tile.held_rows {
            let row = start + held_unit + i * tile.held_units;
            if streamed_unit == 0 && row < problem.queries().len {
                let at = problem.queries().statistic(row, sizes.tokens_q as usize);
                let (greatest, total) = (rows.greatest[i], rows.total[i]);
                lse[at] = select(total == 0.0, minus_infinity, greatest + f32::ln(total));
            }
        }
    }
}

/// Grid as [`forward_kernel`].
#[cube(launch_unchecked)]
fn cached_kernel<E: Float, N: Size, M: Size>(
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
    let problem = problem(
        bounds_q,
        lens,
        &sizes,
        &scoring,
        comptime!(Form { holds_keys: false, cached: true }),
        comptime!(tile.held()),
    );
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    if start < problem.queries().len {
        attend::<E, N, M>(q, k, v, out, &problem, start, &scoring, sizes.vectors as usize, capped, tile);
    }
}

/// Statistics of this unit's held rows, each `[held_rows]`; the same for all units of a row.
#[derive(CubeType)]
struct RowStatistics {
    /// Greatest score seen.
    greatest: Array<f32>,
    /// Sum of `exp(score - greatest)`.
    total: Array<f32>,
}

/// Statistics of the cube's rows while tiles pass by. In shared memory: a unit needs them once per tile, and registers are for
/// what it needs in every step.
#[derive(CubeType)]
struct Running {
    /// Greatest score of each row, `[2, held]`: the units of a row read one half while the first of them writes the other.
    greatest: SharedMemory<f32>,
    /// Greatest score in this tile of each row and unit, `[held, most_stride]`.
    most: SharedMemory<f32>,
    /// Sum of `exp(score - greatest)` of each row and unit, `[held, streamed_units]`.
    total: SharedMemory<f32>,
}

/// Output of the query rows from `start` on, and their statistics.
#[cube]
fn attend<E: Float, N: Size, M: Size>(
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
    let mut weights = SharedMemory::<Vector<f32, M>>::new(comptime!(tile.streamed() * tile.weights_stride()));
    let mut running = start_rows(tile);
    let mut seen = Seen::new(tile.held());
    let unit = UNIT_POS as usize;
    if unit < tile.held() {
        seen.find(problem, unit, start + unit);
    }
    let mut sums = zeros::<N>(tile);
    load::<E, N>(q, &mut q_tile, &problem.queries(), start, vectors, comptime!(tile.held()), tile);
    let (first_key, _) = problem.streamed();
    let mut first = first_key;
    let mut half = 0usize.runtime();
    while first < problem.streamed().1 {
        load::<E, N>(k, &mut kv_tile, &problem.keys(), first, vectors, comptime!(tile.streamed()), tile);
        sync_cube();
        let mut scores = products::<N>(&q_tile, &kv_tile, vectors, tile);
        mask(&mut scores, &mut running.most, &seen, first, scoring, capped, tile);
        sync_cube();
        load::<E, N>(v, &mut kv_tile, &problem.keys(), first, vectors, comptime!(tile.streamed()), tile);
        raise(half, &mut running, tile);
        sync_cube();
        exponentials::<N, M>(half, &mut running, &mut sums, &mut scores, &mut weights, tile);
        sync_cube();
        let keys = min(problem.streamed().1 - first, tile.streamed());
        accumulate::<N, M>(&mut sums, &weights, &kv_tile, keys, tile);
        first += comptime!(tile.streamed());
        half = 1 - half;
        // Before the loop asks for the end of the range again, so that none keeps it in a register.
        sync_cube();
    }
    let rows = finish_rows(&mut running, half, tile);
    let mut factors = Array::<f32>::new(tile.held_rows);
    #[unroll]
    for i in 0..tile.held_rows {
        // Nothing seen: zeros, not 0 / 0. NaN stays NaN.
        factors[i] = select(rows.total[i] == 0.0, 0.0, 1.0 / rows.total[i]);
    }
    store::<E, N>(&sums, &factors, out, &problem.queries(), start, vectors, tile);
    rows
}

/// Turns products into scores, [`LOWEST`] where masked, and leaves the greatest of each row and unit in `greatest`.
#[cube]
fn mask(
    scores: &mut Array<f32>,
    greatest: &mut SharedMemory<f32>,
    seen: &Seen,
    first: usize,
    scoring: &Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let (held_unit, streamed_unit) = unit(tile);
    #[unroll]
    for i in 0..tile.held_rows {
        let row = held_unit + i * tile.held_units;
        let seen_by_row = seen.by(row);
        let mut most = LOWEST.runtime();
        #[unroll]
        for j in 0..tile.streamed_rows {
            let key = streamed_row(j, tile);
            let n = comptime!(i * tile.streamed_rows + j);
            let s = select(sees(seen_by_row, first + key), score(scores[n], scoring, capped), LOWEST);
            scores[n] = s;
            most = max(most, s);
        }
        greatest[row * comptime!(tile.most_stride()) + streamed_unit] = most;
    }
}

/// The new maxima of the cube's rows, one unit for each, from the old ones in the given half of `running.greatest` to the other half.
#[cube]
fn raise(half: usize, running: &mut Running, #[comptime] tile: Tile) {
    let row = UNIT_POS as usize;
    if row < tile.held() {
        let mut most = running.greatest[half * comptime!(tile.held()) + row];
        for u in 0..comptime!(tile.streamed_units).runtime() {
            most = max(most, running.most[row * comptime!(tile.most_stride()) + u]);
        }
        running.greatest[(1 - half) * comptime!(tile.held()) + row] = most;
    }
}

/// Turns scores into weights relative to the new maxima, in place and in shared memory, and rescales what was summed before. The
/// old maxima are in the given half of `running.greatest`, the new ones in the other.
#[cube]
fn exponentials<N: Size, M: Size>(
    half: usize,
    running: &mut Running,
    sums: &mut Array<Vector<f32, N>>,
    scores: &mut Array<f32>,
    weights: &mut SharedMemory<Vector<f32, M>>,
    #[comptime] tile: Tile,
) {
    let (held_unit, streamed_unit) = unit(tile);
    let mut maxima = Array::<f32>::new(tile.held_rows);
    let mut totals = Array::<f32>::new(tile.held_rows);
    #[unroll]
    for i in 0..tile.held_rows {
        let row = held_unit + i * tile.held_units;
        let most = running.greatest[(1 - half) * comptime!(tile.held()) + row];
        let rescale = f32::exp(running.greatest[half * comptime!(tile.held()) + row] - most);
        #[unroll]
        for t in 0..tile.vectors {
            sums[i * tile.vectors + t] = sums[i * tile.vectors + t] * Vector::new(rescale);
        }
        totals[i] = running.total[row * tile.streamed_units + streamed_unit] * rescale;
        maxima[i] = most;
    }
    #[unroll]
    for j in 0..tile.streamed_rows {
        #[unroll]
        for i in 0..tile.held_rows {
            let n = comptime!(i * tile.streamed_rows + j);
            let s = scores[n];
            // What is masked stays out even where nothing was seen yet and the difference is 0.
            let p = select(s <= LOWEST, 0.0, f32::exp(s - maxima[i]));
            totals[i] += p;
            scores[n] = p;
        }
    }
    put::<M>(scores, weights, tile);
    #[unroll]
    for i in 0..tile.held_rows {
        running.total[(held_unit + i * tile.held_units) * tile.streamed_units + streamed_unit] = totals[i];
    }
}

/// Statistics of rows that have seen nothing, in the first half. A barrier comes before anything reads what another unit writes here.
#[cube]
fn start_rows(#[comptime] tile: Tile) -> Running {
    let (held_unit, streamed_unit) = unit(tile);
    let mut greatest = SharedMemory::<f32>::new(comptime!(2 * tile.held()));
    let most = SharedMemory::<f32>::new(comptime!(tile.held() * tile.most_stride()));
    let mut total = SharedMemory::<f32>::new(comptime!(tile.held() * tile.streamed_units));
    #[unroll]
    for i in 0..tile.held_rows {
        let row = held_unit + i * tile.held_units;
        total[row * tile.streamed_units + streamed_unit] = 0.0;
        if streamed_unit == 0 {
            greatest[row] = LOWEST;
        }
    }
    Running { greatest, most, total }
}

/// Statistics of this unit's rows over all keys.
#[cube]
fn finish_rows(running: &mut Running, half: usize, #[comptime] tile: Tile) -> RowStatistics {
    let (held_unit, _) = unit(tile);
    // For rows that no tile passed by.
    sync_cube();
    // A unit sums one row, for all: four at a time would need many registers beside the sums of channels.
    let row = UNIT_POS as usize;
    if row < tile.held() {
        let mut sum = 0.0f32;
        for u in 0..comptime!(tile.streamed_units).runtime() {
            sum += running.total[row * tile.streamed_units + u];
        }
        running.greatest[(1 - half) * comptime!(tile.held()) + row] = sum;
    }
    sync_cube();
    let mut rows = RowStatistics { greatest: filled(LOWEST, tile), total: filled(0.0, tile) };
    #[unroll]
    for i in 0..tile.held_rows {
        let row = held_unit + i * tile.held_units;
        rows.greatest[i] = running.greatest[half * comptime!(tile.held()) + row];
        rows.total[i] = running.greatest[(1 - half) * comptime!(tile.held()) + row];
    }
    rows
}
