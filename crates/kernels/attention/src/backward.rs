//! Gradients, with the probabilities recomputed from `lse` (Dao 2023, algorithm 2).
//!
//! Work: `D` by one unit per row; then `dk` and `dv` by one cube per block of keys, key head and sequence, which all query rows
//! that see it pass by; then `dq` by one cube per block of query rows, which its keys pass by. The scores are computed twice, so
//! that no gradient is ever added to by two cubes: no atomics, and every sum has a fixed order.
//! Traffic: the held rows once; the streamed rows once per block of held rows.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError};

use crate::{
    block::{
        Problem, Scoring, Sizes, accumulate, filled, horizontal_sum, load, problem, products, score, store, unit, zeros,
    },
    shape::Shape,
    tile::{Need, Tile},
};

/// Keys and values stay; queries and their gradients pass by; P and ds are weights.
const KEYS_NEED: Need = Need { held: 2, streamed: 2, weights: 2, reduces: false };
/// Queries and their gradients stay; keys and values pass by; ds are weights.
const QUERIES_NEED: Need = Need { held: 2, streamed: 2, weights: 1, reduces: false };

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
    if shape.tokens_k > 0 {
        keys::<R, E>(&launch, shape, args, width)?;
    }
    if shape.tokens_q > 0 {
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
    row_sums_kernel::launch::<E, R>(
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
    );
    Ok(())
}

/// `D = sum_channels(dout * out)`. Grid: unit = row, walking on by the size of the grid.
#[cube(launch)]
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
    keys_kernel::launch::<E, R>(
        launch.client(),
        count,
        dim,
        width,
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
    );
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
    queries_kernel::launch::<E, R>(
        launch.client(),
        count,
        dim,
        width,
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
    );
    Ok(())
}

/// `P` and `ds` of one pair that is seen.
#[cube]
fn pair(product: f32, dp: f32, of_row: (f32, f32), scoring: &Scoring, #[comptime] capped: bool) -> (f32, f32) {
    let (lse, row_sum) = of_row;
    let s = score(product, scoring, capped);
    let p = f32::exp(s - lse);
    let mut ds = p * (dp - row_sum);
    if comptime!(capped) {
        let part = s / scoring.softcap;
        ds *= 1.0 - part * part;
    }
    (p, ds)
}

/// Statistics of a query row: `lse` and `D`, zeros for a row that does not exist.
#[cube]
fn statistics(lse: &Array<f32>, row_sums: &Array<f32>, problem: &Problem, row: usize, tokens: usize) -> (f32, f32) {
    let mut row_lse = 0.0f32;
    let mut row_sum = 0.0f32;
    if row < problem.queries.len {
        let at = problem.queries.statistic(row, tokens);
        row_lse = lse[at];
        row_sum = row_sums[at];
    }
    (row_lse, row_sum)
}

