//! A linear layer whose rows have trained lengths.                              Liu et al. 2024, arXiv:2402.09353
//! - `norm[j] = |W[j] + scale * (B A)[j]|`
//! - `y = magnitude / norm * t + bias`; `dt = magnitude / norm * dy`; `dmagnitude += sum_rows(dy * t) / norm`
//!
//! Work: norms, one cube for some rows of `W`, which share what is read of `A`; the others, one unit per vector.
//! Traffic: `W` is read once, `A` once for these rows (from cache but for the first), `t` and `dy` once by each kernel.
//! Numerics: sums are f32 for every element type, in fixed order, `W + scale * B A` exists in registers alone.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{
    ColumnSum, Launch, LaunchError, cube_reduce_bytes, cube_sum, fold_columns, unchecked, vector_sum,
};

/// Sizes of one adapted matrix, and the factor of its update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormShape {
    /// Columns of the matrix.
    pub in_features: usize,
    /// Rows of the matrix.
    pub out_features: usize,
    /// Inner dimension of the adapter.
    pub rank: usize,
    /// Factor of the update.
    pub scale: f32,
}

/// Buffers of [`norms`].
#[derive(Clone, Copy, Debug)]
pub struct Norms<'a> {
    /// `[out_features, in_features]` of `W`.
    pub weight: &'a Handle,
    /// f32 `[rank, in_features]`
    pub lora_a: &'a Handle,
    /// f32 `[out_features, rank]`
    pub lora_b: &'a Handle,
    /// f32 `[out_features]`, overwritten.
    pub norms: &'a Handle,
}

/// Rows of the matrix that a cube is given.
const ROWS: usize = 2;

/// Launches `norms[j] = |W[j] + scale * (B A)[j]|`.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn norms<R: Runtime, W: Float>(
    client: &ComputeClient<R>,
    shape: NormShape,
    args: Norms<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "dora_norms");
    launch.element::<W>()?;
    let NormShape { in_features, out_features, rank, scale } = shape;
    if out_features == 0 {
        return Ok(());
    }
    // Wider vectors of all rows would take half of the units' registers.
    let width = launch.vector_width::<f32>(in_features).min(2);
    let grid = launch.rows(out_features.div_ceil(ROWS), in_features / width);
    launch.cube(grid.dim, ROWS * cube_reduce_bytes(grid.units))?;
    unchecked!(norms_kernel::launch_unchecked::<W, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<W>("weight", args.weight, out_features * in_features, width)?,
        launch.vectors::<f32>("lora_a", args.lora_a, rank * in_features, width)?,
        launch.array::<f32>("lora_b", args.lora_b, out_features * rank)?,
        launch.array::<f32>("norms", args.norms, out_features)?,
        out_features as u32,
        (in_features / width) as u32,
        rank as u32,
        scale,
        grid.units,
    ));
    Ok(())
}

/// Grid: cube = block of rows, units stride the columns.
#[cube(launch_unchecked)]
fn norms_kernel<W: Float, N: Size>(
    weight: &Array<Vector<W, N>>,
    lora_a: &Array<Vector<f32, N>>,
    lora_b: &Array<f32>,
    norms: &mut Array<f32>,
    rows: u32,
    cols: u32,
    rank: u32,
    scale: f32,
    #[comptime] units: usize,
) {
    let (rows, cols, rank) = (rows as usize, cols as usize, rank as usize);
    let first = CUBE_POS * ROWS;
    if first < rows {
        let mut squares = Array::<Vector<f32, N>>::new(ROWS);
        let mut values = Array::<Vector<f32, N>>::new(ROWS);
        #[unroll]
        for row in 0..ROWS {
            squares[row] = Vector::new(0.0);
        }
        let mut i = UNIT_POS as usize;
        while i < cols {
            #[unroll]
            for row in 0..ROWS {
                // The last block repeats the last row in the place of those that are not there.
                values[row] = Vector::cast_from(weight[min(first + row, rows - 1) * cols + i]);
            }
            for k in 0..rank {
                let a = lora_a[k * cols + i];
                #[unroll]
                for row in 0..ROWS {
                    values[row] += Vector::new(scale * lora_b[min(first + row, rows - 1) * rank + k]) * a;
                }
            }
            #[unroll]
            for row in 0..ROWS {
                squares[row] += values[row] * values[row];
            }
            i += units;
        }
        #[unroll]
        for row in 0..ROWS {
            let total = cube_sum(vector_sum::<N>(squares[row]), units);
            if UNIT_POS == 0 && first + row < rows {
                norms[first + row] = f32::sqrt(total);
            }
        }
    }
}

/// Sizes of one scaling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of `t` and `y`.
    pub rows: usize,
    /// Columns of `t` and `y`.
    pub out_features: usize,
}

/// What the rows of a matrix, columns here, are to have as length, and what they have.
#[derive(Clone, Copy, Debug)]
pub struct Lengths<'a> {
    /// f32 `[out_features]`
    pub magnitude: &'a Handle,
    /// f32 `[out_features]`, as [`norms`] leaves it.
    pub norms: &'a Handle,
}

/// Buffers of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[rows, out_features]` of `E`.
    pub t: &'a Handle,
    /// Of the rows of the adapted matrix.
    pub lengths: Lengths<'a>,
    /// `[out_features]` of `B`.
    pub bias: Option<&'a Handle>,
    /// `[rows, out_features]` of `E`, overwritten.
    pub y: &'a Handle,
}

