//! Gradients, with the probabilities recomputed from `lse` (Dao 2023, algorithm 2).
//!
//! Work: `D` by one unit per row; then `dk` and `dv` by one cube per block of keys, key head and sequence, which all query rows
//! that see it pass by; then `dq` by one cube per block of query rows, which its keys pass by. The scores are computed twice, so
//! that no gradient is ever added to by two cubes: no atomics, and every sum has a fixed order.
//! Traffic: the held rows once; the streamed rows once per block of held rows.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, math::quick_exp, unchecked};

use crate::{
    block::{
        Form, Problem, Scoring, Seen, Sizes, accumulate, filled, horizontal_sum, load, problem, products, put, sees,
        store, streamed_row, unit, zeros,
    },
    shape::Shape,
    tensor,
    tile::{Need, Tile},
};

/// Keys and values stay; queries and their gradients pass by; P and ds are weights.
const KEYS_NEED: Need =
    Need { held: 2, streamed: 2, weights: 2, sums: 2, rows: 2, per_held: 0, per_streamed: 4, per_unit: 0 };
/// Queries and their gradients stay; keys and values pass by; ds are weights.
const QUERIES_NEED: Need =
    Need { held: 2, streamed: 2, weights: 1, sums: 1, rows: 2, per_held: 4, per_streamed: 0, per_unit: 0 };

/// Buffers of the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
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
    /// `[tokens_q, num_heads, head_dim]` of `E`: gradient of `out`.
    pub dout: &'a Handle,
    /// `[tokens_q, num_heads, head_dim]` of `E`, from the forward pass.
    pub out: &'a Handle,
    /// f32 `[num_heads, tokens_q]`, from the forward pass.
    pub lse: &'a Handle,
    /// f32 `[num_heads, tokens_q]`, workspace, overwritten.
    pub row_sums: &'a Handle,
    /// `[tokens_q, num_heads, head_dim]` of `E`, overwritten.
    pub dq: &'a Handle,
    /// `[tokens_k, num_kv_heads, head_dim]` of `E`, overwritten.
    pub dk: &'a Handle,
    /// `[tokens_k, num_kv_heads, head_dim]` of `E`, overwritten.
    pub dv: &'a Handle,
}

/// Launches `dq, dk, dv` from `dout` and what the forward pass left.
///
/// # Errors
/// As [`forward`](crate::forward).
pub fn backward<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Backward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "attention_backward");
    launch.element::<E>()?;
    shape.check(launch.kernel())?;
    if shape.num_heads == 0 || shape.num_seqs == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(shape.head_dim);
    if shape.tokens_q > 0 {
        row_sums::<R, E>(&launch, shape, args, width)?;
    }
    if shape.tokens_k > 0 && !tensor::backward::keys::<R, E>(&launch, shape, args)? {
        keys::<R, E>(&launch, shape, args, width)?;
    }
    if shape.tokens_q > 0 && !tensor::backward::queries::<R, E>(&launch, shape, args)? {
        queries::<R, E>(&launch, shape, args, width)?;
    }
    Ok(())
}

fn row_sums<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    args: Backward<'_>,
    width: usize,
) -> Result<(), LaunchError> {
    let rows = shape.tokens_q * shape.num_heads;
    let grid = launch.flat(rows);
    launch.cube(grid.dim, 0)?;
    unchecked!(row_sums_kernel::launch_unchecked::<E, R>(
        launch.client(),
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("dout", args.dout, shape.len_q(), width)?,
        launch.vectors::<E>("out", args.out, shape.len_q(), width)?,
        launch.array::<f32>("row_sums", args.row_sums, rows)?,
        shape.tokens_q as u32,
        shape.num_heads as u32,
        (shape.head_dim / width) as u32,
    ));
    Ok(())
}

/// `D = sum_channels(dout * out)`. Grid: unit = row, walking on by the size of the grid.
#[cube(launch_unchecked)]
fn row_sums_kernel<E: Float, N: Size>(
    dout: &Array<Vector<E, N>>,
    out: &Array<Vector<E, N>>,
    row_sums: &mut Array<f32>,
    tokens: u32,
    num_heads: u32,
    vectors: u32,
) {
    let (tokens, num_heads, vectors) = (tokens as usize, num_heads as usize, vectors as usize);
    let mut row = ABSOLUTE_POS_X as usize;
    while row < tokens * num_heads {
        let mut sum = Vector::<f32, N>::new(0.0);
        for c in 0..vectors {
            let at = row * vectors + c;
            sum += Vector::<f32, N>::cast_from(dout[at]) * Vector::<f32, N>::cast_from(out[at]);
        }
        row_sums[row % num_heads * tokens + row / num_heads] = horizontal_sum::<N>(sum);
        row += (CUBE_COUNT_X * CUBE_DIM_X) as usize;
    }
}

