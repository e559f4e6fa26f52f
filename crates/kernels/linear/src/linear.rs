//! Matrix product with a weight kept as `[out_features, in_features]`.
//!
//! `y = x W^T + bias`; `dx = dy W`; `dweight += dy^T x`; `dbias += sum_rows(dy)`. See [`crate::product`] for work, traffic and
//! numerics.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, Target};

use crate::{
    few_rows::{Operands, few_rows},
    product::{Args, Form, Matrix, Size, product},
};

/// Sizes of one linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of `x` and `y`.
    pub rows: usize,
    /// Columns of `x`.
    pub in_features: usize,
    /// Columns of `y`.
    pub out_features: usize,
}

/// Buffers of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[rows, in_features]` of `X`.
    pub x: &'a Handle,
    /// `[out_features, in_features]` of `W`.
    pub weight: &'a Handle,
    /// `[out_features]` of `B`.
    pub bias: Option<&'a Handle>,
    /// `[rows, out_features]` of `X`, overwritten.
    pub y: &'a Handle,
}

/// Launches `y = x W^T + bias`. Without a bias `B` is of no consequence.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn forward<'t, R: Runtime, X: Float, W: Float, B: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "linear_forward");
    let Shape { rows, in_features, out_features } = shape;
    let matrices = Args {
        a: Matrix::new::<X>(&launch, "x", args.x, rows * in_features)?,
        b: Matrix::new::<W>(&launch, "weight", args.weight, out_features * in_features)?,
        bias: args.bias.map(|bias| Matrix::new::<B>(&launch, "bias", bias, out_features)).transpose()?,
        out: Matrix::new::<X>(&launch, "y", args.y, rows * out_features)?,
        scale: 1.0,
    };
    let form = Form { a_transposed: false, b_transposed: true, accumulate: false };
    product(&launch, Size { rows, cols: out_features, depth: in_features }, form, matrices)
}

/// Buffers of the input's gradient.
#[derive(Clone, Copy, Debug)]
pub struct InputGradient<'a> {
    /// `[rows, out_features]` of `X`.
    pub dy: &'a Handle,
    /// `[out_features, in_features]` of `W`.
    pub weight: &'a Handle,
    /// `[rows, in_features]` of `X`, overwritten.
    pub dx: &'a Handle,
}

/// Launches `dx = dy W`.
///
/// # Errors
/// As [`forward`].
pub fn input_gradient<'t, R: Runtime, X: Float, W: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: InputGradient<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "linear_input_gradient");
    let Shape { rows, in_features, out_features } = shape;
    let matrices = Args {
        a: Matrix::new::<X>(&launch, "dy", args.dy, rows * out_features)?,
        b: Matrix::new::<W>(&launch, "weight", args.weight, out_features * in_features)?,
        bias: None,
        out: Matrix::new::<X>(&launch, "dx", args.dx, rows * in_features)?,
        scale: 1.0,
    };
    let form = Form { a_transposed: false, b_transposed: false, accumulate: false };
    product(&launch, Size { rows, cols: in_features, depth: out_features }, form, matrices)
}

/// Buffers of the weight's gradient.
#[derive(Clone, Copy, Debug)]
pub struct WeightGradient<'a> {
    /// `[rows, out_features]` of `X`.
    pub dy: &'a Handle,
    /// `[rows, in_features]` of `X`.
    pub x: &'a Handle,
    /// f32 `[out_features, in_features]`, added to.
    pub dweight: &'a Handle,
}

/// Launches `dweight += dy^T x`.
///
/// # Errors
/// As [`forward`].
pub fn weight_gradient<'t, R: Runtime, X: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: WeightGradient<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "linear_weight_gradient");
    let Shape { rows, in_features, out_features } = shape;
    let matrices = Args {
        a: Matrix::new::<X>(&launch, "dy", args.dy, rows * out_features)?,
        b: Matrix::new::<X>(&launch, "x", args.x, rows * in_features)?,
        bias: None,
        out: Matrix::new::<f32>(&launch, "dweight", args.dweight, out_features * in_features)?,
        scale: 1.0,
    };
    let form = Form { a_transposed: true, b_transposed: false, accumulate: true };
    product(&launch, Size { rows: out_features, cols: in_features, depth: rows }, form, matrices)
}

/// Buffers of the bias's gradient.
#[derive(Clone, Copy, Debug)]
pub struct BiasGradient<'a> {
    /// `[rows, out_features]` of `X`.
    pub dy: &'a Handle,
    /// f32 `[out_features]`, added to.
    pub dbias: &'a Handle,
}

/// Launches `dbias += sum_rows(dy)`. `shape.in_features` is of no consequence.
///
/// # Errors
/// As [`forward`].
pub fn bias_gradient<'t, R: Runtime, X: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: BiasGradient<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "linear_bias_gradient");
    let Shape { rows, out_features, .. } = shape;
    if out_features == 0 {
        return Ok(());
    }
    let matrices = Operands {
        a: None,
        b: Matrix::new::<X>(&launch, "dy", args.dy, rows * out_features)?,
        bias: None,
        out: Matrix::new::<f32>(&launch, "dbias", args.dbias, out_features)?,
        scale: 1.0,
    };
    let form = Form { a_transposed: false, b_transposed: false, accumulate: true };
    few_rows(&launch, Size { rows: 1, cols: out_features, depth: rows }, form, matrices)
}
