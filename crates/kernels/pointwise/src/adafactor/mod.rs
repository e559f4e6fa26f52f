//! Adafactor: of a matrix, averages of rows and of columns; of anything else, one of each element.
//!                                                                   Shazeer & Stern 2018, arXiv:1804.04235
//!
//! With `g = grad * gradient_scale`, `t` completed steps, this one included, and `beta = 1 - t^decay_rate`:
//! - of a matrix: `row_i = beta * row_i + (1 - beta) * mean_j(g_ij^2 + eps)`, `col_j` likewise over `i`, and
//!   `u_ij = g_ij / sqrt(row_i / mean(row)) / sqrt(col_j)`
//! - of anything else: `v = beta * v + (1 - beta) * (g^2 + eps)`, and `u = g / sqrt(v)`
//! - `param = param * (1 - lr * weight_decay) - alpha * u / max(1, rms(u) / clip_threshold)`
//!
//! where `alpha` is `lr` or `lr * max(parameter_scale, rms(param))`.
//!
//! Traffic: of a matrix the gradient is read four times, for its rows, its columns, the size of the change and the change, of anything
//! else three times; the parameter is read and written once, and read once more where the rate is relative to it. A change is computed
//! twice rather than kept. Sums have a fixed order: no atomics. The gradient scale, the skip flag and `t` come from the step's
//! state, as [`crate::adamw::control`] leaves it.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, column_parts, cube_reduce_bytes, cube_sum, unchecked, vector_sum};

use crate::reduce::{fold_strided, parts};

mod averages;

/// Hyper-parameters of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Learning rate.
    pub learning_rate: f32,
    /// Power of the number of steps that a new square counts with, below 0.
    pub decay_rate: f32,
    /// Added to the square of a gradient, positive.
    pub eps: f32,
    /// Root mean square that a change is scaled down to, positive.
    pub clip_threshold: f32,
    /// Whether the rate is relative to the root mean square of the parameter, and the least that this counts as.
    pub parameter_scale: Option<f32>,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// Averages of squared gradients, updated.
#[derive(Clone, Copy, Debug)]
pub enum Averages<'a> {
    /// Of a matrix `[rows, columns]`.
    Factored(Factored<'a>),
    /// Of each element.
    Whole {
        /// f32 `[len]`
        v: &'a Handle,
        /// Number of elements.
        len: usize,
    },
}

impl Averages<'_> {
    fn len(&self) -> usize {
        match self {
            Averages::Factored(factored) => factored.size[0] * factored.size[1],
            Averages::Whole { len, .. } => *len,
        }
    }
}

/// Averages of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct Factored<'a> {
    /// Rows and columns.
    pub size: [usize; 2],
    /// f32 `[rows]`, updated.
    pub row: &'a Handle,
    /// f32 `[columns]`, updated.
    pub col: &'a Handle,
    /// f32 `[column_sums(size)]`, overwritten.
    pub sums: &'a Handle,
    /// f32 `[rows]`, overwritten.
    pub roots: &'a Handle,
}

/// Buffers of one parameter and of the step.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// `E`, updated.
    pub param: &'a Handle,
    /// f32 of as many elements.
    pub grad: &'a Handle,
    /// What is kept of earlier gradients.
    pub averages: Averages<'a>,
    /// f32 `[workspace_len(len)]`, overwritten.
    pub workspace: &'a Handle,
    /// f32 `[4]`
    pub state: &'a Handle,
}

/// Elements of [`Factored::sums`]: what is summed of each column in parts of the rows.
pub fn column_sums([rows, columns]: [usize; 2]) -> usize {
    column_parts(rows, columns) * columns
}

/// Elements of the workspace of a parameter of `len` elements: two sums of each part, and the size of the change.
pub fn workspace_len(len: usize) -> usize {
    2 * parts(len) + 1
}

