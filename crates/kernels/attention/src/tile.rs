//! How much of an attention one cube holds at a time.

use cubecl::ir::DeviceProperties;

use crate::block::FACTS;

/// Up to this much shared memory a cube may take all that the device offers.
const SMALL_SHARED_BYTES: usize = 48 * 1024;

/// From this much shared memory on, a large cube may take all of it.
const LARGE_SHARED_BYTES: usize = 200 * 1024;

/// Numbers of a unit in registers, products and the sums of one tile: with more, compilers spill.
const MAX_NUMBERS: usize = 72;

/// Numbers that a unit sums, where shared memory is small: of all tiles together, if a tile can be had so, else of one. Of more, a driver that
/// compiles for a processor makes more code than it can work off in minutes.
const MAX_SUMS: usize = 32;

/// What a kernel keeps in shared memory and registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    /// Tiles of held rows.
    pub(crate) held: usize,
    /// Tiles of streamed rows.
    pub(crate) streamed: usize,
    /// Tiles of weights, one number per held and streamed row.
    pub(crate) weights: usize,
    /// Tiles of sums, in registers.
    pub(crate) sums: usize,
    /// Held rows of a unit, at most, where shared memory is small.
    pub(crate) rows: usize,
    /// Numbers of each held row.
    pub(crate) per_held: usize,
    /// Numbers of each streamed row.
    pub(crate) per_streamed: usize,
    /// Numbers of each held row and unit.
    pub(crate) per_unit: usize,
}

/// A block of `held` rows stays with a cube, blocks of `streamed` rows pass by.
///
/// The units of a cube form a grid, `held_units` by `streamed_units`. A unit computes the scores of `held_rows` by
/// `streamed_rows` pairs, and sums `vectors` vectors of channels of its held rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    pub(crate) held_units: usize,
    pub(crate) streamed_units: usize,
    /// Held rows of a unit.
    pub(crate) held_rows: usize,
    /// Streamed rows of a unit.
    pub(crate) streamed_rows: usize,
    /// Vectors of channels of a unit.
    pub(crate) vectors: usize,
}

/// `held_units`, `streamed_units`, `held_rows`, `streamed_rows`: from the most reuse of what is loaded to the least memory.
const CANDIDATES: [[usize; 4]; 8] = [
    [16, 16, 4, 2],
    [16, 16, 2, 2],
    [16, 16, 2, 1],
    [16, 16, 1, 1],
    [8, 8, 2, 2],
    [8, 8, 2, 1],
    [8, 8, 1, 1],
    [4, 8, 1, 1],
];
/// What is tried before, where there is much shared memory.
const LARGE_CANDIDATES: [[usize; 4]; 3] = [[16, 8, 4, 8], [16, 16, 4, 4], [16, 8, 4, 4]];

impl Tile {
    /// The first candidate that fits the device, else the smallest, which the check of the launch then refuses.
    pub(crate) fn for_device(properties: &DeviceProperties, need: Need, (head_dim, width): (usize, usize)) -> Self {
        let hardware = &properties.hardware;
        Self::within(hardware.max_shared_memory_size, hardware.max_units_per_cube as usize, need, (head_dim, width))
    }

    fn within(shared_bytes: usize, units: usize, need: Need, (head_dim, width): (usize, usize)) -> Self {
        let tile = |[held_units, streamed_units, held_rows, streamed_rows]: [usize; 4]| {
            let vectors = (head_dim / width).div_ceil(streamed_units);
            Self { held_units, streamed_units, held_rows, streamed_rows, vectors }
        };
        let smallest = tile(CANDIDATES[CANDIDATES.len() - 1]);
        if shared_bytes >= LARGE_SHARED_BYTES {
            let fits = |tile: &Self| {
                // Room for a second cube, unless one has many units: four rows of each in one cube are faster than two rows in two cubes.
                let is_large = tile.units() >= 256 && tile.held_rows >= 4;
                let usable = if is_large { shared_bytes } else { shared_bytes / 2 };
                tile.units() <= units
                    && tile.shared_bytes(need, width) <= usable
                    && tile.held_rows <= if width == 1 { 2 } else { 4 }
                    && tile.numbers(width) <= MAX_NUMBERS
            };
            return LARGE_CANDIDATES.into_iter().chain(CANDIDATES).map(tile).find(fits).unwrap_or(smallest);
        }
        // What a device lends to one cube is about what a multiprocessor has: leave room for a second cube.
        let usable = (shared_bytes / 2).max(shared_bytes.min(SMALL_SHARED_BYTES));
        // Where channels come one at a time a unit has twice as many places to know, and four rows of them are too many.
        let rows = if width == 1 { need.rows.min(2) } else { need.rows };
        let fits = |tile: &Self, sums: usize| {
            tile.units() <= units
                && tile.shared_bytes(need, width) <= usable
                && tile.held_rows <= rows
                && need.sums * tile.sums(width) <= sums
        };
        // Long heads leave little shared memory nothing but narrow tiles, whose units have more channels each.
        let first = |sums: usize| CANDIDATES.into_iter().map(tile).find(|tile| fits(tile, sums));
        first(MAX_SUMS).or_else(|| first(need.sums * MAX_SUMS)).unwrap_or(smallest)
    }

