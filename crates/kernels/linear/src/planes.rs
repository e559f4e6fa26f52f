//! Planes of tensor cores that share a block of a product, each with a part of the terms.

use cubecl::prelude::*;
use unsloth_common::mma::{self, Pair, Sums};

use crate::tensor::Tile;

/// Adds up the sums of the planes that share a block, in order, on the first of them.
#[cube]
pub(crate) fn join(sums: &mut Sums, #[comptime] tile: Tile) {
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