/// `dk` and `dv`. Grid: x = block of keys, y = key head, z = sequence.
#[cube(launch)]
fn keys_kernel<E: Float, N: Size>(
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
    let problem = problem(bounds_q, bounds_k, &sizes, &scoring, false);
    let (held_unit, streamed_unit) = unit(tile);
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    let (vectors, tokens) = (sizes.vectors as usize, sizes.tokens_q as usize);
    if start < problem.keys.len {
        let mut k_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.held() * tile.stride()));
        let mut v_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.held() * tile.stride()));
        let mut q_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.streamed() * tile.stride()));
        let mut dout_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.streamed() * tile.stride()));
        let mut p_tile = SharedMemory::<f32>::new(comptime!(tile.held() * tile.weights_stride()));
        let mut ds_tile = SharedMemory::<f32>::new(comptime!(tile.held() * tile.weights_stride()));
        load::<E, N>(k, &mut k_tile, &problem.keys, start, vectors, comptime!(tile.held()), tile);
        load::<E, N>(v, &mut v_tile, &problem.keys, start, vectors, comptime!(tile.held()), tile);
        let mut dk_sums = zeros::<N>(tile);
        let mut dv_sums = zeros::<N>(tile);
        let last = min(start + comptime!(tile.held()), problem.keys.len) - 1;
        let (first_query, end_query) = problem.mask.queries(start, last);
        let group = problem.queries.group;
        let end = end_query * group;
        let mut first = first_query * group;
        while first < end {
            sync_cube();
            load::<E, N>(q, &mut q_tile, &problem.queries, first, vectors, comptime!(tile.streamed()), tile);
            load::<E, N>(dout, &mut dout_tile, &problem.queries, first, vectors, comptime!(tile.streamed()), tile);
            sync_cube();
            let dots = products::<N>(&k_tile, &q_tile, vectors, tile);
            let dps = products::<N>(&v_tile, &dout_tile, vectors, tile);
            #[unroll]
            for j in 0..tile.streamed_rows {
                let col = streamed_unit + j * tile.streamed_units;
                let row = first + col;
                let of_row = statistics(lse, row_sums, &problem, row, tokens);
                #[unroll]
                for i in 0..tile.held_rows {
                    let key = held_unit + i * tile.held_units;
                    let at = i * tile.streamed_rows + j;
                    let (p, ds) = pair(dots[at], dps[at], of_row, &scoring, capped);
                    let seen = row < end && problem.mask.sees(row / group, start + key);
                    p_tile[key * comptime!(tile.weights_stride()) + col] = select(seen, p, 0.0);
                    ds_tile[key * comptime!(tile.weights_stride()) + col] = select(seen, ds, 0.0);
                }
            }
            sync_cube();
            let count = min(end - first, comptime!(tile.streamed()));
            accumulate::<N>(&mut dv_sums, &p_tile, &dout_tile, count, tile);
            accumulate::<N>(&mut dk_sums, &ds_tile, &q_tile, count, tile);
            first += comptime!(tile.streamed());
        }
        store::<E, N>(&dk_sums, &filled(scoring.scale, tile), dk, &problem.keys, start, vectors, tile);
        store::<E, N>(&dv_sums, &filled(1.0, tile), dv, &problem.keys, start, vectors, tile);
    }
}

/// `dq`. Grid: x = block of query rows, y = key head, z = sequence.
#[cube(launch)]
fn queries_kernel<E: Float, N: Size>(
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
    let problem = problem(bounds_q, bounds_k, &sizes, &scoring, false);
    let (held_unit, streamed_unit) = unit(tile);
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    let (vectors, tokens) = (sizes.vectors as usize, sizes.tokens_q as usize);
    if start < problem.queries.len {
        let mut q_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.held() * tile.stride()));
        let mut dout_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.held() * tile.stride()));
        let mut k_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.streamed() * tile.stride()));
        let mut v_tile = SharedMemory::<Vector<f32, N>>::new(comptime!(tile.streamed() * tile.stride()));
        let mut ds_tile = SharedMemory::<f32>::new(comptime!(tile.held() * tile.weights_stride()));
        load::<E, N>(q, &mut q_tile, &problem.queries, start, vectors, comptime!(tile.held()), tile);
        load::<E, N>(dout, &mut dout_tile, &problem.queries, start, vectors, comptime!(tile.held()), tile);
        let mut sums = zeros::<N>(tile);
        let group = problem.queries.group;
        let last = min(start + comptime!(tile.held()), problem.queries.len) - 1;
        let (first_key, end) = problem.mask.keys(start / group, last / group);
        let mut first = first_key;
        while first < end {
            sync_cube();
            load::<E, N>(k, &mut k_tile, &problem.keys, first, vectors, comptime!(tile.streamed()), tile);
            load::<E, N>(v, &mut v_tile, &problem.keys, first, vectors, comptime!(tile.streamed()), tile);
            sync_cube();
            let dots = products::<N>(&q_tile, &k_tile, vectors, tile);
            let dps = products::<N>(&dout_tile, &v_tile, vectors, tile);
            #[unroll]
            for i in 0..tile.held_rows {
                let row = held_unit + i * tile.held_units;
                let of_row = statistics(lse, row_sums, &problem, start + row, tokens);
                #[unroll]
                for j in 0..tile.streamed_rows {
                    let col = streamed_unit + j * tile.streamed_units;
                    let at = i * tile.streamed_rows + j;
                    let (_p, ds) = pair(dots[at], dps[at], of_row, &scoring, capped);
                    let seen = first + col < end && problem.mask.sees((start + row) / group, first + col);
                    ds_tile[row * comptime!(tile.weights_stride()) + col] = select(seen, ds, 0.0);
                }
            }
            sync_cube();
            let count = min(end - first, comptime!(tile.streamed()));
            accumulate::<N>(&mut sums, &ds_tile, &k_tile, count, tile);
            first += comptime!(tile.streamed());
        }
        store::<E, N>(&sums, &filled(scoring.scale, tile), dq, &problem.queries, start, vectors, tile);
    }
}