/// Launches one step of one parameter; nothing changes if the state says to skip.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn step<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    options: &Options,
    args: Step<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "adafactor");
    launch.element::<E>()?;
    if args.averages.len() == 0 {
        return Ok(());
    }
    averages::update(&launch, options, &args)?;
    size::<R, E>(&launch, options, &args)?;
    apply::<R, E>(&launch, options, &args)
}

/// Averages as those of columns beside the roots of rows, if there are any; the number of columns; and the width of vectors.
struct Divisors<R: Runtime> {
    roots: Option<ArrayArg<R>>,
    col: ArrayArg<R>,
    columns: usize,
    width: usize,
}

impl<R: Runtime> Divisors<R> {
    fn new(launch: &Launch<'_, R>, averages: &Averages<'_>) -> Result<Self, LaunchError> {
        let (roots, (arg, col, columns)) = match averages {
            Averages::Factored(Factored { size: [rows, columns], col, roots, .. }) => {
                (Some(launch.array::<f32>("roots", roots, *rows)?), ("col", *col, *columns))
            }
            Averages::Whole { v, len } => (None, ("v", *v, *len)),
        };
        let width = launch.vector_width::<f32>(columns);
        Ok(Self { roots, col: launch.vectors::<f32>(arg, col, columns, width)?, columns, width })
    }
}

/// A change before it is scaled, of vector `i`; a row has `items`. Each root by itself: the product of two small averages would be below
/// the normal numbers.
#[cube]
fn change<N: Size>(
    g: Vector<f32, N>,
    roots: &ComptimeOption<Array<f32>>,
    col: &Array<Vector<f32, N>>,
    i: usize,
    items: usize,
) -> Vector<f32, N> {
    #[comptime]
    let of_row = match roots {
        ComptimeOption::Some(roots) => g / Vector::new(roots[i / items]),
        ComptimeOption::None => g,
    };
    of_row / Vector::<f32, N>::sqrt(col[i % items])
}

/// Leaves `alpha / max(1, rms(u) / clip_threshold)` behind the sums in the workspace.
fn size<R: Runtime, E: Float>(launch: &Launch<'_, R>, options: &Options, args: &Step<'_>) -> Result<(), LaunchError> {
    let (client, len) = (launch.client(), args.averages.len());
    let Divisors { roots, col, columns, width } = Divisors::new(launch, &args.averages)?;
    let (num_parts, units) = (parts(len), launch.units_for(len / width));
    let dim = CubeDim::new_1d(units as u32);
    launch.cube(dim, 2 * cube_reduce_bytes(units))?;
    let param = options.parameter_scale.map(|_| launch.vectors::<E>("param", args.param, len, width)).transpose()?;
    let workspace = || launch.array::<f32>("workspace", args.workspace, workspace_len(len));
    let state = || launch.array::<f32>("state", args.state, 4);
    unchecked!(sum_squares_kernel::launch_unchecked::<E, R>(
        client,
        launch.cubes(num_parts, 1, 1)?,
        dim,
        width,
        launch.vectors::<f32>("grad", args.grad, len, width)?,
        roots.into(),
        col,
        param.into(),
        workspace()?,
        state()?,
        (len / width) as u32,
        (columns / width) as u32,
        units,
    ));
    let units = launch.units_for(num_parts);
    let dim = CubeDim::new_1d(units as u32);
    launch.cube(dim, 2 * cube_reduce_bytes(units))?;
    unchecked!(size_kernel::launch_unchecked::<R>(
        client,
        launch.cubes(1, 1, 1)?,
        dim,
        workspace()?,
        state()?,
        num_parts as u32,
        len as u32,
        options.learning_rate,
        options.clip_threshold,
        options.parameter_scale.unwrap_or_default(),
        options.parameter_scale.is_some(),
        units,
    ));
    Ok(())
}