fn keys<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    args: Backward<'_>,
    width: usize,
) -> Result<(), LaunchError> {
    let tile = shape.tile(launch, KEYS_NEED, width)?;
    let (count, dim) = shape.grid(launch, shape.max_seqlen_k, tile)?;
    let (len_q, len_k, rows) = (shape.len_q(), shape.len_k(), shape.tokens_q * shape.num_heads);
    unchecked!(keys_kernel::launch_unchecked::<E, R>(
        launch.client(),
        count,
        dim,
        width,
        tile.held_rows,
        launch.vectors::<E>("q", args.q, len_q, width)?,
        launch.vectors::<E>("k", args.k, len_k, width)?,
        launch.vectors::<E>("v", args.v, len_k, width)?,
        launch.vectors::<E>("dout", args.dout, len_q, width)?,
        launch.array::<f32>("lse", args.lse, rows)?,
        launch.array::<f32>("row_sums", args.row_sums, rows)?,
        launch.array::<i32>("cu_seqlens_q", args.cu_seqlens_q, shape.num_seqs + 1)?,
        launch.array::<i32>("cu_seqlens_k", args.cu_seqlens_k, shape.num_seqs + 1)?,
        launch.vectors::<E>("dk", args.dk, len_k, width)?,
        launch.vectors::<E>("dv", args.dv, len_k, width)?,
        shape.sizes(width),
        shape.scoring(),
        shape.softcap.is_some(),
        tile,
    ));
    Ok(())
}

fn queries<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    args: Backward<'_>,
    width: usize,
) -> Result<(), LaunchError> {
    let tile = shape.tile(launch, QUERIES_NEED, width)?;
    let (count, dim) = shape.grid(launch, shape.max_seqlen_q * shape.group(), tile)?;
    let (len_q, len_k, rows) = (shape.len_q(), shape.len_k(), shape.tokens_q * shape.num_heads);
    unchecked!(queries_kernel::launch_unchecked::<E, R>(
        launch.client(),
        count,
        dim,
        width,
        tile.held_rows,
        launch.vectors::<E>("q", args.q, len_q, width)?,
        launch.vectors::<E>("k", args.k, len_k, width)?,
        launch.vectors::<E>("v", args.v, len_k, width)?,
        launch.vectors::<E>("dout", args.dout, len_q, width)?,
        launch.array::<f32>("lse", args.lse, rows)?,
        launch.array::<f32>("row_sums", args.row_sums, rows)?,
        launch.array::<i32>("cu_seqlens_q", args.cu_seqlens_q, shape.num_seqs + 1)?,
        launch.array::<i32>("cu_seqlens_k", args.cu_seqlens_k, shape.num_seqs + 1)?,
        launch.vectors::<E>("dq", args.dq, len_q, width)?,
        shape.sizes(width),
        shape.scoring(),
        shape.softcap.is_some(),
        tile,
    ));
    Ok(())
}

/// `P`, and what `dout v^T - D` is multiplied by to give `ds`: the same but for the slope of the softcap. Zeros if not seen.
#[cube]
pub(crate) fn pair(
    product: f32,
    lse: f32,
    seen: bool,
    scoring: &Scoring,
    #[comptime] capped: bool,
    #[comptime] quick: bool,
) -> (f32, f32) {
    let mut s = product * scoring.scale;
    let mut part = 0.0f32;
    if comptime!(capped) {
        part = f32::tanh(s / scoring.softcap);
        s = scoring.softcap * part;
    }
    let exponential = if comptime!(quick) { quick_exp(s - lse) } else { f32::exp(s - lse) };
    let p = select(seen, exponential, 0.0);
    let mut slope = p;
    if comptime!(capped) {
        slope *= 1.0 - part * part;
    }
    (p, slope)
}

/// What is known of the query rows of a tile, `[count]` each, in shared memory.
#[derive(CubeType)]
pub(crate) struct QueryTile {
    pub(crate) seen: Seen,
    pub(crate) lse: SharedMemory<f32>,
    pub(crate) row_sums: SharedMemory<f32>,
}

