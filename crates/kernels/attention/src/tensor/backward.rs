//! Gradients on tensor cores, with the probabilities recomputed from `lse`.
//!
//! Work: as the portable kernels, one cube per block of keys for `dk` and `dv`, then one per block of query rows for `dq`; a plane
//! holds 16 rows. Traffic: the held rows once; the streamed rows once per block of held rows.
//! Numerics: products and sums in f32; `P` and `ds` are rounded to the storage type before they multiply rows. Every sum has a fixed order.

use cubecl::prelude::*;
use unsloth_common::{
    Launch, LaunchError,
    mma::{self, Chunk, Pair, Sums},
    unchecked,
};

use crate::{
    backward::{Backward, QueryTile, pair},
    block::{Form, Scoring, Sizes, problem, sees},
    shape::Shape,
    tensor::{
        Need, Tile, accumulate, fill,
        forward::{put, seen},
        held_row, products, store,
    },
};

/// Scores of few rows at a time: `dk` and `dv` of 128 channels take half of the registers that a unit can have.
fn tile(shape: &Shape) -> Tile {
    Tile { planes: 4, streamed: 64, step: 16, head_dim: shape.head_dim }
}

/// Keys and values stay; queries and their gradients pass by, with their first and last key, `lse` and `D`.
fn keys_need<R: Runtime, E: Float>(client: &ComputeClient<R>, shape: &Shape) -> Option<Need> {
    // On sm_100a the assembler spills a few of the registers that these would take.
    if shape.softcap.is_some() && shape.head_dim == 32 {
        return None;
    }
    Need { held: 2, streamed: 2, per_streamed: 4, tile: tile(shape) }.on_device::<R, E>(client)
}

/// Queries and their gradients stay; keys and values pass by.
fn queries_need<R: Runtime, E: Float>(client: &ComputeClient<R>, shape: &Shape) -> Option<Need> {
    Need { held: 2, streamed: 2, per_streamed: 0, tile: tile(shape) }.on_device::<R, E>(client)
}

/// Launches `dk` and `dv`; `false` where the portable kernel has to do it.
pub(crate) fn keys<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    args: Backward<'_>,
) -> Result<bool, LaunchError> {
    let Some(need) = keys_need::<R, E>(launch.client(), &shape) else { return Ok(false) };
    let (count, dim) = need.grid(launch, &shape, shape.max_seqlen_k)?;
    let (len_q, len_k, rows) = (shape.len_q(), shape.len_k(), shape.tokens_q * shape.num_heads);
    unchecked!(keys_kernel::launch_unchecked::<E, R>(
        launch.client(),
        count,
        dim,
        launch.vectors::<E>("q", args.q, len_q, mma::CHUNK)?,
        launch.vectors::<E>("k", args.k, len_k, mma::CHUNK)?,
        launch.vectors::<E>("v", args.v, len_k, mma::CHUNK)?,
        launch.vectors::<E>("dout", args.dout, len_q, mma::CHUNK)?,
        launch.array::<f32>("lse", args.lse, rows)?,
        launch.array::<f32>("row_sums", args.row_sums, rows)?,
        launch.array::<i32>("cu_seqlens_q", args.cu_seqlens_q, shape.num_seqs + 1)?,
        launch.array::<i32>("cu_seqlens_k", args.cu_seqlens_k, shape.num_seqs + 1)?,
        launch.vectors::<E>("dk", args.dk, len_k, 2)?,
        launch.vectors::<E>("dv", args.dv, len_k, 2)?,
        shape.sizes(mma::CHUNK),
        shape.scoring(),
        shape.softcap.is_some(),
        need.tile,
    ));
    Ok(true)
}

/// Launches `dq`; `false` where the portable kernel has to do it.
pub(crate) fn queries<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    args: Backward<'_>,
) -> Result<bool, LaunchError> {
    let Some(need) = queries_need::<R, E>(launch.client(), &shape) else { return Ok(false) };
    let (count, dim) = need.grid(launch, &shape, shape.max_seqlen_q * shape.group())?;
    let (len_q, len_k, rows) = (shape.len_q(), shape.len_k(), shape.tokens_q * shape.num_heads);
    unchecked!(queries_kernel::launch_unchecked::<E, R>(
        launch.client(),
        count,
        dim,
        launch.vectors::<E>("q", args.q, len_q, mma::CHUNK)?,
        launch.vectors::<E>("k", args.k, len_k, mma::CHUNK)?,
        launch.vectors::<E>("v", args.v, len_k, mma::CHUNK)?,
        launch.vectors::<E>("dout", args.dout, len_q, mma::CHUNK)?,
        launch.array::<f32>("lse", args.lse, rows)?,
        launch.array::<f32>("row_sums", args.row_sums, rows)?,
        launch.array::<i32>("cu_seqlens_q", args.cu_seqlens_q, shape.num_seqs + 1)?,
        launch.array::<i32>("cu_seqlens_k", args.cu_seqlens_k, shape.num_seqs + 1)?,
        launch.vectors::<E>("dq", args.dq, len_q, 2)?,
        shape.sizes(mma::CHUNK),
        shape.scoring(),
        shape.softcap.is_some(),
        need.tile,
    ));
    Ok(true)
}