/// Grid: units stride over vectors; cube = part. Its sums: of the squares of changes, and of the parameter's.
#[cube(launch_unchecked)]
fn sum_squares_kernel<E: Float, N: Size>(
    grad: &Array<Vector<f32, N>>,
    roots: &ComptimeOption<Array<f32>>,
    col: &Array<Vector<f32, N>>,
    param: &ComptimeOption<Array<Vector<E, N>>>,
    workspace: &mut Array<f32>,
    state: &Array<f32>,
    items: u32,
    columns: u32,
    #[comptime] units: usize,
) {
    if state[2] == 0.0 {
        let scale = state[1];
        let mut changes = Vector::<f32, N>::new(0.0);
        let mut parameters = Vector::<f32, N>::new(0.0);
        let mut i = ABSOLUTE_POS;
        while i < items as usize {
            let u = change::<N>(grad[i] * Vector::new(scale), roots, col, i, columns as usize);
            changes += u * u;
            #[comptime]
            let before = match param {
                ComptimeOption::Some(param) => Vector::<f32, N>::cast_from(param[i]),
                ComptimeOption::None => Vector::<f32, N>::new(0.0),
            };
            parameters += before * before;
            i += CUBE_COUNT * units;
        }
        let changes = cube_sum(vector_sum::<N>(changes), units);
        let parameters = cube_sum(vector_sum::<N>(parameters), units);
        if UNIT_POS == 0 {
            workspace[2 * CUBE_POS] = changes;
            workspace[2 * CUBE_POS + 1] = parameters;
        }
    }
}

/// Grid: one cube.
#[cube(launch_unchecked)]
fn size_kernel(
    workspace: &mut Array<f32>,
    state: &Array<f32>,
    parts: u32,
    len: u32,
    learning_rate: f32,
    clip_threshold: f32,
    parameter_scale: f32,
    #[comptime] is_relative: bool,
    #[comptime] units: usize,
) {
    if state[2] == 0.0 {
        let end = 2 * parts as usize;
        let changes = fold_strided(workspace, end, 2, 0, units);
        let parameters = fold_strided(workspace, end, 2, 1, units);
        if UNIT_POS == 0 {
            let len = f32::cast_from(len);
            let mut alpha = learning_rate;
            if comptime!(is_relative) {
                alpha *= max(f32::sqrt(parameters / len), parameter_scale);
            }
            workspace[end] = alpha / max(f32::sqrt(changes / len) / clip_threshold, 1.0);
        }
    }
}

fn apply<R: Runtime, E: Float>(launch: &Launch<'_, R>, options: &Options, args: &Step<'_>) -> Result<(), LaunchError> {
    let len = args.averages.len();
    let Divisors { roots, col, columns, width } = Divisors::new(launch, &args.averages)?;
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    let kept = 1.0 - f64::from(options.learning_rate) * f64::from(options.weight_decay);
    unchecked!(apply_kernel::launch_unchecked::<E, R>(
        launch.client(),
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("param", args.param, len, width)?,
        launch.vectors::<f32>("grad", args.grad, len, width)?,
        roots.into(),
        col,
        launch.array::<f32>("workspace", args.workspace, workspace_len(len))?,
        launch.array::<f32>("state", args.state, 4)?,
        kept as f32,
        parts(len) as u32,
        (len / width) as u32,
        (columns / width) as u32,
    ));
    Ok(())
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch_unchecked)]
fn apply_kernel<E: Float, N: Size>(
    param: &mut Array<Vector<E, N>>,
    grad: &Array<Vector<f32, N>>,
    roots: &ComptimeOption<Array<f32>>,
    col: &Array<Vector<f32, N>>,
    workspace: &Array<f32>,
    state: &Array<f32>,
    kept: f32,
    parts: u32,
    items: u32,
    columns: u32,
) {
    if state[2] == 0.0 {
        let scale = state[1];
        let size = workspace[2 * parts as usize];
        let mut i = ABSOLUTE_POS;
        while i < items as usize {
            let u = change::<N>(grad[i] * Vector::new(scale), roots, col, i, columns as usize);
            let before = Vector::<f32, N>::cast_from(param[i]);
            param[i] = Vector::cast_from(before * Vector::new(kept) - Vector::new(size) * u);
            i += CUBE_COUNT * CUBE_DIM as usize;
        }
    }
}
