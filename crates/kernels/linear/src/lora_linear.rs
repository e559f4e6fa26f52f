//! Linear layer with a low-rank update.                                         Hu et al. 2021, arXiv:2106.09685
//! - `y = x W^T + bias + scale * (x A^T) B^T`, where `A` is `[rank, in_features]` and `B` `[out_features, rank]`
//! - with `h = x A^T` and `dh = scale * dy B`: `dx = dy W + dh A`; `dA += dh^T x`; `dB += scale * dy^T h`
//!
//! Work: the products of [`crate::product`], smallest first; `W + scale * B A` is never formed. `h` and `dh` are f32, so that nothing is
//! rounded between two products; `y` and `dx` are written by the base layer and added to by the update.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError};

use crate::{
    linear,
    product::{Args, Form, Matrix, Size, product},
};

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

/// Buffers of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// Those of the base layer.
    pub base: linear::Forward<'a>,
    /// `[rank, in_features]` of `L`
    pub lora_a: &'a Handle,
    /// `[out_features, rank]` of `L`
    pub lora_b: &'a Handle,
    /// f32 `[rows, rank]`, overwritten: `x A^T`.
    pub h: &'a Handle,
}

/// Launches `h = x A^T`, `y = x W^T + bias + scale * h B^T`. Without a bias `B` is of no consequence.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn forward<R: Runtime, X: Float, W: Float, B: Float, L: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "lora_linear_forward");
    let Shape { base: linear::Shape { rows, in_features, out_features }, rank, scale } = shape;
    let h = || Matrix::new::<f32>(&launch, "h", args.h, rows * rank);
    let matrices = Args {
        a: Matrix::new::<X>(&launch, "x", args.base.x, rows * in_features)?,
        b: Matrix::new::<L>(&launch, "lora_a", args.lora_a, rank * in_features)?,
        bias: None,
        out: h()?,
        scale: 1.0,
    };
    let form = Form { a_transposed: false, b_transposed: true, accumulate: false };
    product(&launch, Size { rows, cols: rank, depth: in_features }, form, matrices)?;
    linear::forward::<R, X, W, B>(client, shape.base, args.base)?;
    let matrices = Args {
        a: h()?,
        b: Matrix::new::<L>(&launch, "lora_b", args.lora_b, out_features * rank)?,
        bias: None,
        out: Matrix::new::<X>(&launch, "y", args.base.y, rows * out_features)?,
        scale,
    };
    let form = Form { accumulate: true, ..form };
    product(&launch, Size { rows, cols: out_features, depth: rank }, form, matrices)
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
pub fn rank_gradient<R: Runtime, X: Float, L: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: RankGradient<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "lora_linear_rank_gradient");
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
}

/// Launches `dx = dy W + dh A`.
///
/// # Errors
/// As [`forward`].
pub fn input_gradient<R: Runtime, X: Float, W: Float, L: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: InputGradient<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "lora_linear_input_gradient");
    let Shape { base: linear::Shape { rows, in_features, .. }, rank, .. } = shape;
    linear::input_gradient::<R, X, W>(client, shape.base, args.base)?;
    let matrices = Args {
        a: Matrix::new::<f32>(&launch, "dh", args.dh, rows * rank)?,
        b: Matrix::new::<L>(&launch, "lora_a", args.lora_a, rank * in_features)?,
        bias: None,
        out: Matrix::new::<X>(&launch, "dx", args.base.dx, rows * in_features)?,
        scale: 1.0,
    };
    let form = Form { a_transposed: false, b_transposed: false, accumulate: true };
    product(&launch, Size { rows, cols: in_features, depth: rank }, form, matrices)
}

/// Buffers of the gradient of `A`.
#[derive(Clone, Copy, Debug)]
pub struct GradientOfA<'a> {
    /// f32 `[rows, rank]`, from [`rank_gradient`].
    pub dh: &'a Handle,
    /// `[rows, in_features]` of `X`
    pub x: &'a Handle,
    /// f32 `[rank, in_features]`, added to.
    pub dlora_a: &'a Handle,
}

/// Launches `dA += dh^T x`.
///
/// # Errors
/// As [`forward`].
pub fn gradient_of_a<R: Runtime, X: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: GradientOfA<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "lora_linear_gradient_of_a");
    let Shape { base: linear::Shape { rows, in_features, .. }, rank, .. } = shape;
    let matrices = Args {
        a: Matrix::new::<f32>(&launch, "dh", args.dh, rows * rank)?,
        b: Matrix::new::<X>(&launch, "x", args.x, rows * in_features)?,
        bias: None,
        out: Matrix::new::<f32>(&launch, "dlora_a", args.dlora_a, rank * in_features)?,
        scale: 1.0,
    };
    let form = Form { a_transposed: true, b_transposed: false, accumulate: true };
    product(&launch, Size { rows: rank, cols: in_features, depth: rows }, form, matrices)
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
pub fn gradient_of_b<R: Runtime, X: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: GradientOfB<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "lora_linear_gradient_of_b");
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