#[cube]
impl QueryTile {
    pub(crate) fn new(#[comptime] count: usize) -> QueryTile {
        QueryTile { seen: Seen::new(count), lse: SharedMemory::new(count), row_sums: SharedMemory::new(count) }
    }

    /// Reads rows `start .. start + count`, one per unit; zeros for a row that does not exist.
    pub(crate) fn load(
        &mut self,
        lse: &Array<f32>,
        row_sums: &Array<f32>,
        problem: &Problem,
        start: usize,
        tokens: usize,
        #[comptime] count: usize,
    ) {
        let row = UNIT_POS as usize;
        if row < count {
            self.seen.find(problem, row, start + row);
            let mut row_lse = 0.0f32;
            let mut row_sum = 0.0f32;
            let queries = problem.queries();
            if start + row < queries.len {
                let at = queries.statistic(start + row, tokens);
                row_lse = lse[at];
                row_sum = row_sums[at];
            }
            self.lse[row] = row_lse;
            self.row_sums[row] = row_sum;
        }
    }
}

/// `dk` and `dv`. Grid: x = block of keys, y = key head, z = sequence.
#[cube(launch_unchecked)]
fn keys_kernel<E: Float, N: Size, M: Size>(
    q: &Array<Vector<E, N>>,
    k: &Array<Vector<E, N>>,
    v: &Array<Vector<E, N>>,
    dout: &Array<Vector<E, N>>,
    lse: &Array<f32>,
    row_sums: &Array<f32>,
    bounds_q: &Array<i32>,
    bounds_k: &Array<i32>,
    dk: &mut Array<Vector<E, N>>,
    dv: &mut Array<Vector<E, N>>,
    sizes: Sizes,
    scoring: Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let problem = problem(
        bounds_q,
        bounds_k,
        &sizes,
        &scoring,
        comptime!(Form { holds_keys: true, cached: false }),
        comptime!(tile.held()),
    );
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    let (vectors, tokens) = (sizes.vectors as usize, sizes.tokens_q as usize);
    if start < problem.keys().len {
        let mut k_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.held() * tile.stride()));
        let mut v_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.held() * tile.stride()));
        let mut q_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.streamed() * tile.stride()));
        let mut dout_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.streamed() * tile.stride()));
        let mut p_tile = SharedMemory::<Vector<f32, M>>::new(comptime!(tile.streamed() * tile.weights_stride()));
        let mut ds_tile = SharedMemory::<Vector<f32, M>>::new(comptime!(tile.streamed() * tile.weights_stride()));
        load::<E, N>(k, &mut k_tile, &problem.keys(), start, vectors, comptime!(tile.held()), tile);
        load::<E, N>(v, &mut v_tile, &problem.keys(), start, vectors, comptime!(tile.held()), tile);
        let mut query_tile = QueryTile::new(tile.streamed());
        let (held_unit, _) = unit(tile);
        let mut dk_sums = zeros::<N>(tile);
        let mut dv_sums = zeros::<N>(tile);
        let (first_row, _) = problem.streamed();
        let mut first = first_row;
        while first < problem.streamed().1 {
            load::<E, N>(q, &mut q_tile, &problem.queries(), first, vectors, comptime!(tile.streamed()), tile);
            load::<E, N>(dout, &mut dout_tile, &problem.queries(), first, vectors, comptime!(tile.streamed()), tile);
            query_tile.load(lse, row_sums, &problem, first, tokens, tile.streamed());
            sync_cube();
            let mut ps = products::<N>(&k_tile, &q_tile, vectors, tile);
            let mut slopes = Array::<f32>::new(comptime!(tile.held_rows * tile.streamed_rows));
            #[unroll]
            for j in 0..tile.streamed_rows {
                let row = streamed_row(j, tile);
                let (seen, lse) = (query_tile.seen.by(row), query_tile.lse[row]);
                #[unroll]
                for i in 0..tile.held_rows {
                    let is_seen = sees(seen, start + held_unit + i * tile.held_units);
                    let n = comptime!(i * tile.streamed_rows + j);
                    let (p, slope) = pair(ps[n], lse, is_seen, &scoring, capped, false);
                    ps[n] = p;
                    slopes[n] = slope;
                }
            }
            put::<M>(&ps, &mut p_tile, tile);
            let dps = products::<N>(&v_tile, &dout_tile, vectors, tile);
            #[unroll]
            for j in 0..tile.streamed_rows {
                let row_sum = query_tile.row_sums[streamed_row(j, tile)];
                #[unroll]
                for i in 0..tile.held_rows {
                    let n = comptime!(i * tile.streamed_rows + j);
                    slopes[n] *= dps[n] - row_sum;
                }
            }
            put::<M>(&slopes, &mut ds_tile, tile);
            sync_cube();
            let count = min(problem.streamed().1 - first, tile.streamed());
            accumulate::<N, M>(&mut dv_sums, &p_tile, &dout_tile, count, tile);
            accumulate::<N, M>(&mut dk_sums, &ds_tile, &q_tile, count, tile);
            first += comptime!(tile.streamed());
            sync_cube();
        }
        store::<E, N>(&dk_sums, &filled(scoring.scale, tile), dk, &problem.keys(), start, vectors, tile);
        store::<E, N>(&dv_sums, &filled(1.0, tile), dv, &problem.keys(), start, vectors, tile);
    }
}

