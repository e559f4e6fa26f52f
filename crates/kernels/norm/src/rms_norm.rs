//! Fused RMSNorm, optionally with a residual add.                               Zhang & Sennrich 2019, arXiv:1910.07467
//!
//! `sum = x + residual` (or `x`), `rstd = 1 / sqrt(mean(sum^2) + eps)`, `out = sum * rstd * (weight + offset)`.
//!
//! Work: one cube per row. Traffic: the row is read twice (the second time from cache), `out` is written once.
//! Numerics: sums are f32 for every element type. `dweight` is a fixed-order sum over blocks of rows, no float atomics, so it
//! has the same bits on every run.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, column_parts, cube_reduce_bytes, cube_sum, fold_columns, vector_sum};

/// Sizes and constants of one normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub hidden_size: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// Added to every weight: 0, or 1 for Gemma.
    pub weight_offset: f32,
}

/// Buffers of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[rows, hidden_size]` of `E`.
    pub x: &'a Handle,
    /// `[hidden_size]` of `W`.
    pub weight: &'a Handle,
    /// `[rows, hidden_size]` of `E`, overwritten.
    pub out: &'a Handle,
    /// `[rows]` f32, overwritten.
    pub rstd: &'a Handle,
}

/// Launches `out, rstd = rms_norm(x, weight)`.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn forward<R: Runtime, E: Float, W: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "rms_norm_forward");
    launch.element::<E>()?;
    launch.element::<W>()?;
    if shape.rows == 0 || shape.hidden_size == 0 {
        return Ok(());
    }
    let (len, width) = (shape.rows * shape.hidden_size, launch.vector_width::<f32>(shape.hidden_size));
    let grid = launch.rows(shape.rows, shape.hidden_size / width);
    launch.cube(grid.dim, cube_reduce_bytes(grid.units))?;
    forward_kernel::launch::<E, W, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("x", args.x, len, width)?,
        launch.vectors::<W>("weight", args.weight, shape.hidden_size, width)?,
        launch.vectors::<E>("out", args.out, len, width)?,
        launch.array::<f32>("rstd", args.rstd, shape.rows)?,
        shape.rows as u32,
        (shape.hidden_size / width) as u32,
        shape.eps,
        shape.weight_offset,
        grid.units,
    );
    Ok(())
}

/// Buffers of the forward pass with a residual.
#[derive(Clone, Copy, Debug)]
pub struct AddForward<'a> {
    /// `[rows, hidden_size]` of `E`: `x` on entry, `x + residual` on return.
    pub x: &'a Handle,
    /// `[rows, hidden_size]` of `E`.
    pub residual: &'a Handle,
    /// `[hidden_size]` of `W`.
    pub weight: &'a Handle,
    /// `[rows, hidden_size]` of `E`, overwritten.
    pub out: &'a Handle,
    /// `[rows]` f32, overwritten.
    pub rstd: &'a Handle,
}

/// Launches `x += residual`, `out, rstd = rms_norm(x, weight)`. The sum is rounded to `E` before it is normalised.
///
/// # Errors
/// As [`forward`].
pub fn add_forward<R: Runtime, E: Float, W: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: AddForward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "rms_norm_add_forward");
    launch.element::<E>()?;
    launch.element::<W>()?;
    if shape.rows == 0 || shape.hidden_size == 0 {
        return Ok(());
    }
    let (len, width) = (shape.rows * shape.hidden_size, launch.vector_width::<f32>(shape.hidden_size));
    let grid = launch.rows(shape.rows, shape.hidden_size / width);
    launch.cube(grid.dim, cube_reduce_bytes(grid.units))?;
    add_forward_kernel::launch::<E, W, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("x", args.x, len, width)?,
        launch.vectors::<E>("residual", args.residual, len, width)?,
        launch.vectors::<W>("weight", args.weight, shape.hidden_size, width)?,
        launch.vectors::<E>("out", args.out, len, width)?,
        launch.array::<f32>("rstd", args.rstd, shape.rows)?,
        shape.rows as u32,
        (shape.hidden_size / width) as u32,
        shape.eps,
        shape.weight_offset,
        grid.units,
    );
    Ok(())
}

