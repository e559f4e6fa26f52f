//! Linear layer with a low-rank update.                                         Hu et al. 2021, arXiv:2106.09685
//! - `y = x W^T + bias + scale * (x A^T) B^T`, where `A` is `[rank, in_features]` and `B` `[out_features, rank]`
//! - with `h = x A^T` and `dh = scale * dy B`: `dx = dy W + dh A`; `dA += dh^T x`; `dB += scale * dy^T h`
//! - with dropout, `drop(x)` takes the place of `x` in `h` and in `dA`, and `drop(dh A)` that of `dh A` in `dx`
//!
//! Work: the products of [`crate::product`], smallest first; `W + scale * B A` is never formed. `h` and `dh` are f32, so that nothing is
//! rounded between two products. `y` and `dx` start as the base layer, to which the update is added (the other way round where dropout
//! is to leave of the update what it does): in place in f32, else in a workspace of some rows at a time, which is then rounded, once.
//! What dropout leaves of `x` passes through the same workspace.

use std::ops::Range;

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, Target};

use crate::{
    dropout::{self, RowDropout},
    linear,
    product::{Args, Form, Matrix, Size, product},
    sums::{Sums, from_row, is_narrow},
};

/// f32 elements of a workspace, where [`ROWS`] rows are not more: 32 MiB, which stay in the cache of a large device.
const CHUNK: usize = 8 << 20;
/// Rows of a chunk are a multiple of this, so that each chunk of every buffer starts at an address that devices bind.
const ROWS: usize = 128;

/// Sizes of one adapted layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// The base layer.
    pub base: linear::Shape,
    /// Inner dimension, 1 or more.
    pub rank: usize,
    /// Factor of the update.
    pub scale: f32,
}

impl Shape {
    /// Rows of so many columns that are in the workspace at a time.
    fn chunk_rows(&self, columns: usize) -> usize {
        let rows = CHUNK / columns.max(1) / ROWS * ROWS;
        rows.max(ROWS).min(self.base.rows)
    }

    /// f32 elements of the workspace of each call, for activations of `X`, with or without dropout; 0 where none is needed.
    pub fn workspace_len<X: Float>(&self, dropout: bool) -> usize {
        let len = |columns| self.chunk_rows(columns) * columns;
        if dropout || is_narrow::<X>() { len(self.base.in_features).max(len(self.base.out_features)) } else { 0 }
    }

    /// The rows that are at work at a time: all, or as many of so many columns as the workspace holds.
    fn chunks(&self, in_workspace: bool, columns: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let all = self.base.rows;
        let most = if in_workspace { self.chunk_rows(columns) } else { all }.max(1);
        (0..all).step_by(most).map(move |first| first..(first + most).min(all))
    }
}

/// Some rows of a row-major buffer.
fn rows_of<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    (arg, handle): (&'static str, &Handle),
    rows: &Range<usize>,
    columns: usize,
) -> Result<Matrix, LaunchError> {
    Matrix::new::<E>(launch, arg, &from_row::<E>(handle, rows.start, columns), rows.len() * columns)
}

/// The dropout of some rows.
fn dropout_of<R>(all: RowDropout<'_>, rows: &Range<usize>, run: impl FnOnce(RowDropout<'_>) -> R) -> R {
    let [sequences, positions] = [all.sequences, all.positions].map(|handle| from_row::<i32>(handle, rows.start, 1));
    run(RowDropout { dropout: all.dropout, sequences: &sequences, positions: &positions })
}