    /// Numbers that a unit sums in one tile of sums.
    fn sums(&self, width: usize) -> usize {
        self.held_rows * self.vectors * width
    }

    /// Numbers of a unit: products, and the sums of one tile.
    fn numbers(&self, width: usize) -> usize {
        self.held_rows * self.streamed_rows + self.sums(width)
    }

    pub(crate) fn units(&self) -> usize {
        self.held_units * self.streamed_units
    }

    /// Whether kernels take several loads and rows in one round of a loop. Not of tiles for little shared memory: each access between two barriers
    /// is much work for a driver that compiles for a processor. Nor of long rows, which have loads enough.
    pub(crate) fn is_unrolled(&self) -> bool {
        self.streamed_rows >= 4 && self.vectors <= 2
    }

    /// Rows that a cube keeps.
    pub(crate) fn held(&self) -> usize {
        self.held_units * self.held_rows
    }

    /// Rows that pass by at a time.
    pub(crate) fn streamed(&self) -> usize {
        self.streamed_units * self.streamed_rows
    }

    /// Vectors from one row of a tile to the next: one more than a row has, so that the same channel of neighbouring rows
    /// lies in different banks.
    pub(crate) fn stride(&self) -> usize {
        self.vectors * self.streamed_units + 1
    }

    /// From one streamed row's weights to the next's, in vectors of what a unit holds.
    pub(crate) fn weights_stride(&self) -> usize {
        self.held_units + 1
    }

    /// From one held row's numbers of units to the next's: one unit goes over those of a row, its neighbour over the next's.
    pub(crate) fn most_stride(&self) -> usize {
        self.streamed_units + 1
    }

    pub(crate) fn shared_bytes(&self, need: Need, width: usize) -> usize {
        let rows = need.held * self.held() + need.streamed * self.streamed();
        let weights = need.weights * self.streamed() * self.weights_stride() * self.held_rows;
        let numbers = (need.per_held + need.per_unit * self.most_stride()) * self.held();
        let numbers = numbers + need.per_streamed * self.streamed() + FACTS;
        (rows * self.stride() * width + weights + numbers) * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: [Need; 3] = [
        Need { held: 1, streamed: 1, weights: 1, sums: 1, rows: 4, per_held: 4, per_streamed: 0, per_unit: 2 },
        Need { held: 2, streamed: 2, weights: 1, sums: 1, rows: 2, per_held: 4, per_streamed: 0, per_unit: 0 },
        Need { held: 2, streamed: 2, weights: 2, sums: 2, rows: 2, per_held: 0, per_streamed: 4, per_unit: 0 },
    ];

    /// From the least that a Vulkan driver with compute offers in practice to an H100.
    #[test]
    fn every_head_size_has_a_tile_that_fits() {
        for shared_bytes in [32, 48, 64, 99, 163, 227].map(|kib| kib * 1024) {
            for head_dim in 1..=256usize {
                for width in [1, 2, 4].into_iter().filter(|width| head_dim.is_multiple_of(*width)) {
                    for need in NEEDS {
                        let tile = Tile::within(shared_bytes, 256, need, (head_dim, width));
                        let case = format!("{shared_bytes} {head_dim} {width} {need:?} {tile:?}");
                        assert!(tile.shared_bytes(need, width) <= shared_bytes, "{case}");
                        if shared_bytes >= LARGE_SHARED_BYTES {
                            assert!(tile.numbers(width) <= MAX_NUMBERS, "{case}");
                        } else {
                            let most = if head_dim > 128 { need.sums * MAX_SUMS } else { MAX_SUMS };
                            assert!(need.sums * tile.sums(width) <= most, "{case}");
                        }
                        // What is known of a row is found by a unit of its own.
                        assert!(tile.held().max(tile.streamed()) <= tile.units(), "{case}");
                        assert!(tile.vectors * tile.streamed_units * width >= head_dim, "{case}");
                    }
                }
            }
        }
    }

    #[test]
    fn more_memory_gives_larger_tiles() {
        let small = Tile::within(32 * 1024, 256, NEEDS[0], (64, 4));
        let large = Tile::within(48 * 1024, 256, NEEDS[0], (64, 4));
        assert!(large.held() > small.held(), "{small:?} {large:?}");
    }
}
