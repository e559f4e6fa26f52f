//! Linear layer whose rows have trained lengths.                                    Liu et al. 2024, arXiv:2402.09353
//! - `norm[j] = |W[j] + scale * (B A)[j]|`, the length of a row of the adapted matrix
//! - `y = c * t + bias` with `c = magnitude / norm`, where `t = x W^T + scale * (x A^T) B^T` is what
//!   [`lora_linear`](super::lora_linear) gives without a bias
//! - `dt = c * dy`; `dmagnitude += sum_rows(dy * t) / norm`; `dbias += sum_rows(dy)`. The norm is taken for a constant, as the
//!   paper does (section 4.3): no gradient goes through it
//!
//! `W + scale * B A` is never formed but for a piece of a row. A row of length 0 has no direction: it gives NaN.

use super::{
    check,
    cost::{Cost, stored},
};
use crate::{DType, Result, Tensor, Weight};

const OP: &str = "dora";

/// What defines the lengths of the rows of one adapted matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Columns of the matrix.
    pub in_features: usize,
    /// Rows of the matrix.
    pub out_features: usize,
    /// Storage type of the matrix; the adapter is f32.
    pub weight_dtype: DType,
    /// Inner dimension of the adapter.
    pub rank: usize,
    /// Factor of the update.
    pub scale: f32,
}

impl NormSpec {
    /// The matrix and the adapter in, the norms out.
    pub fn cost(&self) -> Cost {
        let &Self { in_features, out_features, weight_dtype, rank, .. } = self;
        let matrix = stored(in_features * out_features, weight_dtype);
        let adapter = stored(rank * (in_features + out_features), DType::F32);
        Cost { flops: 2 * ((rank + 1) * in_features * out_features) as u64, ..Cost::read(matrix + adapter) }
            + Cost::written(stored(out_features, DType::F32))
    }
}

/// What defines one scaling of rows of activations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Rows of `t` and `y`.
    pub rows: usize,
    /// Columns of `t` and `y`.
    pub out_features: usize,
    /// Storage type of `t`, `y` and their gradients; magnitudes and norms are f32.
    pub dtype: DType,
}

impl Spec {
    /// `t` and three vectors in, `y` out.
    pub fn forward_cost(&self) -> Cost {
        Cost::read(self.matrix() + 3 * self.vector()) + Cost::written(self.matrix())
    }

    /// `dy`, `t` and two vectors in, `dt` out, the magnitudes' gradient in and out.
    pub fn backward_cost(&self) -> Cost {
        Cost::read(2 * self.matrix() + 2 * self.vector()) + Cost::written(self.matrix()) + Cost::updated(self.vector())
    }

    /// Bytes of a matrix.
    fn matrix(&self) -> usize {
        stored(self.rows * self.out_features, self.dtype)
    }

    /// Bytes of a vector.
    fn vector(&self) -> usize {
        stored(self.out_features, DType::F32)
    }
}

/// Lengths of rows: what they are to be, and what they are.
#[derive(Clone, Copy, Debug)]
pub struct Lengths<'a> {
    /// f32 `[out_features]`, trained.
    pub magnitude: &'a Tensor,
    /// f32 `[out_features]`, from [`norms`].
    pub norms: &'a Tensor,
}

/// Layers with trained lengths of a backend.
pub trait Dora {
    /// f32 `[out_features]`.
    fn dora_norms(&self, spec: &NormSpec, weight: &Weight, lora_a: &Tensor, lora_b: &Tensor) -> Result<Tensor>;
    /// `y`, in a buffer of its own.
    fn dora_forward(&self, spec: &Spec, t: &Tensor, lengths: Lengths<'_>, bias: Option<&Tensor>) -> Result<Tensor>;
    /// `dt`, over `dy` where its buffer is unique; adds to `dmagnitude`.
    fn dora_backward(
        &self,
        spec: &Spec,
        dy: Tensor,
        t: &Tensor,
        lengths: Lengths<'_>,
        dmagnitude: Option<&mut Tensor>,
    ) -> Result<Tensor>;
}

/// Lengths of the rows of `W + scale * B A`, f32 `[out_features]`; `lora_a`: f32 `[rank, in_features]`, `lora_b`: f32
/// `[out_features, rank]`.
///
/// # Errors
/// Shape, dtype or device mismatch; [`crate::Error::InvalidSpec`] for rank 0.
pub fn norms(weight: &Weight, lora_a: &Tensor, lora_b: &Tensor, scale: f32) -> Result<Tensor> {
    check::rank(OP, "lora_a", lora_a, 2, "[rank, in_features]")?;
    let (rank, device) = (lora_a.shape()[0], weight.device());
    if rank == 0 {
        return check::invalid(OP, "rank", rank, "at least 1");
    }
    let (in_features, out_features) = (weight.in_features(), weight.out_features());
    check::tensor(OP, "lora_a", lora_a, (&[rank, in_features], DType::F32, device))?;
    check::tensor(OP, "lora_b", lora_b, (&[out_features, rank], DType::F32, device))?;
    let spec = NormSpec { in_features, out_features, weight_dtype: weight.dtype(), rank, scale };
    device.backend().dora_norms(&spec, weight, lora_a, lora_b)
}

fn spec(t: &Tensor, lengths: &Lengths<'_>) -> Result<Spec> {
    check::float(OP, "t", t.dtype())?;
    check::rank(OP, "t", t, 2, "[rows, out_features]")?;
    let (rows, out_features) = (t.shape()[0], t.shape()[1]);
    check::tensor(OP, "magnitude", lengths.magnitude, (&[out_features], DType::F32, t.device()))?;
    check::tensor(OP, "norms", lengths.norms, (&[out_features], DType::F32, t.device()))?;
    Ok(Spec { rows, out_features, dtype: t.dtype() })
}

/// `y = magnitude / norm * t + bias`, `t`: `[rows, out_features]`, `bias`: `[out_features]` of any float type.
///
/// # Errors
/// Shape, dtype or device mismatch.
pub fn forward(t: &Tensor, lengths: Lengths<'_>, bias: Option<&Tensor>) -> Result<Tensor> {
    let spec = spec(t, &lengths)?;
    if let Some(bias) = bias {
        check::float(OP, "bias", bias.dtype())?;
        check::tensor(OP, "bias", bias, (&[spec.out_features], bias.dtype(), t.device()))?;
    }
    t.device().backend().dora_forward(&spec, t, lengths, bias)
}

/// `dt`, written over `dy` where its buffer is unique; adds to `dmagnitude`, f32 `[out_features]`, if it is given.
///
/// # Errors
/// Shape, dtype or device mismatch; [`crate::Error::Shared`].
pub fn backward(dy: Tensor, t: &Tensor, lengths: Lengths<'_>, dmagnitude: Option<&mut Tensor>) -> Result<Tensor> {
    let spec = spec(t, &lengths)?;
    check::tensor(OP, "dy", &dy, (t.shape(), t.dtype(), t.device()))?;
    if let Some(dmagnitude) = &dmagnitude {
        check::tensor(OP, "dmagnitude", dmagnitude, (&[spec.out_features], DType::F32, t.device()))?;
    }
    let device = t.device().clone();
    device.backend().dora_backward(&spec, dy, t, lengths, dmagnitude)
}
