//! `out` and `lse` on tensor cores, by online softmax.
//!
//! Work: one cube per block of query rows, key head and sequence; a plane holds 16 rows, and the tiles of keys and values pass by
//! all of them. Traffic: q once; k and v once per block of query rows; out and lse once.
//! Numerics: scores, maxima and sums in f32; `exp(score - maximum)` is rounded to the storage type before it multiplies the values, while
//! the sum that divides them is of the numbers before rounding.

use cubecl::prelude::*;
use unsloth_common::{
    Launch, LaunchError,
    math::quick_exp,
    mma::{self, Chunk, Pair, Sums},
    unchecked,
};

use crate::{
    block::{Form, LOWEST, Problem, Scoring, Sizes, problem, score},
    forward::{Cached, Forward},
    shape::Shape,
    tensor::{Need, Tile, accumulate, fetch, fill, held_row, products, set, store},
};

/// Query rows of a sequence and key head below which a cube of tensor cores is mostly idle: one new token of a small group.
const FEW_ROWS: usize = 8;

/// Queries stay; keys and values pass by. `None` where the portable kernel does better or alone.
pub(crate) fn need<R: Runtime, E: Float>(client: &ComputeClient<R>, shape: &Shape) -> Option<Need> {
    if shape.max_seqlen_q * shape.group() < FEW_ROWS {
        return None;
    }
    let head_dim = shape.head_dim;
    // Beside the sums of 128 channels half of a unit's registers has room for the scores of 32 keys.
    let step = if head_dim > 64 { 32 } else { 64 };
    let tile = Tile { planes: 8, streamed: 64, step, head_dim };
    Need { held: 1, streamed: 2, per_streamed: 0, tile }.on_device::<R, E>(client)
}

/// As [`crate::forward()`], which has checked the shape.
pub(crate) fn forward<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    need: Need,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let (count, dim) = need.grid(launch, &shape, shape.max_seqlen_q * shape.group())?;
    unchecked!(forward_kernel::launch_unchecked::<E, R>(
        launch.client(),
        count,
        dim,
        launch.vectors::<E>("q", args.q, shape.len_q(), mma::CHUNK)?,
        launch.vectors::<E>("k", args.k, shape.len_k(), mma::CHUNK)?,
        launch.vectors::<E>("v", args.v, shape.len_k(), mma::CHUNK)?,
        launch.array::<i32>("cu_seqlens_q", args.cu_seqlens_q, shape.num_seqs + 1)?,
        launch.array::<i32>("cu_seqlens_k", args.cu_seqlens_k, shape.num_seqs + 1)?,
        launch.vectors::<E>("out", args.out, shape.len_q(), 2)?,
        launch.array::<f32>("lse", args.lse, shape.num_heads * shape.tokens_q)?,
        shape.sizes(mma::CHUNK),
        shape.scoring(),
        f32::NEG_INFINITY,
        shape.softcap.is_some(),
        need.tile,
    ));
    Ok(())
}

/// As [`crate::cached()`], which has checked the shape.
pub(crate) fn cached<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    need: Need,
    args: Cached<'_>,
) -> Result<(), LaunchError> {
    let (count, dim) = need.grid(launch, &shape, shape.max_seqlen_q * shape.group())?;
    unchecked!(cached_kernel::launch_unchecked::<E, R>(
        launch.client(),
        count,
        dim,
        launch.vectors::<E>("q", args.q, shape.len_q(), mma::CHUNK)?,
        launch.vectors::<E>("k", args.k, shape.len_k(), mma::CHUNK)?,
        launch.vectors::<E>("v", args.v, shape.len_k(), mma::CHUNK)?,
        launch.array::<i32>("cu_seqlens_q", args.cu_seqlens_q, shape.num_seqs + 1)?,
        launch.array::<i32>("lens", args.lens, shape.num_seqs)?,
        launch.vectors::<E>("out", args.out, shape.len_q(), 2)?,
        shape.sizes(mma::CHUNK),
        shape.scoring(),
        shape.softcap.is_some(),
        need.tile,
    ));
    Ok(())
}