/// Rows of the update's input, and the factor that they are to be multiplied by: as they are, or what dropout leaves of them.
fn update_input<R: Runtime, X: Float>(
    launch: &Launch<'_, R>,
    (x, columns): (&Handle, usize),
    rows: &Range<usize>,
    (dropout, workspace): (Option<RowDropout<'_>>, &Handle),
) -> Result<(Matrix, f32), LaunchError> {
    let Some(dropout) = dropout else {
        return Ok((rows_of::<R, X>(launch, ("x", x), rows, columns)?, 1.0));
    };
    let x = from_row::<X>(x, rows.start, columns);
    dropout_of(dropout, rows, |rows_dropout| {
        let args = dropout::Args { x: Some(&x), out: workspace, rows: rows_dropout };
        dropout::zero::<R, X>(launch.client(), (rows.len(), columns), args)
    })?;
    let left = Matrix::new::<X>(launch, "workspace", workspace, rows.len() * columns)?;
    Ok((left, dropout.dropout.kept_scale()))
}

/// Buffers of `h`.
#[derive(Clone, Copy, Debug)]
pub struct Hidden<'a> {
    /// `[rows, in_features]` of `X`
    pub x: &'a Handle,
    /// `[rank, in_features]` of `L`
    pub lora_a: &'a Handle,
    /// What is dropped of `x`.
    pub dropout: Option<RowDropout<'a>>,
    /// f32 `[rows, rank]`, overwritten: `drop(x) A^T`.
    pub h: &'a Handle,
    /// f32 `[Shape::workspace_len]`, overwritten; any buffer where that is 0.
    pub workspace: &'a Handle,
}

/// Launches `h = drop(x) A^T`: the part of [`forward`] that its backward pass reads, with the same bits.
///
/// # Errors
/// As [`forward`].
pub fn hidden<'t, R: Runtime, X: Float, L: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: Hidden<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "lora_linear_hidden");
    all_hidden::<R, X, L>(&launch, shape, args)
}

/// All rows of `h`: at once, but for what has to pass through the workspace.
fn all_hidden<R: Runtime, X: Float, L: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    args: Hidden<'_>,
) -> Result<(), LaunchError> {
    let mut chunks = shape.chunks(args.dropout.is_some(), shape.base.in_features);
    chunks.try_for_each(|rows| hidden_rows::<R, X, L>(launch, shape, args, &rows))
}

/// Some rows of `h`.
fn hidden_rows<R: Runtime, X: Float, L: Float>(
    launch: &Launch<'_, R>,
    Shape { base: linear::Shape { in_features, .. }, rank, .. }: Shape,
    args: Hidden<'_>,
    rows: &Range<usize>,
) -> Result<(), LaunchError> {
    let (a, scale) = update_input::<R, X>(launch, (args.x, in_features), rows, (args.dropout, args.workspace))?;
    let b = Matrix::new::<L>(launch, "lora_a", args.lora_a, rank * in_features)?;
    let out = rows_of::<R, f32>(launch, ("h", args.h), rows, rank)?;
    let form = Form { a_transposed: false, b_transposed: true, accumulate: false };
    product(
        launch,
        Size { rows: rows.len(), cols: rank, depth: in_features },
        form,
        Args { a, b, bias: None, out, scale },
    )
}

/// Buffers of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// Those of the base layer.
    pub base: linear::Forward<'a>,
    /// `[rank, in_features]` of `L`
    pub lora_a: &'a Handle,
    /// `[out_features, rank]` of `L`
    pub lora_b: &'a Handle,
    /// What is dropped of the update's input.
    pub dropout: Option<RowDropout<'a>>,
    /// f32 `[rows, rank]`, overwritten: `drop(x) A^T`.
    pub h: &'a Handle,
    /// f32 `[Shape::workspace_len]`, overwritten; any buffer where that is 0.
    pub workspace: &'a Handle,
}