/// Launches `y = magnitude / norm * t + bias`. Without a bias `B` is of no consequence.
///
/// # Errors
/// As [`norms`].
pub fn forward<R: Runtime, E: Float, B: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "dora_forward");
    launch.element::<E>()?;
    let Shape { rows, out_features } = shape;
    let len = rows * out_features;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(out_features);
    let bias = |bias| {
        launch.element::<B>()?;
        launch.vectors::<B>("bias", bias, out_features, width)
    };
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(forward_kernel::launch_unchecked::<E, B, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("t", args.t, len, width)?,
        launch.vectors::<f32>("magnitude", args.lengths.magnitude, out_features, width)?,
        launch.vectors::<f32>("norms", args.lengths.norms, out_features, width)?,
        args.bias.map(bias).transpose()?.into(),
        launch.vectors::<E>("y", args.y, len, width)?,
        (len / width) as u32,
        (out_features / width) as u32,
    ));
    Ok(())
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch_unchecked)]
fn forward_kernel<E: Float, B: Float, N: Size>(
    t: &Array<Vector<E, N>>,
    magnitude: &Array<Vector<f32, N>>,
    norms: &Array<Vector<f32, N>>,
    bias: &ComptimeOption<Array<Vector<B, N>>>,
    y: &mut Array<Vector<E, N>>,
    items: u32,
    cols: u32,
) {
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        let column = i % cols as usize;
        let scaled = magnitude[column] / norms[column] * Vector::<f32, N>::cast_from(t[i]);
        #[comptime]
        let shifted = match bias {
            ComptimeOption::Some(bias) => scaled + Vector::<f32, N>::cast_from(bias[column]),
            ComptimeOption::None => scaled,
        };
        y[i] = Vector::cast_from(shifted);
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
}

/// Launches `dt = magnitude / norm * dy` over `dy`, `[rows, out_features]` of `E`. Call [`magnitude_gradient`] before, if it is
/// wanted: it reads `dy`.
///
/// # Errors
/// As [`norms`].
pub fn backward<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    dy: &Handle,
    lengths: Lengths<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "dora_backward");
    launch.element::<E>()?;
    let Shape { rows, out_features } = shape;
    let len = rows * out_features;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(out_features);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(backward_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("dy", dy, len, width)?,
        launch.vectors::<f32>("magnitude", lengths.magnitude, out_features, width)?,
        launch.vectors::<f32>("norms", lengths.norms, out_features, width)?,
        (len / width) as u32,
        (out_features / width) as u32,
    ));
    Ok(())
}

/// Grid as [`forward_kernel`].
#[cube(launch_unchecked)]
fn backward_kernel<E: Float, N: Size>(
    dy: &mut Array<Vector<E, N>>,
    magnitude: &Array<Vector<f32, N>>,
    norms: &Array<Vector<f32, N>>,
    items: u32,
    cols: u32,
) {
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        let column = i % cols as usize;
        let scaled = magnitude[column] / norms[column] * Vector::<f32, N>::cast_from(dy[i]);
        dy[i] = Vector::cast_from(scaled);
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
}

/// Buffers of [`magnitude_gradient`].
#[derive(Clone, Copy, Debug)]
pub struct MagnitudeGradient<'a> {
    /// `[rows, out_features]` of `E`.
    pub dy: &'a Handle,
    /// `[rows, out_features]` of `E`.
    pub t: &'a Handle,
    /// f32 `[out_features]`, as [`norms`] leaves it.
    pub norms: &'a Handle,
    /// f32 `[column_parts(rows, out_features), out_features]` by [`crate::column_parts`], overwritten.
    pub workspace: &'a Handle,
    /// f32 `[out_features]`, added to.
    pub dmagnitude: &'a Handle,
}

/// Launches `dmagnitude += sum_rows(dy * t) / norm`, in two steps of fixed order.
///
/// # Errors
/// As [`norms`].
pub fn magnitude_gradient<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: MagnitudeGradient<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "dora_magnitude_gradient");
    launch.element::<E>()?;
    let Shape { rows, out_features } = shape;
    if rows == 0 || out_features == 0 {
        return Ok(());
    }
    let grid = launch.columns(rows, out_features, 1)?;
    unchecked!(magnitude_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        launch.array::<E>("dy", args.dy, rows * out_features)?,
        launch.array::<E>("t", args.t, rows * out_features)?,
        launch.array::<f32>("norms", args.norms, out_features)?,
        launch.array::<f32>("workspace", args.workspace, grid.parts * out_features)?,
        rows as u32,
        out_features as u32,
        grid.part_rows,
    ));
    let sum = ColumnSum { partial: args.workspace, arg: "dmagnitude", total: args.dmagnitude };
    fold_columns(&launch, (grid.parts, out_features), &[sum])
}

/// Grid: x = block of columns, y = block of rows; unit = column.
#[cube(launch_unchecked)]
fn magnitude_kernel<E: Float>(
    dy: &Array<E>,
    t: &Array<E>,
    norms: &Array<f32>,
    partial: &mut Array<f32>,
    rows: u32,
    cols: u32,
    part_rows: u32,
) {
    let (column, cols) = (ABSOLUTE_POS_X as usize, cols as usize);
    let part = CUBE_POS_Y;
    if column < cols {
        let mut total = 0.0f32;
        for row in part * part_rows..min((part + 1) * part_rows, rows) {
            let at = row as usize * cols + column;
            total += f32::cast_from(dy[at]) * f32::cast_from(t[at]);
        }
        partial[part as usize * cols + column] = total / norms[column];
    }
}