/// Writes `out` and `rstd` of one row whose square sum this unit has a part of.
#[cube]
fn write_row<E: Float, W: Float, N: Size>(
    x: &Slice<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    out: &mut Array<Vector<E, N>>,
    rstd: &mut Array<f32>,
    squares: Vector<f32, N>,
    row: usize,
    cols: usize,
    eps: f32,
    weight_offset: f32,
    #[comptime] units: usize,
) {
    let width = N::value();
    let sum = cube_sum(vector_sum::<N>(squares), units);
    let hidden = f32::cast_from(cols as u32) * comptime!(width as f32);
    let r = f32::inverse_sqrt(sum / hidden + eps);
    let mut i = UNIT_POS as usize;
    while i < cols {
        let w = Vector::<f32, N>::cast_from(weight[i]) + Vector::new(weight_offset);
        let normed = Vector::<f32, N>::cast_from(x[row * cols + i]) * Vector::new(r);
        out[row * cols + i] = Vector::cast_from(normed * w);
        i += units;
    }
    if UNIT_POS == 0 {
        rstd[row] = r;
    }
}

/// Grid: cube = row, units stride the columns.
#[cube(launch)]
fn forward_kernel<E: Float, W: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    out: &mut Array<Vector<E, N>>,
    rstd: &mut Array<f32>,
    rows: u32,
    cols: u32,
    eps: f32,
    weight_offset: f32,
    #[comptime] units: usize,
) {
    let cols = cols as usize;
    let row = CUBE_POS;
    if row < rows as usize {
        let mut squares = Vector::<f32, N>::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < cols {
            let value = Vector::<f32, N>::cast_from(x[row * cols + i]);
            squares += value * value;
            i += units;
        }
        write_row::<E, W, N>(&x.to_slice(), weight, out, rstd, squares, row, cols, eps, weight_offset, units);
    }
}

/// Grid as [`forward_kernel`]. Each unit reads back only what it wrote itself.
#[cube(launch)]
fn add_forward_kernel<E: Float, W: Float, N: Size>(
    x: &mut Array<Vector<E, N>>,
    residual: &Array<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    out: &mut Array<Vector<E, N>>,
    rstd: &mut Array<f32>,
    rows: u32,
    cols: u32,
    eps: f32,
    weight_offset: f32,
    #[comptime] units: usize,
) {
    let cols = cols as usize;
    let row = CUBE_POS;
    if row < rows as usize {
        let mut squares = Vector::<f32, N>::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < cols {
            let at = row * cols + i;
            let sum = Vector::<f32, N>::cast_from(x[at]) + Vector::<f32, N>::cast_from(residual[at]);
            x[at] = Vector::cast_from(sum);
            let rounded = Vector::<f32, N>::cast_from(x[at]);
            squares += rounded * rounded;
            i += units;
        }
        write_row::<E, W, N>(&x.to_slice(), weight, out, rstd, squares, row, cols, eps, weight_offset, units);
    }
}

/// Buffers of the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// `[rows, hidden_size]` of `E`: the gradient of `out` on entry, `dx` on return.
    pub dout: &'a Handle,
    /// `[rows, hidden_size]` of `E`: a gradient that reaches the sum by other ways; added to `dx`.
    pub dsum: Option<&'a Handle>,
    /// `[rows, hidden_size]` of `E`: what was normalised.
    pub sum: &'a Handle,
    /// `[hidden_size]` of `W`.
    pub weight: &'a Handle,
    /// `[rows]` f32, from the forward pass.
    pub rstd: &'a Handle,
}

/// Launches `dx = rstd * (g - xhat * mean(g * xhat)) + dsum`, where `g = dout * (weight + offset)` and `xhat = sum * rstd`,
/// written over `dout`. Call [`weight_gradient`] before, if it is wanted: it reads `dout`.
///
/// # Errors
/// As [`forward`].
pub fn backward<R: Runtime, E: Float, W: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Backward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "rms_norm_backward");
    launch.element::<E>()?;
    launch.element::<W>()?;
    if shape.rows == 0 || shape.hidden_size == 0 {
        return Ok(());
    }
    let (len, width) = (shape.rows * shape.hidden_size, launch.vector_width::<f32>(shape.hidden_size));
    let grid = launch.rows(shape.rows, shape.hidden_size / width);
    launch.cube(grid.dim, cube_reduce_bytes(grid.units))?;
    backward_kernel::launch::<E, W, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("dout", args.dout, len, width)?,
        // Without a second gradient the kernel never reads this argument.
        launch.vectors::<E>("dsum", args.dsum.unwrap_or(args.sum), len, width)?,
        launch.vectors::<E>("sum", args.sum, len, width)?,
        launch.vectors::<W>("weight", args.weight, shape.hidden_size, width)?,
        launch.array::<f32>("rstd", args.rstd, shape.rows)?,
        shape.rows as u32,
        (shape.hidden_size / width) as u32,
        shape.weight_offset,
        args.dsum.is_some(),
        grid.units,
    );
    Ok(())
}