/// Launches `h = drop(x) A^T`, `y = x W^T + bias + scale * h B^T`. Without a bias `B` is of no consequence.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn forward<'t, R: Runtime, X: Float, W: Float, B: Float, L: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "lora_linear_forward");
    let Shape { base: linear::Shape { in_features, out_features, .. }, rank, scale } = shape;
    let by_columns = Form { a_transposed: false, b_transposed: true, accumulate: false };
    let hidden =
        Hidden { x: args.base.x, lora_a: args.lora_a, dropout: args.dropout, h: args.h, workspace: args.workspace };
    all_hidden::<R, X, L>(&launch, shape, hidden)?;
    for rows in shape.chunks(is_narrow::<X>(), out_features) {
        let h = || rows_of::<R, f32>(&launch, ("h", args.h), &rows, rank);
        // The base layer first: no kernel but ours adds to what is there.
        let sums = Sums::<R, X>::new(&launch, ("y", args.base.y), (&rows, out_features), args.workspace);
        let matrices = Args {
            a: rows_of::<R, X>(&launch, ("x", args.base.x), &rows, in_features)?,
            b: Matrix::new::<W>(&launch, "weight", args.base.weight, out_features * in_features)?,
            bias: None,
            out: sums.matrix()?,
            scale: 1.0,
        };
        product(&launch, Size { rows: rows.len(), cols: out_features, depth: in_features }, by_columns, matrices)?;
        let lora_b = Matrix::new::<L>(&launch, "lora_b", args.lora_b, out_features * rank)?;
        let bias = args.base.bias.map(|bias| Matrix::new::<B>(&launch, "bias", bias, out_features)).transpose()?;
        let matrices = Args { a: h()?, b: lora_b, bias, out: sums.matrix()?, scale };
        let onto = Form { accumulate: true, ..by_columns };
        product(&launch, Size { rows: rows.len(), cols: out_features, depth: rank }, onto, matrices)?;
        sums.finish()?;
    }
    Ok(())
}

/// Buffers of `dh`.
#[derive(Clone, Copy, Debug)]
pub struct RankGradient<'a> {
    /// `[rows, out_features]` of `X`
    pub dy: &'a Handle,
    /// `[out_features, rank]` of `L`
    pub lora_b: &'a Handle,
    /// f32 `[rows, rank]`, overwritten.
    pub dh: &'a Handle,
}

/// Launches `dh = scale * dy B`, which the gradients of `x` and `A` start from.
///
/// # Errors
/// As [`forward`].
pub fn rank_gradient<'t, R: Runtime, X: Float, L: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: RankGradient<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "lora_linear_rank_gradient");
    let Shape { base: linear::Shape { rows, out_features, .. }, rank, scale } = shape;
    let matrices = Args {
        a: Matrix::new::<X>(&launch, "dy", args.dy, rows * out_features)?,
        b: Matrix::new::<L>(&launch, "lora_b", args.lora_b, out_features * rank)?,
        bias: None,
        out: Matrix::new::<f32>(&launch, "dh", args.dh, rows * rank)?,
        scale,
    };
    let form = Form { a_transposed: false, b_transposed: false, accumulate: false };
    product(&launch, Size { rows, cols: rank, depth: out_features }, form, matrices)
}

/// Buffers of the input's gradient.
#[derive(Clone, Copy, Debug)]
pub struct InputGradient<'a> {
    /// Those of the base layer.
    pub base: linear::InputGradient<'a>,
    /// f32 `[rows, rank]`, from [`rank_gradient`].
    pub dh: &'a Handle,
    /// `[rank, in_features]` of `L`
    pub lora_a: &'a Handle,
    /// What the forward pass dropped.
    pub dropout: Option<RowDropout<'a>>,
    /// f32 `[Shape::workspace_len]`, overwritten; any buffer where that is 0.
    pub workspace: &'a Handle,
}

