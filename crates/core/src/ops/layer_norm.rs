//! Normalisation of each row to mean 0 and variance 1, with a fused residual add.        Ba et al. 2016, arXiv:1607.06450
//! - `sum = x + residual` (or `x`), `xhat = (sum - mean) * rstd`, `rstd = 1 / sqrt(mean((sum - mean)^2) + eps)`
//! - `out = xhat * weight + bias`
//! - `dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum`, where `g = dout * weight`;
//!   `dweight += sum_rows(dout * xhat)`, `dbias += sum_rows(dout)`. The residual's gradient equals `dx`.

use super::{
    check,
    cost::{Cost, stored},
};
use crate::{DType, Result, Tensor};

const OP: &str = "layer_norm";

/// What defines one normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub hidden_size: usize,
    /// Added to the variance; positive.
    pub eps: f32,
    /// Storage type of `x`, `residual`, `sum`, `out` and their gradients. Statistics are f32.
    pub dtype: DType,
    /// Storage type of `weight` and `bias`; their gradients are f32.
    pub weight_dtype: DType,
}

impl Spec {
    /// # Errors
    /// [`crate::Error::Shape`] unless `x` is `[rows, hidden_size]`, `weight` and `bias` `[hidden_size]`; [`crate::Error::DType`] unless
    /// these two have one type; [`crate::Error::InvalidSpec`] if `eps <= 0`.
    pub fn new(x: &Tensor, Affine { weight, bias }: Affine<'_>, eps: f32) -> Result<Self> {
        check::float(OP, "x", x.dtype())?;
        check::float(OP, "weight", weight.dtype())?;
        check::rank(OP, "x", x, 2, "[rows, hidden_size]")?;
        let (rows, hidden_size) = (x.shape()[0], x.shape()[1]);
        let like = (&[hidden_size][..], weight.dtype(), x.device());
        check::tensor(OP, "weight", weight, like)?;
        if let Some(bias) = bias {
            check::tensor(OP, "bias", bias, like)?;
        }
        check::positive(OP, "eps", eps)?;
        Ok(Self { rows, hidden_size, eps, dtype: x.dtype(), weight_dtype: weight.dtype() })
    }

    /// `x`, `weight` and `bias` in, `out` and both statistics out; with a residual, that in and `sum` out.
    pub fn forward_cost(&self, has_residual: bool, has_bias: bool) -> Cost {
        let matrices = self.matrix() * (1 + usize::from(has_residual));
        Cost::read(matrices + self.weight() * (1 + usize::from(has_bias))) + Cost::written(matrices + self.statistics())
    }

    /// `dout`, `sum`, `weight` and the statistics in, `dx` out; `dsum` in where there is one, so many gradients of parameters in and
    /// out.
    pub fn backward_cost(&self, has_dsum: bool, num_gradients: usize) -> Cost {
        Cost::read(self.matrix() * (2 + usize::from(has_dsum)) + self.weight() + self.statistics())
            + Cost::written(self.matrix())
            + Cost::updated(num_gradients * stored(self.hidden_size, DType::F32))
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
        2 * stored(self.rows, DType::F32)
    }
}

/// What normalised rows are multiplied by and what is added, both `[hidden_size]`.
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a> {
    /// One factor per channel.
    pub weight: &'a Tensor,
    /// One summand per channel, of the type of `weight`.
    pub bias: Option<&'a Tensor>,
}

/// Results of the forward pass.
#[derive(Debug)]
pub struct Forward {
    /// `[rows, hidden_size]`
    pub out: Tensor,
    /// `x + residual`, present when a residual was given: the new residual stream, and what backward reads.
    pub sum: Option<Tensor>,
    /// `[rows]`, f32
    pub mean: Tensor,
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
    pub mean: &'a Tensor,
    /// `[rows]`, f32, from the forward pass.
    pub rstd: &'a Tensor,
}

/// Gradients of the parameters that are wanted, f32 `[hidden_size]`, added to.
#[derive(Debug, Default)]
pub struct ParameterGradients<'a> {
    /// Of `weight`.
    pub dweight: Option<&'a mut Tensor>,
    /// Of `bias`.
    pub dbias: Option<&'a mut Tensor>,
}

/// LayerNorm of a backend.
pub trait LayerNorm {
    /// `x` may become `sum` when there is a residual and the buffer is unique.
    fn layer_norm_forward(
        &self,
        spec: &Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        affine: Affine<'_>,
    ) -> Result<Forward>;
    /// Gives `dx` (which is also the residual's gradient); adds to the gradients of the parameters.
    fn layer_norm_backward(
        &self,
        spec: &Spec,
        inputs: Backward<'_>,
        gradients: ParameterGradients<'_>,
    ) -> Result<Tensor>;
}

/// `out = layer_norm(x + residual) * weight + bias`, rows of `[rows, hidden_size]`.
///
/// # Errors
/// As [`Spec::new`]; shape, dtype or device of `residual`.
pub fn forward(x: Tensor, residual: Option<&Tensor>, affine: Affine<'_>, eps: f32) -> Result<Forward> {
    let spec = Spec::new(&x, affine, eps)?;
    if let Some(residual) = residual {
        check::tensor(OP, "residual", residual, (x.shape(), x.dtype(), x.device()))?;
    }
    let device = x.device().clone();
    device.backend().layer_norm_forward(&spec, x, residual, affine)
}

/// Gives `dx`; adds to the gradients of the parameters that are wanted.
///
/// # Errors
/// As [`Spec::new`]; shape, dtype or device of any gradient; [`crate::Error::Shared`] for a shared gradient of a parameter.
pub fn backward(inputs: Backward<'_>, gradients: ParameterGradients<'_>, eps: f32) -> Result<Tensor> {
    let spec = Spec::new(inputs.sum, Affine { weight: inputs.weight, bias: None }, eps)?;
    let like = (&**inputs.sum.shape(), spec.dtype, inputs.sum.device());
    check::tensor(OP, "dout", &inputs.dout, like)?;
    if let Some(dsum) = inputs.dsum {
        check::tensor(OP, "dsum", dsum, like)?;
    }
    for (arg, statistic) in [("mean", inputs.mean), ("rstd", inputs.rstd)] {
        check::tensor(OP, arg, statistic, (&[spec.rows], DType::F32, like.2))?;
    }
    for (arg, gradient) in [("dweight", &gradients.dweight), ("dbias", &gradients.dbias)] {
        if let Some(gradient) = gradient {
            check::tensor(OP, arg, gradient, (&[spec.hidden_size], DType::F32, like.2))?;
        }
    }
    let device = inputs.sum.device().clone();
    device.backend().layer_norm_backward(&spec, inputs, gradients)
}
