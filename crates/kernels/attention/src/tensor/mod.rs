//! The same attention on tensor cores, for half-precision types: products of tiles, scores and probabilities in registers.
//!
//! A plane holds 16 rows. The scores that its products leave in registers are, rounded to the storage type, the left operand of the
//! products that follow (Dao 2023, section 3): no probability passes through memory. For `dk` and `dv` a plane holds keys, so that
//! `P^T` and `ds^T` are left operands in the same way.

pub(crate) mod backward;
pub(crate) mod forward;
mod tile;

use cubecl::prelude::*;
use unsloth_common::mma::{self, Chunk, Pair, Sums};

pub(crate) use tile::{Need, Tile};

use crate::block::Rows;

/// Copies rows `start .. start + count` to a tile, zeros beyond the last row.
#[cube]
fn fill<E: Float>(
    from: &Array<Chunk<E>>,
    to: &mut SharedMemory<Chunk<E>>,
    rows: &Rows,
    start: usize,
    #[comptime] count: usize,
    #[comptime] tile: Tile,
) {
    if comptime!(tile.loads_ahead()) {
        let held = fetch::<E>(from, rows, start, count, tile);
        set::<E>(&held, to, count, tile);
    } else {
        #[unroll]
        for i in 0..comptime!(tile.loads(count)) {
            let chunk = fetch_one::<E>(from, rows, start, i, count, tile);
            set_one::<E>(to, chunk, i, count, tile);
        }
    }
}

/// What this unit loads of rows `start .. start + count`: all of it is under way before it waits for any.
#[cube]
fn fetch<E: Float>(
    from: &Array<Chunk<E>>,
    rows: &Rows,
    start: usize,
    #[comptime] count: usize,
    #[comptime] tile: Tile,
) -> Array<Chunk<E>> {
    let mut held = Array::<Chunk<E>>::new(comptime!(tile.loads(count)));
    #[unroll]
    for i in 0..comptime!(tile.loads(count)) {
        held[i] = fetch_one::<E>(from, rows, start, i, count, tile);
    }
    held
}

/// Puts what [`fetch`] has loaded into a tile.
#[cube]
fn set<E: Float>(
    held: &Array<Chunk<E>>,
    to: &mut SharedMemory<Chunk<E>>,
    #[comptime] count: usize,
    #[comptime] tile: Tile,
) {
    #[unroll]
    for i in 0..comptime!(tile.loads(count)) {
        set_one::<E>(to, held[i], i, count, tile);
    }
}

/// The `load`-th chunk of this unit, zeros beyond the last row.
#[cube]
fn fetch_one<E: Float>(
    from: &Array<Chunk<E>>,
    rows: &Rows,
    start: usize,
    #[comptime] load: usize,
    #[comptime] count: usize,
    #[comptime] tile: Tile,
) -> Chunk<E> {
    let chunks = comptime!(tile.chunks());
    let item = UNIT_POS as usize + comptime!(load * tile.units());
    let (row, chunk) = (item / chunks, item % chunks);
    let mut value = Chunk::<E>::new(E::new(0.0));
    if item < comptime!(count * chunks) && start + row < rows.len {
        value = from[rows.offset(start + row, chunks) + chunk];
    }
    value
}

#[cube]
fn set_one<E: Float>(
    to: &mut SharedMemory<Chunk<E>>,
    value: Chunk<E>,
    #[comptime] load: usize,
    #[comptime] count: usize,
    #[comptime] tile: Tile,
) {
    let chunks = comptime!(tile.chunks());
    let item = UNIT_POS as usize + comptime!(load * tile.units());
    if item < comptime!(count * chunks) {
        to[item / chunks * comptime!(tile.stride()) + item % chunks] = value;
    }
}

/// First of the 16 rows that this unit's plane holds.
#[cube]
fn held_row() -> usize {
    UNIT_POS as usize / mma::PLANE * mma::ROWS
}

/// Products of the 16 held rows from `row` on with the `step` streamed rows from `first` on.
#[cube]
fn products<E: Float>(
    held: &SharedMemory<Chunk<E>>,
    row: usize,
    streamed: &SharedMemory<Chunk<E>>,
    first: usize,
    #[comptime] tile: Tile,
) -> Sums {
    let stride = comptime!(tile.stride());
    let mut sums = mma::zeros(comptime!(tile.step / 8));
    #[unroll]
    for c in 0..comptime!(tile.head_dim / mma::DEPTH) {
        let left = mma::left::<E>(held, row, comptime!(2 * c), stride);
        #[unroll]
        for j in 0..comptime!(tile.step / mma::COLUMNS) {
            let right =
                mma::right_transposed::<E>(streamed, first + comptime!(j * mma::COLUMNS), comptime!(2 * c), stride);
            mma::multiply_add::<E>(&left, &right.first, sums.index_mut(comptime!(2 * j)));
            mma::multiply_add::<E>(&left, &right.second, sums.index_mut(comptime!(2 * j + 1)));
        }
    }
    sums
}

/// `sums += weights * rows`, the weights of the `step` streamed rows from `first` on rounded to `E`.
#[cube]
fn accumulate<E: Float>(
    sums: &mut Sums,
    weights: &Sums,
    streamed: &SharedMemory<Chunk<E>>,
    first: usize,
    #[comptime] tile: Tile,
) {
    #[unroll]
    for j in 0..comptime!(tile.step / mma::DEPTH) {
        let left = mma::left_from_sums::<E>(weights.index(comptime!(2 * j)), weights.index(comptime!(2 * j + 1)));
        #[unroll]
        for c in 0..comptime!(tile.head_dim / mma::COLUMNS) {
            let right = mma::right::<E>(
                streamed,
                first + comptime!(j * mma::DEPTH),
                comptime!(2 * c),
                comptime!(tile.stride()),
            );
            mma::multiply_add::<E>(&left, &right.first, sums.index_mut(comptime!(2 * c)));
            mma::multiply_add::<E>(&left, &right.second, sums.index_mut(comptime!(2 * c + 1)));
        }
    }
}

/// Writes the sums of this unit's two rows, each times its factor, to those of the rows from `start` on that exist.
#[cube]
fn store<E: Float>(
    sums: &Sums,
    factors: &Array<f32>,
    to: &mut Array<Pair<E>>,
    rows: &Rows,
    start: usize,
    #[comptime] tile: Tile,
) {
    let (upper, column) = mma::place();
    #[unroll]
    for i in 0..2usize {
        let row = start + held_row() + upper + comptime!(8 * i);
        if row < rows.len {
            let at = rows.offset(row, comptime!(tile.head_dim / 2)) + column / 2;
            #[unroll]
            for c in 0..comptime!(tile.head_dim / 8) {
                let pair = sums.index(c)[i] * Pair::<f32>::new(factors[i]);
                to[at + comptime!(4 * c)] = Pair::cast_from(pair);
            }
        }
    }
}