/// Grid as [`forward_kernel`]. Each unit overwrites only what it alone reads.
#[cube(launch)]
fn backward_kernel<E: Float, W: Float, N: Size>(
    dout: &mut Array<Vector<E, N>>,
    dsum: &Array<Vector<E, N>>,
    sum: &Array<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    rstd: &Array<f32>,
    rows: u32,
    cols: u32,
    weight_offset: f32,
    #[comptime] has_dsum: bool,
    #[comptime] units: usize,
) {
    let width = N::value();
    let cols = cols as usize;
    let row = CUBE_POS;
    if row < rows as usize {
        let r = rstd[row];
        let mut products = Vector::<f32, N>::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < cols {
            let at = row * cols + i;
            let w = Vector::<f32, N>::cast_from(weight[i]) + Vector::new(weight_offset);
            let g = Vector::<f32, N>::cast_from(dout[at]) * w;
            products += g * Vector::<f32, N>::cast_from(sum[at]) * Vector::new(r);
            i += units;
        }
        let total = cube_sum(vector_sum::<N>(products), units);
        let mean = total / (f32::cast_from(cols as u32) * comptime!(width as f32));
        let mut i = UNIT_POS as usize;
        while i < cols {
            let at = row * cols + i;
            let w = Vector::<f32, N>::cast_from(weight[i]) + Vector::new(weight_offset);
            let g = Vector::<f32, N>::cast_from(dout[at]) * w;
            let xhat = Vector::<f32, N>::cast_from(sum[at]) * Vector::new(r);
            let mut dx = (g - xhat * Vector::new(mean)) * Vector::new(r);
            if comptime!(has_dsum) {
                dx += Vector::<f32, N>::cast_from(dsum[at]);
            }
            dout[at] = Vector::cast_from(dx);
            i += units;
        }
    }
}

/// Buffers of the weight gradient.
#[derive(Clone, Copy, Debug)]
pub struct WeightGradient<'a> {
    /// `[rows, hidden_size]` of `E`.
    pub dout: &'a Handle,
    /// `[rows, hidden_size]` of `E`.
    pub sum: &'a Handle,
    /// `[rows]` f32.
    pub rstd: &'a Handle,
    /// f32 `[unsloth_common::column_parts(rows), hidden_size]`, overwritten.
    pub workspace: &'a Handle,
    /// `[hidden_size]` f32, added to.
    pub dweight: &'a Handle,
}

/// Launches `dweight += sum_rows(dout * sum * rstd)`, in two steps of fixed order.
///
/// # Errors
/// As [`forward`].
pub fn weight_gradient<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: WeightGradient<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "rms_norm_weight_gradient");
    launch.element::<E>()?;
    if shape.rows == 0 || shape.hidden_size == 0 {
        return Ok(());
    }
    let (len, parts) = (shape.rows * shape.hidden_size, column_parts(shape.rows));
    let grid = launch.columns(shape.rows, shape.hidden_size)?;
    partial_kernel::launch::<E, R>(
        client,
        grid.count,
        grid.dim,
        launch.array::<E>("dout", args.dout, len)?,
        launch.array::<E>("sum", args.sum, len)?,
        launch.array::<f32>("rstd", args.rstd, shape.rows)?,
        launch.array::<f32>("workspace", args.workspace, parts * shape.hidden_size)?,
        shape.rows as u32,
        shape.hidden_size as u32,
        grid.part_rows,
    );
    fold_columns(&launch, (shape.rows, shape.hidden_size), args.workspace, ("dweight", args.dweight))
}

/// Grid: x = block of columns, y = block of rows; unit = column.
#[cube(launch)]
fn partial_kernel<E: Float>(
    dout: &Array<E>,
    sum: &Array<E>,
    rstd: &Array<f32>,
    partial: &mut Array<f32>,
    rows: u32,
    cols: u32,
    part_rows: u32,
) {
    let column = ABSOLUTE_POS_X as usize;
    let (rows, cols, part_rows) = (rows as usize, cols as usize, part_rows as usize);
    let part = CUBE_POS_Y as usize;
    if column < cols {
        let mut total = 0.0f32;
        let mut row = part * part_rows;
        let end = min(row + part_rows, rows);
        while row < end {
            let at = row * cols + column;
            total += f32::cast_from(dout[at]) * f32::cast_from(sum[at]) * rstd[row];
            row += 1;
        }
        partial[part * cols + column] = total;
    }
}
