//! Fused RMSNorm, optionally with a residual add.                               Zhang & Sennrich 2019, arXiv:1910.07467
//!
//! `sum = x + residual` (or `x`), `rstd = 1 / sqrt(mean(sum^2) + eps)`, `out = sum * rstd * (weight + offset)`.
//!
//! Work: one cube per row. Traffic: the row is read twice (the second time from cache), `out` is written once.
//! Numerics: sums are f32 for every element type. `dweight` is a fixed-order sum over blocks of rows, no float atomics, so it
//! has the same bits on every run.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError};

use crate::{
    parameters::{self, Gradient, ParameterGradients},
    rows::{self, Statistics},
};

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

impl Shape {
    fn of_rows(self) -> rows::Shape {
        let Self { rows, hidden_size, eps, weight_offset } = self;
        rows::Shape { rows, hidden_size, eps, weight_offset }
    }
}

/// Buffers of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[rows, hidden_size]` of `E`; with a residual, `x + residual` on return.
    pub x: &'a Handle,
    /// `[rows, hidden_size]` of `E`.
    pub residual: Option<&'a Handle>,
    /// `[hidden_size]` of `W`.
    pub weight: &'a Handle,
    /// `[rows, hidden_size]` of `E`, overwritten.
    pub out: &'a Handle,
    /// `[rows]` f32, overwritten.
    pub rstd: &'a Handle,
}

/// Launches `out, rstd = rms_norm(x, weight)`, or with a residual `x += residual`, which is rounded to `E`, first.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn forward<R: Runtime, E: Float, W: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let Forward { x, residual, weight, out, rstd } = args;
    let statistics = Statistics { rstd, mean: None };
    let args = rows::Forward { x, residual, weight, bias: None, out, statistics };
    rows::forward::<R, E, W>(&Launch::new(client, "rms_norm_forward"), shape.of_rows(), args)
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
    let Backward { dout, dsum, sum, weight, rstd } = args;
    let args = rows::Backward { dout, dsum, sum, weight, statistics: Statistics { rstd, mean: None } };
    rows::backward::<R, E, W>(&Launch::new(client, "rms_norm_backward"), shape.of_rows(), args)
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
    /// f32 `[column_parts(rows), hidden_size]` by [`crate::column_parts`], overwritten.
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
    let WeightGradient { dout, sum, rstd, workspace, dweight } = args;
    let (statistics, dweight) = (Statistics { rstd, mean: None }, Some(Gradient { workspace, total: dweight }));
    let args = ParameterGradients { dout, sum, statistics, dweight, dbias: None };
    parameters::parameter_gradients::<R, E>(&Launch::new(client, "rms_norm_weight_gradient"), shape.of_rows(), args)
}
