//! Fused RMSNorm, optionally with a residual add.                               Zhang & Sennrich 2019, arXiv:1910.07467
//!
//! `sum = x + residual` (or `x`), `rstd = 1 / sqrt(mean(sum^2) + eps)`, `out = sum * rstd * (weight + offset)`.
//!
//! Work: one cube per row, or per several rows for a gradient of the weight. Traffic: a row is read once and kept in registers, or where it
//! is too long twice (the second time from cache, but for that gradient); the result is written once.
//! Numerics: sums are f32 for every element type. `dweight` is a fixed-order sum over parts of the rows, no float atomics, so it
//! has the same bits on every run.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError};

use crate::{
    Gradient, backward,
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
    /// Of the weight, if it is wanted.
    pub dweight: Option<Gradient<'a>>,
}

/// Launches `dx = rstd * (g - xhat * mean(g * xhat)) + dsum`, where `g = dout * (weight + offset)` and `xhat = sum * rstd`,
/// written over `dout`, and `dweight += sum_rows(dout * xhat)`, in two steps of fixed order.
///
/// # Errors
/// As [`forward`].
pub fn backward<R: Runtime, E: Float, W: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Backward<'_>,
) -> Result<(), LaunchError> {
    let Backward { dout, dsum, sum, weight, rstd, dweight } = args;
    let statistics = Statistics { rstd, mean: None };
    let args = backward::Backward { dout, dsum, sum, weight, statistics, dweight, dbias: None };
    backward::backward::<R, E, W>(&Launch::new(client, "rms_norm_backward"), shape.of_rows(), args)
}
