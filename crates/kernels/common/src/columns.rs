//! Sums over the rows of a matrix, one for each column, in two steps of fixed order: a kernel of its own sums parts of the rows, then
//! [`fold_columns`] adds up the parts. No float atomics, so the same bits on every run.

#![allow(missing_docs, reason = "the cube macro writes modules and functions without documentation")]

use crate::unchecked;
use cubecl::{prelude::*, server::Handle};

use crate::{Launch, LaunchError};

/// Partial sums of a matrix, at most: 4 MiB. Where a unit has eight columns, parts of so many sums keep about a thousand units of each
/// multiprocessor of a large card busy.
const MAX_SUMS: usize = 1 << 20;
/// Parts of the rows, at most, however short those are.
const MAX_PARTS: usize = 4096;
/// Rows of a part, at least, on average: fewer, and the sums would be a large share of what is read and written.
const MIN_PART_ROWS: usize = 4;
/// Rows of a part, at least, where parts are blocks for [`Launch::columns`]: there, columns keep a device busy too.
const MIN_BLOCK_ROWS: usize = 16;
/// Units of a cube of the first step, at most: small cubes are spread over a device more evenly.
const UNITS: usize = 64;
/// Columns of a cube of the second step: 64 bytes of each part.
const FOLD_COLUMNS: usize = 16;
/// Units of such a cube, at most.
const FOLD_UNITS: usize = 512;
/// Partial sums that a unit reads before it adds them, so that it waits for memory less often.
const LOADS: usize = 16;

/// Parts, at most, that so many rows are summed in: workspace for the partial sums is f32 `[column_parts(rows, columns), columns]`.
///
/// Never more than rows, nor fewer than one.
pub fn column_parts(rows: usize, columns: usize) -> usize {
    let most = (MAX_SUMS / columns.max(1)).clamp(1, MAX_PARTS);
    rows.div_ceil(MIN_PART_ROWS).clamp(1, most)
}

/// Geometry of a first step. The vector of columns is `ABSOLUTE_POS_X`, the part `CUBE_POS_Y`: a block of rows.
#[derive(Clone, Debug)]
pub struct ColumnGrid {
    /// Number of cubes.
    pub count: CubeCount,
    /// Units of a cube in one dimension.
    pub dim: CubeDim,
    /// Blocks, no more than [`column_parts`]; none of them is empty.
    pub parts: usize,
    /// Rows of a block; the last one may have fewer.
    pub part_rows: u32,
}

/// Geometry of the second step, for [`fold_parts()`].
#[derive(Clone, Debug)]
pub struct FoldGrid {
    /// Number of cubes: in x for all columns, in y for all sums.
    pub count: CubeCount,
    /// Units of a cube: in x one for each of its columns, in y groups that take different parts.
    pub dim: CubeDim,
}

impl<R: Runtime> Launch<'_, R> {
    /// Units that each sum a vector of `width` columns of one block of rows.
    ///
    /// # Errors
    /// [`LaunchError::Limit`] if the grid exceeds the device's.
    pub fn columns(&self, rows: usize, columns: usize, width: usize) -> Result<ColumnGrid, LaunchError> {
        let part_rows = rows.div_ceil(column_parts(rows, columns)).max(MIN_BLOCK_ROWS);
        let (parts, vectors) = (rows.div_ceil(part_rows), columns / width);
        let units = self.units_for(vectors.min(UNITS));
        let dim = CubeDim::new_1d(units as u32);
        self.cube(dim, 0)?;
        let count = self.cubes(vectors.div_ceil(units), parts, 1)?;
        Ok(ColumnGrid { count, dim, parts, part_rows: part_rows as u32 })
    }

    /// Cubes that fold so many parts of each of so many sums over `columns`.
    ///
    /// # Errors
    /// [`LaunchError::Limit`] if the grid exceeds the device's.
    pub fn fold(&self, parts: usize, columns: usize, sums: usize) -> Result<FoldGrid, LaunchError> {
        let most = (self.most_units().min(FOLD_UNITS) / FOLD_COLUMNS).max(1);
        let plane = self.client().properties().hardware.plane_size_min as usize;
        let least = (plane / FOLD_COLUMNS).max(1).next_power_of_two().min(most);
        let groups = parts.div_ceil(LOADS).next_power_of_two().clamp(least, most);
        let dim = CubeDim::new_2d(FOLD_COLUMNS as u32, groups as u32);
        self.cube(dim, FOLD_UNITS * sums * size_of::<f32>())?;
        Ok(FoldGrid { count: self.cubes(columns.div_ceil(FOLD_COLUMNS), sums, 1)?, dim })
    }
}