/// `dk` and `dv`. Grid: x = block of keys, y = key head, z = sequence.
#[cube(launch_unchecked)]
fn keys_kernel<E: Float>(
    q: &Array<Chunk<E>>,
    k: &Array<Chunk<E>>,
    v: &Array<Chunk<E>>,
    dout: &Array<Chunk<E>>,
    lse: &Array<f32>,
    row_sums: &Array<f32>,
    bounds_q: &Array<i32>,
    bounds_k: &Array<i32>,
    dk: &mut Array<Pair<E>>,
    dv: &mut Array<Pair<E>>,
    sizes: Sizes,
    scoring: Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let form = comptime!(Form { holds_keys: true, cached: false });
    let problem = problem(bounds_q, bounds_k, &sizes, &scoring, form, comptime!(tile.held()));
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    if start < problem.keys().len {
        let mut k_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.held() * tile.stride()));
        let mut v_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.held() * tile.stride()));
        let mut q_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.streamed * tile.stride()));
        let mut dout_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.streamed * tile.stride()));
        let mut query_tile = QueryTile::new(tile.streamed);
        fill::<E>(k, &mut k_tile, &problem.keys(), start, comptime!(tile.held()), tile);
        fill::<E>(v, &mut v_tile, &problem.keys(), start, comptime!(tile.held()), tile);
        let mut dk_sums = mma::zeros(comptime!(tile.head_dim / 8));
        let mut dv_sums = mma::zeros(comptime!(tile.head_dim / 8));
        let (first_row, _) = problem.streamed();
        let mut first = first_row;
        while first < problem.streamed().1 {
            fill::<E>(q, &mut q_tile, &problem.queries(), first, tile.streamed, tile);
            fill::<E>(dout, &mut dout_tile, &problem.queries(), first, tile.streamed, tile);
            query_tile.load(lse, row_sums, &problem, first, sizes.tokens_q as usize, tile.streamed);
            sync_cube();
            let rows = min(problem.streamed().1 - first, tile.streamed);
            let mut at = 0usize.runtime();
            while at < rows {
                let mut p = products::<E>(&k_tile, held_row(), &q_tile, at, tile);
                let mut ds = products::<E>(&v_tile, held_row(), &dout_tile, at, tile);
                differentiate_keys(&mut p, &mut ds, &query_tile, (start, at), &scoring, capped, tile);
                accumulate::<E>(&mut dv_sums, &p, &dout_tile, at, tile);
                accumulate::<E>(&mut dk_sums, &ds, &q_tile, at, tile);
                at += tile.step;
            }
            first += tile.streamed;
            sync_cube();
        }
        store::<E>(&dk_sums, &both(scoring.scale), dk, &problem.keys(), start, tile);
        store::<E>(&dv_sums, &both(1.0), dv, &problem.keys(), start, tile);
    }
}

/// Turns the products of keys with queries into `P^T`, and those of values with `dout` into `ds^T`. `from`: the cube's first key, and the
/// first of the tile's query rows that are columns here.
#[cube]
fn differentiate_keys(
    p: &mut Sums,
    ds: &mut Sums,
    queries: &QueryTile,
    from: (usize, usize),
    scoring: &Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let (upper, column) = mma::place();
    #[unroll]
    for j in 0..comptime!(tile.step / 8) {
        #[unroll]
        for i in 0..2usize {
            let key = from.0 + held_row() + upper + comptime!(8 * i);
            let (product, dp) = (p.index(j)[i], ds.index(j)[i]);
            let mut weights = Pair::<f32>::new(0.0);
            let mut slopes = Pair::<f32>::new(0.0);
            #[unroll]
            for e in 0..2usize {
                let row = from.1 + column + comptime!(8 * j + e);
                let (weight, slope) =
                    pair(product[e], queries.lse[row], sees(queries.seen.by(row), key), scoring, capped, true);
                weights[e] = weight;
                slopes[e] = slope * (dp[e] - queries.row_sums[row]);
            }
            put(p.index_mut(j), i, weights);
            put(ds.index_mut(j), i, slopes);
        }
    }
}

