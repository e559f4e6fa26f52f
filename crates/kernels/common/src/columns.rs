//! Sums over the rows of a matrix, one for each column, in two steps of fixed order: a kernel of its own sums blocks of rows, then
//! [`fold_columns`] adds up the blocks. No float atomics, so the same bits on every run.

#![allow(missing_docs, reason = "the cube macro writes modules and functions without documentation")]

use crate::unchecked;
use cubecl::{prelude::*, server::Handle};

use crate::{Launch, LaunchError};

/// Blocks of rows, at most.
const MAX_PARTS: usize = 128;
/// Rows of a block, at least.
const MIN_PART_ROWS: usize = 16;
/// Units of a cube, at most: small cubes are spread over a device more evenly.
const UNITS: usize = 64;
/// Partial sums that a unit reads before it adds them, so that it waits for memory less often.
const LOADS: usize = 16;

/// Blocks that this many rows are summed in: the partial sums are f32 `[parts, columns]`.
pub fn column_parts(rows: usize) -> usize {
    rows.div_ceil(MIN_PART_ROWS).clamp(1, MAX_PARTS)
}

/// Geometry of the first step. The column is `ABSOLUTE_POS_X`, the block `CUBE_POS_Y`.
#[derive(Clone, Debug)]
pub struct ColumnGrid {
    /// Number of cubes.
    pub count: CubeCount,
    /// Units of a cube in one dimension.
    pub dim: CubeDim,
    /// Rows of a block; the last one may have fewer.
    pub part_rows: u32,
}

impl<R: Runtime> Launch<'_, R> {
    /// Units that each sum one column of one block of rows.
    ///
    /// # Errors
    /// [`LaunchError::Limit`] if the grid exceeds the device's.
    pub fn columns(&self, rows: usize, columns: usize) -> Result<ColumnGrid, LaunchError> {
        let (parts, units) = (column_parts(rows), self.units_for(columns.min(UNITS)));
        let dim = CubeDim::new_1d(units as u32);
        self.cube(dim, 0)?;
        let count = self.cubes(columns.div_ceil(units), parts, 1)?;
        Ok(ColumnGrid { count, dim, part_rows: rows.div_ceil(parts) as u32 })
    }
}

/// Launches the second step: `out += sum_parts(partial)`; `partial`: f32 `[column_parts(rows), columns]`, `out`: f32 `[columns]`, called
/// `arg` in errors.
///
/// # Errors
/// [`LaunchError`] for a buffer that is too small, or a limit exceeded.
pub fn fold_columns<R: Runtime>(
    launch: &Launch<'_, R>,
    (rows, columns): (usize, usize),
    partial: &Handle,
    (arg, out): (&'static str, &Handle),
) -> Result<(), LaunchError> {
    let (parts, units) = (column_parts(rows), launch.units_for(columns.min(UNITS)));
    unchecked!(fold_columns_kernel::launch_unchecked::<R>(
        launch.client(),
        launch.cubes(columns.div_ceil(units), 1, 1)?,
        CubeDim::new_1d(units as u32),
        launch.array::<f32>("workspace", partial, parts * columns)?,
        launch.array::<f32>(arg, out, columns)?,
        parts as u32,
        columns as u32,
    ));
    Ok(())
}

/// Grid: unit = column.
#[cube(launch_unchecked)]
fn fold_columns_kernel(partial: &Array<f32>, out: &mut Array<f32>, parts: u32, columns: u32) {
    let column = ABSOLUTE_POS_X as usize;
    let (parts, columns) = (parts as usize, columns as usize);
    if column < columns {
        let mut total = 0.0f32;
        let mut first = 0usize;
        while first < parts {
            let mut values = Array::<f32>::new(LOADS);
            #[unroll]
            for i in 0..LOADS {
                let part = min(first + i, parts - 1);
                values[i] = partial[part * columns + column];
            }
            #[unroll]
            for i in 0..LOADS {
                total += select(first + i < parts, values[i], 0.0);
            }
            first += LOADS;
        }
        out[column] += total;
    }
}