/// Partial sums and where they go.
#[derive(Clone, Copy)]
pub struct ColumnSum<'a> {
    /// f32 `[parts, columns]`
    pub partial: &'a Handle,
    /// Name of `total` in errors.
    pub arg: &'static str,
    /// f32 `[columns]`, added to.
    pub total: &'a Handle,
}

/// Launches the second step, in one kernel for all sums: `total += sum_parts(partial)`.
///
/// # Errors
/// [`LaunchError`] for a buffer that is too small, or a limit exceeded.
pub fn fold_columns<R: Runtime>(
    launch: &Launch<'_, R>,
    (parts, columns): (usize, usize),
    sums: &[ColumnSum<'_>],
) -> Result<(), LaunchError> {
    let grid = launch.fold(parts, columns, sums.len())?;
    let partial = sums.iter().map(|sum| launch.array::<f32>("workspace", sum.partial, parts * columns));
    let totals = sums.iter().map(|sum| launch.array::<f32>(sum.arg, sum.total, columns));
    unchecked!(fold_columns_kernel::launch_unchecked::<R>(
        launch.client(),
        grid.count,
        grid.dim,
        partial.collect::<Result<SequenceArg<R, _>, _>>()?,
        totals.collect::<Result<SequenceArg<R, _>, _>>()?,
        parts as u32,
        columns as u32,
    ));
    Ok(())
}

/// Grid: that of [`Launch::fold`].
#[cube(launch_unchecked)]
fn fold_columns_kernel(partial: &Sequence<Array<f32>>, totals: &mut Sequence<Array<f32>>, parts: u32, columns: u32) {
    let (parts, columns) = (parts as usize, columns as usize);
    #[unroll]
    for sum in 0..partial.len() {
        if CUBE_POS_Y as usize == sum {
            let folded = fold_parts(partial.index(sum), parts, columns);
            let column = fold_column();
            if UNIT_POS_Y == 0 && column < columns {
                let total = totals.index_mut(sum);
                total[column] += folded;
            }
        }
    }
}

/// The column of this unit, in a grid of [`Launch::fold`]; it may lie beyond the last.
#[cube]
pub fn fold_column() -> usize {
    CUBE_POS_X as usize * FOLD_COLUMNS + UNIT_POS_X as usize
}

/// Sum of a column over all parts, on the units with `UNIT_POS_Y == 0`, in a grid of [`Launch::fold`]. Every unit calls it.
///
/// Groups of units take different parts, so that few columns of many parts have enough loads under way. The order is fixed.
#[cube]
pub fn fold_parts(partial: &Array<f32>, parts: usize, columns: usize) -> f32 {
    let mut sums = SharedMemory::<f32>::new(FOLD_UNITS);
    let (lane, group, groups) = (UNIT_POS_X as usize, UNIT_POS_Y as usize, CUBE_DIM_Y as usize);
    let column = min(fold_column(), columns - 1);
    let mut sum = 0.0f32;
    let mut first = group;
    while first < parts {
        let mut values = Array::<f32>::new(LOADS);
        #[unroll]
        for i in 0..LOADS {
            let part = min(first + i * groups, parts - 1);
            values[i] = partial[part * columns + column];
        }
        #[unroll]
        for i in 0..LOADS {
            sum += select(first + i * groups < parts, values[i], 0.0);
        }
        first += groups * LOADS;
    }
    sums[group * FOLD_COLUMNS + lane] = sum;
    sync_cube();
    let mut total = 0.0f32;
    if group == 0 {
        for other in 0..groups {
            total += sums[other * FOLD_COLUMNS + lane];
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::column_parts;

    #[test]
    fn parts_by_hand() {
        // rows / 4, rounded up; 2^20 / columns; 4096; and never none.
        assert_eq!(column_parts(0, 2048), 1);
        assert_eq!(column_parts(1, 2048), 1);
        assert_eq!(column_parts(5, 2048), 2);
        assert_eq!(column_parts(8192, 2048), 512);
        assert_eq!(column_parts(8192, 4096), 256);
        assert_eq!(column_parts(262_144, 128), 4096);
        assert_eq!(column_parts(9, 0), 3);
        assert_eq!(column_parts(9, 1 << 21), 1);
    }
}