/// The same factor for this unit's two rows.
#[cube]
fn both(factor: f32) -> Array<f32> {
    let mut factors = Array::<f32>::new(2usize);
    factors[0] = factor;
    factors[1] = factor;
    factors
}

/// What is known of this unit's two query rows, `[2]` each.
#[derive(CubeType)]
struct QueryRows {
    first: Array<i32>,
    last: Array<i32>,
    lse: Array<f32>,
    row_sums: Array<f32>,
}

/// `dq`. Grid: x = block of query rows, y = key head, z = sequence.
#[cube(launch_unchecked)]
fn queries_kernel<E: Float>(
    q: &Array<Chunk<E>>,
    k: &Array<Chunk<E>>,
    v: &Array<Chunk<E>>,
    dout: &Array<Chunk<E>>,
    lse: &Array<f32>,
    row_sums: &Array<f32>,
    bounds_q: &Array<i32>,
    bounds_k: &Array<i32>,
    dq: &mut Array<Pair<E>>,
    sizes: Sizes,
    scoring: Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let form = comptime!(Form { holds_keys: false, cached: false });
    let problem = problem(bounds_q, bounds_k, &sizes, &scoring, form, comptime!(tile.held()));
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    if start < problem.queries().len {
        let mut q_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.held() * tile.stride()));
        let mut dout_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.held() * tile.stride()));
        let mut k_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.streamed * tile.stride()));
        let mut v_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.streamed * tile.stride()));
        fill::<E>(q, &mut q_tile, &problem.queries(), start, comptime!(tile.held()), tile);
        fill::<E>(dout, &mut dout_tile, &problem.queries(), start, comptime!(tile.held()), tile);
        let mut rows = QueryRows {
            first: Array::new(2usize),
            last: Array::new(2usize),
            lse: Array::new(2usize),
            row_sums: Array::new(2usize),
        };
        let (upper, _) = mma::place();
        #[unroll]
        for i in 0..2usize {
            let row = start + held_row() + upper + comptime!(8 * i);
            let (first, last) = seen(&problem, row);
            rows.first[i] = first;
            rows.last[i] = last;
            rows.lse[i] = 0.0;
            rows.row_sums[i] = 0.0;
            if row < problem.queries().len {
                let at = problem.queries().statistic(row, sizes.tokens_q as usize);
                rows.lse[i] = lse[at];
                rows.row_sums[i] = row_sums[at];
            }
        }
        let mut sums = mma::zeros(comptime!(tile.head_dim / 8));
        let (first_key, _) = problem.streamed();
        let mut first = first_key;
        while first < problem.streamed().1 {
            fill::<E>(k, &mut k_tile, &problem.keys(), first, tile.streamed, tile);
            fill::<E>(v, &mut v_tile, &problem.keys(), first, tile.streamed, tile);
            sync_cube();
            let keys = min(problem.streamed().1 - first, tile.streamed);
            let mut at = 0usize.runtime();
            while at < keys {
                let scores = products::<E>(&q_tile, held_row(), &k_tile, at, tile);
                let mut ds = products::<E>(&dout_tile, held_row(), &v_tile, at, tile);
                differentiate_queries(&scores, &mut ds, &rows, first + at, &scoring, capped, tile);
                accumulate::<E>(&mut sums, &ds, &k_tile, at, tile);
                at += tile.step;
            }
            first += tile.streamed;
            sync_cube();
        }
        store::<E>(&sums, &both(scoring.scale), dq, &problem.queries(), start, tile);
    }
}

/// Turns the products of `dout` with the values from `first` on into `ds`, given those of queries with keys.
#[cube]
fn differentiate_queries(
    scores: &Sums,
    ds: &mut Sums,
    rows: &QueryRows,
    first: usize,
    scoring: &Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let (_, column) = mma::place();
    #[unroll]
    for j in 0..comptime!(tile.step / 8) {
        #[unroll]
        for i in 0..2usize {
            let (product, dp) = (scores.index(j)[i], ds.index(j)[i]);
            let mut slopes = Pair::<f32>::new(0.0);
            #[unroll]
            for e in 0..2usize {
                let key = (first + column + comptime!(8 * j + e)) as i32;
                let seen = key >= rows.first[i] && key <= rows.last[i];
                let (_, slope) = pair(product[e], rows.lse[i], seen, scoring, capped, true);
                slopes[e] = slope * (dp[e] - rows.row_sums[i]);
            }
            put(ds.index_mut(j), i, slopes);
        }
    }
}