/// Grid: x = block of query rows, y = key head, z = sequence.
#[cube(launch_unchecked)]
fn forward_kernel<E: Float>(
    q: &Array<Chunk<E>>,
    k: &Array<Chunk<E>>,
    v: &Array<Chunk<E>>,
    bounds_q: &Array<i32>,
    bounds_k: &Array<i32>,
    out: &mut Array<Pair<E>>,
    lse: &mut Array<f32>,
    sizes: Sizes,
    scoring: Scoring,
    minus_infinity: f32,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let form = comptime!(Form { holds_keys: false, cached: false });
    let problem = problem(bounds_q, bounds_k, &sizes, &scoring, form, comptime!(tile.held()));
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    if start < problem.queries().len {
        let rows = attend::<E>(q, k, v, out, &problem, start, &scoring, capped, tile);
        let (upper, column) = mma::place();
        #[unroll]
        for i in 0..2usize {
            let row = start + held_row() + upper + comptime!(8 * i);
            if column == 0 && row < problem.queries().len {
                let at = problem.queries().statistic(row, sizes.tokens_q as usize);
                let (greatest, total) = (rows.greatest[i], rows.total[i]);
                lse[at] = select(total == 0.0, minus_infinity, greatest + f32::ln(total));
            }
        }
    }
}

/// Grid as [`forward_kernel`].
#[cube(launch_unchecked)]
fn cached_kernel<E: Float>(
    q: &Array<Chunk<E>>,
    k: &Array<Chunk<E>>,
    v: &Array<Chunk<E>>,
    bounds_q: &Array<i32>,
    lens: &Array<i32>,
    out: &mut Array<Pair<E>>,
    sizes: Sizes,
    scoring: Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let form = comptime!(Form { holds_keys: false, cached: true });
    let problem = problem(bounds_q, lens, &sizes, &scoring, form, comptime!(tile.held()));
    let start = CUBE_POS_X as usize * comptime!(tile.held());
    if start < problem.queries().len {
        attend::<E>(q, k, v, out, &problem, start, &scoring, capped, tile);
    }
}

/// What is known of this unit's two rows, `[2]` each.
#[derive(CubeType)]
struct RowStatistics {
    /// First and last key that a row sees.
    first: Array<i32>,
    last: Array<i32>,
    /// Greatest score seen; the same for the four units of a row.
    greatest: Array<f32>,
    /// Sum of `exp(score - greatest)`: of this unit's keys while tiles pass by, of all keys in the end.
    total: Array<f32>,
}

/// Output of the query rows from `start` on, and their statistics.
#[cube]
fn attend<E: Float>(
    q: &Array<Chunk<E>>,
    k: &Array<Chunk<E>>,
    v: &Array<Chunk<E>>,
    out: &mut Array<Pair<E>>,
    problem: &Problem,
    start: usize,
    scoring: &Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) -> RowStatistics {
    let mut q_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.held() * tile.stride()));
    let mut k_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.streamed * tile.stride()));
    let mut v_tile = SharedMemory::<Chunk<E>>::new(comptime!(tile.streamed * tile.stride()));
    fill::<E>(q, &mut q_tile, &problem.queries(), start, comptime!(tile.held()), tile);
    let mut rows = start_rows(problem, start);
    let mut sums = mma::zeros(comptime!(tile.head_dim / 8));
    let (first_key, _) = problem.streamed();
    let mut first = first_key;
    while first < problem.streamed().1 {
        if comptime!(tile.loads_ahead()) {
            let next_k = fetch::<E>(k, &problem.keys(), first, tile.streamed, tile);
            let next_v = fetch::<E>(v, &problem.keys(), first, tile.streamed, tile);
            set::<E>(&next_k, &mut k_tile, tile.streamed, tile);
            set::<E>(&next_v, &mut v_tile, tile.streamed, tile);
        } else {
            fill::<E>(k, &mut k_tile, &problem.keys(), first, tile.streamed, tile);
            fill::<E>(v, &mut v_tile, &problem.keys(), first, tile.streamed, tile);
        }
        sync_cube();
        let keys = min(problem.streamed().1 - first, tile.streamed);
        let mut at = 0usize.runtime();
        while at < keys {
            let mut scores = products::<E>(&q_tile, held_row(), &k_tile, at, tile);
            exponentials(&mut scores, &mut rows, &mut sums, first + at, scoring, capped, tile);
            accumulate::<E>(&mut sums, &scores, &v_tile, at, tile);
            at += tile.step;
        }
        first += tile.streamed;
        sync_cube();
    }
    let mut factors = Array::<f32>::new(2usize);
    #[unroll]
    for i in 0..2usize {
        let total = mma::row_sum(rows.total[i]);
        rows.total[i] = total;
        // Nothing seen: zeros, not 0 / 0. NaN stays NaN.
        factors[i] = select(total == 0.0, 0.0, 1.0 / total);
    }
    store::<E>(&sums, &factors, out, &problem.queries(), start, tile);
    rows
}

