//! Fused LayerNorm, optionally with a residual add.                                        Ba et al. 2016, arXiv:1607.06450
//!
//! `sum = x + residual` (or `x`), `xhat = (sum - mean) / sqrt(variance + eps)`, `out = xhat * weight + bias`.
//!
//! Work: one cube per row, or per several rows for gradients of parameters. Traffic: a row is read once and kept in registers, or where it
//! is too long three times (all but the first time from cache; twice backward, but for those gradients); the result is written once.
//! Numerics: sums are f32 for every element type, the variance is that of the differences from the mean. `dweight` and `dbias` are
//! fixed-order sums over parts of the rows, no float atomics, so they have the same bits on every run.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError};

use crate::{Gradient, backward, rows};

/// Sizes and constants of one normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub hidden_size: usize,
    /// Added to the variance.
    pub eps: f32,
}

impl Shape {
    fn of_rows(self) -> rows::Shape {
        let Self { rows, hidden_size, eps } = self;
        rows::Shape { rows, hidden_size, eps, weight_offset: 0.0 }
    }
}

/// What is known of each row, `[rows]` f32.
#[derive(Clone, Copy, Debug)]
pub struct Statistics<'a> {
    /// Mean of the row.
    pub mean: &'a Handle,
    /// `1 / sqrt(variance + eps)`
    pub rstd: &'a Handle,
}

impl<'a> Statistics<'a> {
    fn of_rows(self) -> rows::Statistics<'a> {
        rows::Statistics { rstd: self.rstd, mean: Some(self.mean) }
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
    /// `[hidden_size]` of `W`.
    pub bias: Option<&'a Handle>,
    /// `[rows, hidden_size]` of `E`, overwritten.
    pub out: &'a Handle,
    /// Overwritten.
    pub statistics: Statistics<'a>,
}

/// Launches `out, statistics = layer_norm(x, weight, bias)`, or with a residual `x += residual`, which is rounded to `E`, first.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn forward<R: Runtime, E: Float, W: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let Forward { x, residual, weight, bias, out, statistics } = args;
    let args = rows::Forward { x, residual, weight, bias, out, statistics: statistics.of_rows() };
    rows::forward::<R, E, W>(&Launch::new(client, "layer_norm_forward"), shape.of_rows(), args)
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
    /// From the forward pass.
    pub statistics: Statistics<'a>,
    /// Of the weight, if it is wanted.
    pub dweight: Option<Gradient<'a>>,
    /// Of the bias, if it is wanted.
    pub dbias: Option<Gradient<'a>>,
}

/// Launches `dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum`, where `g = dout * weight`, written over `dout`, with
/// `dweight += sum_rows(dout * xhat)` and `dbias += sum_rows(dout)`, in two steps of fixed order.
///
/// # Errors
/// As [`forward`].
pub fn backward<R: Runtime, E: Float, W: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Backward<'_>,
) -> Result<(), LaunchError> {
    let Backward { dout, dsum, sum, weight, statistics, dweight, dbias } = args;
    let args = backward::Backward { dout, dsum, sum, weight, statistics: statistics.of_rows(), dweight, dbias };
    backward::backward::<R, E, W>(&Launch::new(client, "layer_norm_backward"), shape.of_rows(), args)
}