/// Launches `dx = dy W + drop(dh A)`.
///
/// # Errors
/// As [`forward`].
pub fn input_gradient<'t, R: Runtime, X: Float, W: Float, L: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: InputGradient<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "lora_linear_input_gradient");
    let Shape { base: linear::Shape { in_features, out_features, .. }, rank, .. } = shape;
    let by_rows = Form { a_transposed: false, b_transposed: false, accumulate: false };
    let onto = Form { accumulate: true, ..by_rows };
    for rows in shape.chunks(is_narrow::<X>(), in_features) {
        let sums = Sums::<R, X>::new(&launch, ("dx", args.base.dx), (&rows, in_features), args.workspace);
        let update = |form| {
            let matrices = Args {
                a: rows_of::<R, f32>(&launch, ("dh", args.dh), &rows, rank)?,
                b: Matrix::new::<L>(&launch, "lora_a", args.lora_a, rank * in_features)?,
                bias: None,
                out: sums.matrix()?,
                scale: args.dropout.map_or(1.0, |rows| rows.dropout.kept_scale()),
            };
            product(&launch, Size { rows: rows.len(), cols: in_features, depth: rank }, form, matrices)
        };
        let base = |form| {
            let matrices = Args {
                a: rows_of::<R, X>(&launch, ("dy", args.base.dy), &rows, out_features)?,
                b: Matrix::new::<W>(&launch, "weight", args.base.weight, out_features * in_features)?,
                bias: None,
                out: sums.matrix()?,
                scale: 1.0,
            };
            product(&launch, Size { rows: rows.len(), cols: in_features, depth: out_features }, form, matrices)
        };
        match args.dropout {
            None => {
                base(by_rows)?;
                update(onto)?;
            }
            // Of the base layer nothing is dropped: it comes in afterwards.
            Some(dropout) => {
                update(by_rows)?;
                dropout_of(dropout, &rows, |rows_dropout| {
                    let args = dropout::Args { x: None, out: sums.handle(), rows: rows_dropout };
                    dropout::zero::<R, f32>(launch.client(), (rows.len(), in_features), args)
                })?;
                base(onto)?;
            }
        }
        sums.finish()?;
    }
    Ok(())
}

/// Buffers of the gradient of `A`.
#[derive(Clone, Copy, Debug)]
pub struct GradientOfA<'a> {
    /// f32 `[rows, rank]`, from [`rank_gradient`].
    pub dh: &'a Handle,
    /// `[rows, in_features]` of `X`
    pub x: &'a Handle,
    /// What the forward pass dropped.
    pub dropout: Option<RowDropout<'a>>,
    /// f32 `[rank, in_features]`, added to.
    pub dlora_a: &'a Handle,
    /// f32 `[Shape::workspace_len]`, overwritten; any buffer without dropout.
    pub workspace: &'a Handle,
}

/// Launches `dA += dh^T drop(x)`.
///
/// # Errors
/// As [`forward`].
pub fn gradient_of_a<'t, R: Runtime, X: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: GradientOfA<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "lora_linear_gradient_of_a");
    let Shape { base: linear::Shape { in_features, .. }, rank, .. } = shape;
    let form = Form { a_transposed: true, b_transposed: false, accumulate: true };
    for rows in shape.chunks(args.dropout.is_some(), in_features) {
        let (input, kept_scale) =
            update_input::<R, X>(&launch, (args.x, in_features), &rows, (args.dropout, args.workspace))?;
        let matrices = Args {
            a: rows_of::<R, f32>(&launch, ("dh", args.dh), &rows, rank)?,
            b: input,
            bias: None,
            out: Matrix::new::<f32>(&launch, "dlora_a", args.dlora_a, rank * in_features)?,
            scale: kept_scale,
        };
        product(&launch, Size { rows: rank, cols: in_features, depth: rows.len() }, form, matrices)?;
    }
    Ok(())
}

/// Buffers of the gradient of `B`.
#[derive(Clone, Copy, Debug)]
pub struct GradientOfB<'a> {
    /// `[rows, out_features]` of `X`
    pub dy: &'a Handle,
    /// f32 `[rows, rank]`, from [`forward`].
    pub h: &'a Handle,
    /// f32 `[out_features, rank]`, added to.
    pub dlora_b: &'a Handle,
}

/// Launches `dB += scale * dy^T h`.
///
/// # Errors
/// As [`forward`].
pub fn gradient_of_b<'t, R: Runtime, X: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: GradientOfB<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "lora_linear_gradient_of_b");
    let Shape { base: linear::Shape { rows, out_features, .. }, rank, scale } = shape;
    let matrices = Args {
        a: Matrix::new::<X>(&launch, "dy", args.dy, rows * out_features)?,
        b: Matrix::new::<f32>(&launch, "h", args.h, rows * rank)?,
        bias: None,
        out: Matrix::new::<f32>(&launch, "dlora_b", args.dlora_b, out_features * rank)?,
        scale,
    };
    let form = Form { a_transposed: true, b_transposed: false, accumulate: true };
    product(&launch, Size { rows: out_features, cols: rank, depth: rows }, form, matrices)
}
