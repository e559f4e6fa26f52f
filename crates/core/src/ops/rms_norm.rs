//! Root-mean-square normalisation of each row, with a fused residual add.      Zhang & Sennrich 2019, arXiv:1910.07467
//! - `sum = x + residual` (or `x`), `xhat = sum * rstd`, `rstd = 1 / sqrt(mean(sum^2) + eps)`
//! - `out = xhat * (weight + weight_offset)`
//! - `dx = rstd * (g - xhat * mean(g * xhat)) + dsum`, where `g = dout * (weight + weight_offset)`;
//!   `dweight += sum_rows(dout * xhat)`. The residual's gradient equals `dx`.

use super::{
    check,
    cost::{Cost, given, stored},
};
use crate::{DType, Result, Tensor};

/// What defines one normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub hidden_size: usize,
    /// Added to the mean square; positive.
    pub eps: f32,
    /// Added to every weight: 0 for Llama, 1 for Gemma, whose checkpoints store `weight - 1`.
    pub weight_offset: f32,
    /// Storage type of `x`, `residual`, `sum`, `out` and their gradients. Statistics are f32.
    pub dtype: DType,
    /// Storage type of `weight`; its gradient is f32.
    pub weight_dtype: DType,
}

impl Spec {
    /// # Errors
    /// [`crate::Error::Shape`] unless `x` is `[rows, hidden_size]` and `weight` `[hidden_size]`;
    /// [`crate::Error::InvalidSpec`] if `eps <= 0`.
    pub fn new(x: &Tensor, weight: &Tensor, eps: f32, weight_offset: f32) -> Result<Self> {
        check::float("rms_norm", "x", x.dtype())?;
        check::float("rms_norm", "weight", weight.dtype())?;
        check::rank("rms_norm", "x", x, 2, "[rows, hidden_size]")?;
        let (rows, hidden_size) = (x.shape()[0], x.shape()[1]);
        check::tensor("rms_norm", "weight", weight, (&[hidden_size], weight.dtype(), x.device()))?;
        check::positive("rms_norm", "eps", eps)?;
        Ok(Self { rows, hidden_size, eps, weight_offset, dtype: x.dtype(), weight_dtype: weight.dtype() })
    }

    /// `x` and `weight` in, `out` and `rstd` out; with a residual, that in and `sum` out.
    pub fn forward_cost(&self, has_residual: bool) -> Cost {
        let matrices = self.matrix() * (1 + usize::from(has_residual));
        Cost::read(matrices + self.weight()) + Cost::written(matrices + self.statistics())
    }

    /// `dout`, `sum`, `weight` and `rstd` in, `dx` out; `dsum` in where there is one, `dweight` in and out where it is wanted.
    pub fn backward_cost(&self, has_dsum: bool, needs_dweight: bool) -> Cost {
        let dweight = given(needs_dweight, stored(self.hidden_size, DType::F32));
        Cost::read(self.matrix() * (2 + usize::from(has_dsum)) + self.weight() + self.statistics())
            + Cost::written(self.matrix())
            + Cost::updated(dweight)
    }

    /// Bytes of a matrix.
    fn matrix(&self) -> usize {
        stored(self.rows * self.hidden_size, self.dtype)
    }

    /// Bytes of a vector of weights.
    fn weight(&self) -> usize {
        stored(self.hidden_size, self.weight_dtype)
    }

    /// Bytes of the statistics.
    fn statistics(&self) -> usize {
        stored(self.rows, DType::F32)
    }
}

/// Results of the forward pass.
#[derive(Debug)]
pub struct Forward {
    /// `[rows, hidden_size]`
    pub out: Tensor,
    /// `x + residual`, present when a residual was given: the new residual stream, and what backward reads.
    pub sum: Option<Tensor>,
    /// `[rows]`, f32
    pub rstd: Tensor,
}

/// Inputs of the backward pass.
#[derive(Debug)]
pub struct Backward<'a> {
    /// Gradient of `out`; its buffer may become `dx`.
    pub dout: Tensor,
    /// Gradient that reaches `sum` by other ways.
    pub dsum: Option<&'a Tensor>,
    /// What was normalised: `sum`, or `x` when there was no residual.
    pub sum: &'a Tensor,
    /// `[hidden_size]`
    pub weight: &'a Tensor,
    /// `[rows]`, f32, from the forward pass.
    pub rstd: &'a Tensor,
}

/// RMSNorm of a backend.
pub trait RmsNorm {
    /// `x` may become `sum` when there is a residual and the buffer is unique.
    fn rms_norm_forward(&self, spec: &Spec, x: Tensor, residual: Option<&Tensor>, weight: &Tensor) -> Result<Forward>;
    /// Gives `dx` (which is also the residual's gradient); adds to `dweight`, f32 `[hidden_size]`.
    fn rms_norm_backward(&self, spec: &Spec, inputs: Backward<'_>, dweight: Option<&mut Tensor>) -> Result<Tensor>;
}

/// `out = rms_norm(x + residual) * (weight + weight_offset)`, rows of `[rows, hidden_size]`.
///
/// # Errors
/// As [`Spec::new`]; shape, dtype or device of `residual`.
pub fn forward(x: Tensor, residual: Option<&Tensor>, weight: &Tensor, eps: f32, weight_offset: f32) -> Result<Forward> {
    let spec = Spec::new(&x, weight, eps, weight_offset)?;
    if let Some(residual) = residual {
        check::tensor("rms_norm", "residual", residual, (x.shape(), x.dtype(), x.device()))?;
    }
    let device = x.device().clone();
    device.backend().rms_norm_forward(&spec, x, residual, weight)
}

/// Gives `dx`; adds to `dweight` where it is wanted.
///
/// # Errors
/// As [`Spec::new`]; shape, dtype or device of any gradient; [`crate::Error::Shared`] for a shared `dweight`.
pub fn backward(inputs: Backward<'_>, dweight: Option<&mut Tensor>, eps: f32, weight_offset: f32) -> Result<Tensor> {
    let spec = Spec::new(inputs.sum, inputs.weight, eps, weight_offset)?;
    let like = (&**inputs.sum.shape(), spec.dtype, inputs.sum.device());
    check::tensor("rms_norm", "dout", &inputs.dout, like)?;
    if let Some(dsum) = inputs.dsum {
        check::tensor("rms_norm", "dsum", dsum, like)?;
    }
    check::tensor("rms_norm", "rstd", inputs.rstd, (&[spec.rows], DType::F32, like.2))?;
    if let Some(dweight) = &dweight {
        check::tensor("rms_norm", "dweight", dweight, (&[spec.hidden_size], DType::F32, like.2))?;
    }
    let device = inputs.sum.device().clone();
    device.backend().rms_norm_backward(&spec, inputs, dweight)
}
