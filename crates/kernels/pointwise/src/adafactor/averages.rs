//! Averages of squared gradients.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{
    Launch, LaunchError, cube_reduce_bytes, cube_sum, fold_column, fold_parts,
    math::{exp, ln},
    unchecked, vector_sum,
};

use super::{Averages, Factored, Options, Step};
use crate::reduce::fold_strided;

/// What all averages of a step have in common.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Averaging {
    decay_rate: f32,
    eps: f32,
}

impl Options {
    fn averaging<R: Runtime>(&self) -> AveragingLaunch<R> {
        // A device may take a smaller one for zero, and divide by the root of an average that is zero.
        AveragingLaunch::new(self.decay_rate, self.eps.max(f32::MIN_POSITIVE))
    }
}

/// `1 - beta = t^decay_rate`
#[cube]
fn share_of(averaging: &Averaging, state: &Array<f32>) -> f32 {
    exp(averaging.decay_rate * ln(state[3]))
}

#[cube]
fn averaged(old: f32, new: f32, averaging: &Averaging, state: &Array<f32>) -> f32 {
    let share = share_of(averaging, state);
    (1.0 - share) * old + share * new
}

#[cube]
fn squared<N: Size>(grad: Vector<f32, N>, averaging: &Averaging, state: &Array<f32>) -> Vector<f32, N> {
    let g = grad * Vector::new(state[1]);
    g * g + Vector::new(averaging.eps)
}

/// Launches the update of the averages; of a matrix, also `roots_i = sqrt(row_i / mean(row))`.
pub(super) fn update<R: Runtime>(
    launch: &Launch<'_, R>,
    options: &Options,
    args: &Step<'_>,
) -> Result<(), LaunchError> {
    match &args.averages {
        Averages::Whole { v, len } => elements(launch, options, (args, v, *len)),
        Averages::Factored(factored) => {
            rows(launch, options, (args, factored))?;
            columns(launch, options, (args, factored))?;
            roots(launch, args, factored)
        }
    }
}

fn elements<R: Runtime>(
    launch: &Launch<'_, R>,
    options: &Options,
    (args, v, len): (&Step<'_>, &Handle, usize),
) -> Result<(), LaunchError> {
    let width = launch.vector_width::<f32>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(elements_kernel::launch_unchecked::<R>(
        launch.client(),
        grid.count,
        grid.dim,
        width,
        launch.vectors::<f32>("grad", args.grad, len, width)?,
        launch.vectors::<f32>("v", v, len, width)?,
        launch.array::<f32>("state", args.state, 4)?,
        options.averaging(),
        (len / width) as u32,
    ));
    Ok(())
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch_unchecked)]
fn elements_kernel<N: Size>(
    grad: &Array<Vector<f32, N>>,
    v: &mut Array<Vector<f32, N>>,
    state: &Array<f32>,
    averaging: &Averaging,
    items: u32,
) {
    if state[2] == 0.0 {
        let share = share_of(averaging, state);
        let mut i = ABSOLUTE_POS;
        while i < items as usize {
            v[i] = Vector::new(1.0 - share) * v[i] + Vector::new(share) * squared::<N>(grad[i], averaging, state);
            i += CUBE_COUNT * CUBE_DIM as usize;
        }
    }
}

fn rows<R: Runtime>(
    launch: &Launch<'_, R>,
    options: &Options,
    (args, factored): (&Step<'_>, &Factored<'_>),
) -> Result<(), LaunchError> {
    let [rows, columns] = factored.size;
    let width = launch.vector_width::<f32>(columns);
    let grid = launch.rows(rows, columns / width);
    launch.cube(grid.dim, cube_reduce_bytes(grid.units))?;
    unchecked!(rows_kernel::launch_unchecked::<R>(
        launch.client(),
        grid.count,
        grid.dim,
        width,
        launch.vectors::<f32>("grad", args.grad, rows * columns, width)?,
        launch.array::<f32>("row", factored.row, rows)?,
        launch.array::<f32>("state", args.state, 4)?,
        options.averaging(),
        rows as u32,
        (columns / width) as u32,
        grid.units,
    ));
    Ok(())
}

/// Grid: cube = row, units stride its vectors.
#[cube(launch_unchecked)]
fn rows_kernel<N: Size>(
    grad: &Array<Vector<f32, N>>,
    row: &mut Array<f32>,
    state: &Array<f32>,
    averaging: &Averaging,
    rows: u32,
    items: u32,
    #[comptime] units: usize,
) {
    let width = N::value();
    let (i, items) = (CUBE_POS, items as usize);
    if i < rows as usize && state[2] == 0.0 {
        let mut sum = Vector::<f32, N>::new(0.0);
        let mut j = UNIT_POS as usize;
        while j < items {
            sum += squared::<N>(grad[i * items + j], averaging, state);
            j += units;
        }
        let total = cube_sum(vector_sum::<N>(sum), units);
        if UNIT_POS == 0 {
            let columns = f32::cast_from(items as u32) * comptime!(width as f32);
            row[i] = averaged(row[i], total / columns, averaging, state);
        }
    }
}