/// Rows that have seen nothing.
#[cube]
fn start_rows(problem: &Problem, start: usize) -> RowStatistics {
    let mut rows = RowStatistics {
        first: Array::new(2usize),
        last: Array::new(2usize),
        greatest: Array::new(2usize),
        total: Array::new(2usize),
    };
    let (upper, _) = mma::place();
    #[unroll]
    for i in 0..2usize {
        let (first, last) = seen(problem, start + held_row() + upper + comptime!(8 * i));
        rows.first[i] = first;
        rows.last[i] = last;
        rows.greatest[i] = LOWEST;
        rows.total[i] = 0.0;
    }
    rows
}

/// First and last key that a query row sees; none for a row that does not exist.
#[cube]
pub(crate) fn seen(problem: &Problem, row: usize) -> (i32, i32) {
    let queries = problem.queries();
    let (first, last) = problem.mask().seen_by(row / queries.group);
    (first, select(row < queries.len, last, -1))
}

/// Turns the products with the `step` keys from `first` on into weights relative to the new maxima, and rescales what was summed before.
#[cube]
fn exponentials(
    scores: &mut Sums,
    rows: &mut RowStatistics,
    sums: &mut Sums,
    first: usize,
    scoring: &Scoring,
    #[comptime] capped: bool,
    #[comptime] tile: Tile,
) {
    let (_, column) = mma::place();
    let tiles = comptime!(tile.step / 8);
    #[unroll]
    for i in 0..2usize {
        let before = rows.greatest[i];
        let mut most = before;
        #[unroll]
        for j in 0..tiles {
            let product = scores.index(j)[i];
            let mut pair = Pair::<f32>::new(0.0);
            #[unroll]
            for e in 0..2usize {
                pair[e] = score(product[e], scoring, capped);
            }
            put(scores.index_mut(j), i, pair);
        }
        // Away from the diagonal and the ends a row sees all keys of a step.
        let (from, to) = (first as i32, (first + comptime!(tile.step - 1)) as i32);
        if from < rows.first[i] || to > rows.last[i] {
            #[unroll]
            for j in 0..tiles {
                let key = first + column + comptime!(8 * j);
                let masked = mask(scores.index(j)[i], key, rows.first[i], rows.last[i]);
                put(scores.index_mut(j), i, masked);
            }
        }
        #[unroll]
        for j in 0..tiles {
            let pair = scores.index(j)[i];
            most = max(most, max(pair[0], pair[1]));
        }
        most = mma::row_max(most);
        // Where nothing was seen yet, the weights of what is masked are 0 all the same.
        let base = select(most <= LOWEST, 0.0, most);
        let rescale = quick_exp(before - base);
        #[unroll]
        for c in 0..comptime!(tile.head_dim / 8) {
            let scaled = sums.index(c)[i] * Pair::<f32>::new(rescale);
            put(sums.index_mut(c), i, scaled);
        }
        let mut total = rows.total[i] * rescale;
        #[unroll]
        for j in 0..tiles {
            let pair = scores.index(j)[i];
            let mut weights = Pair::<f32>::new(0.0);
            #[unroll]
            for e in 0..2usize {
                let p = quick_exp(pair[e] - base);
                total += p;
                weights[e] = p;
            }
            put(scores.index_mut(j), i, weights);
        }
        rows.total[i] = total;
        rows.greatest[i] = most;
    }
}

/// Scores of two keys, [`LOWEST`] where masked.
#[cube]
fn mask(scores: Pair<f32>, key: usize, first: i32, last: i32) -> Pair<f32> {
    let mut masked = Pair::<f32>::new(0.0);
    #[unroll]
    for e in 0..2usize {
        let at = (key + e) as i32;
        masked[e] = select(at >= first && at <= last, scores[e], LOWEST);
    }
    masked
}

#[cube]
pub(crate) fn put(tile: &mut Array<Pair<f32>>, #[comptime] row: usize, pair: Pair<f32>) {
    tile[row] = pair;
}
