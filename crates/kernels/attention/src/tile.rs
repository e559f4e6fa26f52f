//! How much of an attention one cube holds at a time.

use cubecl::ir::DeviceProperties;

use crate::block::FACTS;

/// Up to this much shared memory a cube may take all that the device offers.
const SMALL_SHARED_BYTES: usize = 48 * 1024;

/// Numbers that a unit sums in registers: more would leave too few cubes at a time, or spill.
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
    /// Held rows of a unit, at most.
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
        // What a device lends to one cube is about what a multiprocessor has: leave room for a second cube.
        let usable = (shared_bytes / 2).max(shared_bytes.min(SMALL_SHARED_BYTES));
        // Where channels come one at a time a unit has twice as many places to know, and four rows of them are too many.
        let rows = if width == 1 { need.rows.min(2) } else { need.rows };
        let fits = |tile: &Self, sums: usize| {
            tile.units() <= units
                && tile.shared_bytes(need, width) <= usable
                && tile.held_rows <= rows
                && tile.sums(need, width) <= sums
        };
        let smallest = tile(CANDIDATES[CANDIDATES.len() - 1]);
        // Long heads leave little shared memory nothing but narrow tiles, whose units have more channels each.
        let first = |sums: usize| CANDIDATES.into_iter().map(tile).find(|tile| fits(tile, sums));
        first(MAX_SUMS).or_else(|| first(need.sums * MAX_SUMS)).unwrap_or(smallest)
    }

    /// Numbers that a unit sums.
    fn sums(&self, need: Need, width: usize) -> usize {
        need.sums * self.held_rows * self.vectors * width
    }

    pub(crate) fn units(&self) -> usize {
        self.held_units * self.streamed_units
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

    /// Numbers from one held row's weights to the next's.
    pub(crate) fn weights_stride(&self) -> usize {
        self.streamed() + 1
    }

    pub(crate) fn shared_bytes(&self, need: Need, width: usize) -> usize {
        let rows = need.held * self.held() + need.streamed * self.streamed();
        let weights = need.weights * self.held() * self.weights_stride();
        let numbers = (need.per_held + need.per_unit * self.streamed_units) * self.held();
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
                        let is_small = shared_bytes < 128 * 1024 && head_dim > 128;
                        let most = if is_small { need.sums * MAX_SUMS } else { MAX_SUMS };
                        assert!(tile.sums(need, width) <= most, "{case}");
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