fn columns<R: Runtime>(
    launch: &Launch<'_, R>,
    options: &Options,
    (args, factored): (&Step<'_>, &Factored<'_>),
) -> Result<(), LaunchError> {
    let [rows, columns] = factored.size;
    let width = launch.vector_width::<f32>(columns);
    let grid = launch.columns(rows, columns, width)?;
    let num_sums = grid.parts * columns;
    unchecked!(sum_columns_kernel::launch_unchecked::<R>(
        launch.client(),
        grid.count,
        grid.dim,
        width,
        launch.vectors::<f32>("grad", args.grad, rows * columns, width)?,
        launch.vectors::<f32>("sums", factored.sums, num_sums, width)?,
        launch.array::<f32>("state", args.state, 4)?,
        options.averaging(),
        rows as u32,
        (columns / width) as u32,
        grid.part_rows,
    ));
    let fold = launch.fold(grid.parts, columns, 1)?;
    unchecked!(average_columns_kernel::launch_unchecked::<R>(
        launch.client(),
        fold.count,
        fold.dim,
        launch.array::<f32>("sums", factored.sums, num_sums)?,
        launch.array::<f32>("col", factored.col, columns)?,
        launch.array::<f32>("state", args.state, 4)?,
        options.averaging(),
        grid.parts as u32,
        rows as u32,
        columns as u32,
    ));
    Ok(())
}

/// Grid: x = block of columns, y = block of rows; unit = vector of columns.
#[cube(launch_unchecked)]
fn sum_columns_kernel<N: Size>(
    grad: &Array<Vector<f32, N>>,
    sums: &mut Array<Vector<f32, N>>,
    state: &Array<f32>,
    averaging: &Averaging,
    rows: u32,
    items: u32,
    part_rows: u32,
) {
    let (j, part) = (ABSOLUTE_POS_X as usize, CUBE_POS_Y as usize);
    let (rows, items, part_rows) = (rows as usize, items as usize, part_rows as usize);
    if j < items && state[2] == 0.0 {
        let mut sum = Vector::<f32, N>::new(0.0);
        let mut i = part * part_rows;
        let end = min(i + part_rows, rows);
        while i < end {
            sum += squared::<N>(grad[i * items + j], averaging, state);
            i += 1;
        }
        sums[part * items + j] = sum;
    }
}

/// Grid: that of [`Launch::fold`].
#[cube(launch_unchecked)]
fn average_columns_kernel(
    sums: &Array<f32>,
    col: &mut Array<f32>,
    state: &Array<f32>,
    averaging: &Averaging,
    parts: u32,
    rows: u32,
    columns: u32,
) {
    let (j, columns) = (fold_column(), columns as usize);
    if state[2] == 0.0 {
        let total = fold_parts(sums, parts as usize, columns);
        if UNIT_POS_Y == 0 && j < columns {
            col[j] = averaged(col[j], total / f32::cast_from(rows), averaging, state);
        }
    }
}

fn roots<R: Runtime>(launch: &Launch<'_, R>, args: &Step<'_>, factored: &Factored<'_>) -> Result<(), LaunchError> {
    let [rows, _] = factored.size;
    let units = launch.units_for(rows);
    let dim = CubeDim::new_1d(units as u32);
    launch.cube(dim, cube_reduce_bytes(units))?;
    unchecked!(roots_kernel::launch_unchecked::<R>(
        launch.client(),
        launch.cubes(1, 1, 1)?,
        dim,
        launch.array::<f32>("row", factored.row, rows)?,
        launch.array::<f32>("roots", factored.roots, rows)?,
        launch.array::<f32>("state", args.state, 4)?,
        rows as u32,
        units,
    ));
    Ok(())
}

/// Grid: one cube.
#[cube(launch_unchecked)]
fn roots_kernel(row: &Array<f32>, roots: &mut Array<f32>, state: &Array<f32>, rows: u32, #[comptime] units: usize) {
    if state[2] == 0.0 {
        let mean = fold_strided(row, rows as usize, 1, 0, units) / f32::cast_from(rows);
        let mut i = UNIT_POS as usize;
        while i < rows as usize {
            roots[i] = f32::sqrt(row[i] / mean);
            i += units;
        }
    }
}
