//! Blocks of a product that planes of tensor cores make, each on its own or several with a part of the terms each, and what becomes of them.

use cubecl::prelude::*;
use unsloth_common::mma::{self, Pair, Sums};

use crate::{product::Form, tensor::Tile};

/// Adds up the sums of the planes that share a block, in order, on the first of them.
#[cube]
fn join(sums: &mut Sums, #[comptime] tile: Tile) {
    let mut passed = SharedMemory::<Pair<f32>>::new(comptime!(tile.passed()));
    let count = comptime!(tile.tiles_of_sums());
    let of_block = UNIT_POS as usize / comptime!(mma::PLANE * tile.splits) * comptime!(count * 2 * mma::PLANE);
    let at = of_block + UNIT_POS_PLANE as usize;
    let own = part(tile);
    for from in 1..tile.splits {
        if own == from {
            #[unroll]
            for i in 0..count {
                #[unroll]
                for row in 0..2usize {
                    passed[at + comptime!((2 * i + row) * mma::PLANE)] = sums.index(i)[row];
                }
            }
        }
        sync_cube();
        if own == 0 {
            #[unroll]
            for i in 0..count {
                #[unroll]
                for row in 0..2usize {
                    let total = sums.index(i)[row] + passed[at + comptime!((2 * i + row) * mma::PLANE)];
                    put_sum(sums.index_mut(i), row, total);
                }
            }
        }
        sync_cube();
    }
}

#[cube]
fn put_sum(tile: &mut Array<Pair<f32>>, #[comptime] row: usize, pair: Pair<f32>) {
    tile[row] = pair;
}

/// Which part of the terms this unit's plane multiplies.
#[cube]
pub(crate) fn part(#[comptime] tile: Tile) -> usize {
    UNIT_POS as usize / mma::PLANE % tile.splits
}

/// First row and column of the block of this unit's plane.
#[cube]
pub(crate) fn block(#[comptime] tile: Tile) -> (usize, usize) {
    let plane = UNIT_POS as usize / comptime!(mma::PLANE * tile.splits);
    let across = comptime!(tile.cols / tile.plane_cols);
    (plane / across * tile.plane_rows, plane % across * tile.plane_cols)
}

/// Sums of 0 again.
#[cube]
pub(crate) fn clear(sums: &mut Sums, #[comptime] tile: Tile) {
    #[unroll]
    for i in 0..comptime!(tile.tiles_of_sums()) {
        #[unroll]
        for row in 0..2usize {
            put_sum(sums.index_mut(i), row, Pair::<f32>::new(0.0));
        }
    }
}

/// Writes the sums of the tile of `out` at `from`, row and column, that are within `size`: times `how.0`, with the bias, and onto what
/// is there if `form` says so; `how.1`: onto what was written before, without the bias.
#[cube]
pub(crate) fn write<D: Numeric, Y: Numeric, N: Size>(
    sums: &mut Sums,
    bias: &ComptimeOption<Array<D>>,
    out: &mut Array<Vector<Y, N>>,
    from: (usize, usize),
    size: (usize, usize),
    how: (f32, bool),
    #[comptime] form: Form,
    #[comptime] tile: Tile,
) {
    if comptime!(tile.splits > 1) {
        join(sums, tile);
    }
    let (plane_row, plane_col) = block(tile);
    let (upper, column) = mma::place();
    let tiles_across = comptime!(tile.plane_cols / 8);
    // The first plane of a block has all of its sums.
    let rows = if comptime!(tile.splits > 1) { select(part(tile) == 0, size.0, 0) } else { size.0 };
    let width = N::value();
    #[unroll]
    for i in 0..comptime!(tile.plane_rows / 8) {
        let row = from.0 + plane_row + comptime!(8 * i) + upper;
        #[unroll]
        for j in 0..tiles_across {
            let pair = sums.index(comptime!(i / 2 * tiles_across + j))[comptime!(i % 2)];
            #[unroll]
            for e in 0..comptime!(2 / width) {
                let col = from.1 + plane_col + comptime!(8 * j + e * width) + column;
                if row < rows && col < size.1 {
                    let mut sums = Vector::<f32, N>::new(0.0);
                    #[unroll]
                    for lane in 0..width {
                        sums[lane] = pair[comptime!(e * width + lane)] * how.0;
                    }
                    store::<D, Y, N>(bias, out, row * size.1 + col, col, sums, how.1, form.accumulate);
                }
            }
        }
    }
}

/// Writes neighbours in a row, the first of them element `at` of the output.
#[cube]
fn store<D: Numeric, Y: Numeric, N: Size>(
    bias: &ComptimeOption<Array<D>>,
    out: &mut Array<Vector<Y, N>>,
    at: usize,
    col: usize,
    sums: Vector<f32, N>,
    further: bool,
    #[comptime] accumulate: bool,
) {
    let width = N::value();
    let mut total = sums;
    #[comptime]
    if let ComptimeOption::Some(bias) = bias {
        #[unroll]
        for lane in 0..width {
            total[lane] += select(further, 0.0, f32::cast_from(bias[col + lane]));
        }
    }
    if comptime!(accumulate).runtime() || further {
        total += Vector::<f32, N>::cast_from(out[at / width]);
    }
    out[at / width] = Vector::cast_from(total);
}