/// `dq`. Grid: x = block of query rows, y = key head, z = sequence.
#[cube(launch_unchecked)]
fn queries_kernel<E: Float, N: Size, M: Size>(
    q: &Array<Vector<E, N>>,
    k: &Array<Vector<E, N>>,
    v: &Array<Vector<E, N>>,
    dout: &Array<Vector<E, N>>,
    lse: &Array<f32>,
    row_sums: &Array<f32>,
    bounds_q: &Array<i32>,
    bounds_k: &Array<i32>,
    dq: &mut Array<Vector<E, N>>,
    sizes: Sizes,
    scoring: Scoring,
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
    let (vectors, tokens) = (sizes.vectors as usize, sizes.tokens_q as usize);
    if start < problem.queries().len {
        let mut q_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.held() * tile.stride()));
        let mut dout_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.held() * tile.stride()));
        let mut k_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.streamed() * tile.stride()));
        let mut v_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.streamed() * tile.stride()));
        let mut ds_tile = SharedMemory::<Vector<f32, M>>::new(comptime!(tile.streamed() * tile.weights_stride()));
        load::<E, N>(q, &mut q_tile, &problem.queries(), start, vectors, comptime!(tile.held()), tile);
        load::<E, N>(dout, &mut dout_tile, &problem.queries(), start, vectors, comptime!(tile.held()), tile);
        let mut query_tile = QueryTile::new(tile.held());
        let (held_unit, _) = unit(tile);
        query_tile.load(lse, row_sums, &problem, start, tokens, tile.held());
        let mut sums = zeros::<N>(tile);
        let (first_key, _) = problem.streamed();
        let mut first = first_key;
        while first < problem.streamed().1 {
            load::<E, N>(k, &mut k_tile, &problem.keys(), first, vectors, comptime!(tile.streamed()), tile);
            load::<E, N>(v, &mut v_tile, &problem.keys(), first, vectors, comptime!(tile.streamed()), tile);
            sync_cube();
            let mut slopes = products::<N>(&q_tile, &k_tile, vectors, tile);
            #[unroll]
            for i in 0..tile.held_rows {
                let row = held_unit + i * tile.held_units;
                let (seen, lse) = (query_tile.seen.by(row), query_tile.lse[row]);
                #[unroll]
                for j in 0..tile.streamed_rows {
                    let key = streamed_row(j, tile);
                    let n = comptime!(i * tile.streamed_rows + j);
                    let (_, slope) = pair(slopes[n], lse, sees(seen, first + key), &scoring, capped, false);
                    slopes[n] = slope;
                }
            }
            let dps = products::<N>(&dout_tile, &v_tile, vectors, tile);
            #[unroll]
            for i in 0..tile.held_rows {
                let row_sum = query_tile.row_sums[held_unit + i * tile.held_units];
                #[unroll]
                for j in 0..tile.streamed_rows {
                    let n = comptime!(i * tile.streamed_rows + j);
                    slopes[n] *= dps[n] - row_sum;
                }
            }
            put::<M>(&slopes, &mut ds_tile, tile);
            sync_cube();
            let count = min(problem.streamed().1 - first, tile.streamed());
            accumulate::<N, M>(&mut sums, &ds_tile, &k_tile, count, tile);
            first += comptime!(tile.streamed());
            sync_cube();
        }
        store::<E, N>(&sums, &filled(scoring.scale, tile), dq, &problem.queries(), start, vectors, tile);
    }
}
