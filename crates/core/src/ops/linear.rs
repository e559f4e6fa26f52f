//! Matrix product with a weight kept as `[out_features, in_features]`.
//! - `y = x W^T + bias`
//! - `dx = dy W`; `dweight += dy^T x`; `dbias += sum_rows(dy)`
//!
//! The weight's storage type may differ from the activations'; sums are f32, and the result is rounded once.

use super::{
    check,
    cost::{Cost, stored},
};
use crate::{DType, Result, Tensor, Weight};

/// What defines one product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Rows of `x` and `y`.
    pub rows: usize,
    /// Columns of `x`.
    pub in_features: usize,
    /// Columns of `y`.
    pub out_features: usize,
    /// Storage type of `x`, `y` and their gradients.
    pub dtype: DType,
    /// Storage type of the weight (and of the bias, which may differ from it).
    pub weight_dtype: DType,
}

impl Spec {
    /// `x` and the weight in, `y` out. A bias is left out.
    pub fn forward_cost(&self) -> Cost {
        let [x, y] = self.activations();
        self.product() + Cost::read(x + self.matrix(self.weight_dtype)) + Cost::written(y)
    }

    /// `dy` and the weight in, `dx` out.
    pub fn input_gradient_cost(&self) -> Cost {
        let [x, y] = self.activations();
        self.product() + Cost::read(y + self.matrix(self.weight_dtype)) + Cost::written(x)
    }

    /// `dy` and `x` in, `dweight` in and out.
    pub fn weight_gradient_cost(&self) -> Cost {
        let [x, y] = self.activations();
        self.product() + Cost::read(x + y) + Cost::updated(self.matrix(DType::F32))
    }

    /// `dy` in, `dbias` in and out.
    pub fn bias_gradient_cost(&self) -> Cost {
        Cost::read(self.activations()[1]) + Cost::updated(stored(self.out_features, DType::F32))
    }

    /// Bytes of a matrix as large as the weight.
    fn matrix(&self, dtype: DType) -> usize {
        stored(self.in_features * self.out_features, dtype)
    }

    fn product(&self) -> Cost {
        Cost::products(1, [self.rows, self.in_features, self.out_features])
    }

    /// Bytes of `x` and `y`.
    pub(super) fn activations(&self) -> [usize; 2] {
        [self.in_features, self.out_features].map(|columns| stored(self.rows * columns, self.dtype))
    }
}

/// Linear layers of a backend.
pub trait Linear {
    /// `y = x W^T + bias`: `[rows, out_features]`.
    fn linear_forward(&self, spec: &Spec, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor>;
    /// `dx = dy W`: `[rows, in_features]`.
    fn linear_input_gradient(&self, spec: &Spec, dy: &Tensor, weight: &Weight) -> Result<Tensor>;
    /// `dweight += dy^T x`, f32 `[out_features, in_features]`.
    fn linear_weight_gradient(&self, spec: &Spec, dy: &Tensor, x: &Tensor, dweight: &mut Tensor) -> Result<()>;
    /// `dbias += sum_rows(dy)`, f32 `[out_features]`.
    fn linear_bias_gradient(&self, spec: &Spec, dy: &Tensor, dbias: &mut Tensor) -> Result<()>;
}

/// `y = x W^T + bias`, `x`: `[rows, in_features]`, `bias`: `[out_features]` of any float type.
///
/// # Errors
/// Shape, dtype or device mismatch.
pub fn forward(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    check::float("linear", "x", x.dtype())?;
    check::in_features("linear", "x", x, weight)?;
    check::on("linear", "weight", weight.device(), x.device())?;
    if let Some(bias) = bias {
        check::float("linear", "bias", bias.dtype())?;
        check::tensor("linear", "bias", bias, (&[weight.out_features()], bias.dtype(), x.device()))?;
    }
    let (rows, in_features) = (x.shape()[0], x.shape()[1]);
    let (dtype, weight_dtype) = (x.dtype(), weight.dtype());
    let spec = Spec { rows, in_features, out_features: weight.out_features(), dtype, weight_dtype };
    x.device().backend().linear_forward(&spec, x, weight, bias)
}

/// `dx = dy W`, `dy`: `[rows, out_features]`.
///
/// # Errors
/// Shape, dtype or device mismatch.
pub fn input_gradient(dy: &Tensor, weight: &Weight) -> Result<Tensor> {
    check::float("linear", "dy", dy.dtype())?;
    check::rank("linear", "dy", dy, 2, "[rows, out_features]")?;
    let (rows, out_features) = (dy.shape()[0], weight.out_features());
    check::tensor("linear", "dy", dy, (&[rows, out_features], dy.dtype(), weight.device()))?;
    let (dtype, weight_dtype) = (dy.dtype(), weight.dtype());
    let spec = Spec { rows, in_features: weight.in_features(), out_features, dtype, weight_dtype };
    dy.device().backend().linear_input_gradient(&spec, dy, weight)
}

/// `dweight += dy^T x`, `dweight`: f32 `[out_features, in_features]`.
///
/// # Errors
/// Shape, dtype or device mismatch; [`crate::Error::Shared`].
pub fn weight_gradient(dy: &Tensor, x: &Tensor, dweight: &mut Tensor) -> Result<()> {
    check::float("linear", "dy", dy.dtype())?;
    check::rank("linear", "dy", dy, 2, "[rows, out_features]")?;
    check::rank("linear", "x", x, 2, "[rows, in_features]")?;
    let (rows, in_features, out_features) = (dy.shape()[0], x.shape()[1], dy.shape()[1]);
    check::tensor("linear", "x", x, (&[rows, in_features], dy.dtype(), dy.device()))?;
    check::tensor("linear", "dweight", dweight, (&[out_features, in_features], DType::F32, dy.device()))?;
    let spec = Spec { rows, in_features, out_features, dtype: dy.dtype(), weight_dtype: DType::F32 };
    dy.device().backend().linear_weight_gradient(&spec, dy, x, dweight)
}

/// `dbias += sum_rows(dy)`, `dbias`: f32 `[out_features]`.
///
/// # Errors
/// Shape, dtype or device mismatch; [`crate::Error::Shared`].
pub fn bias_gradient(dy: &Tensor, dbias: &mut Tensor) -> Result<()> {
    check::float("linear", "dy", dy.dtype())?;
    check::rank("linear", "dy", dy, 2, "[rows, out_features]")?;
    let (rows, out_features) = (dy.shape()[0], dy.shape()[1]);
    check::tensor("linear", "dbias", dbias, (&[out_features], DType::F32, dy.device()))?;
    let spec = Spec { rows, in_features: 0, out_features, dtype: dy.dtype(), weight_dtype: DType::F32 };
    dy.device().backend().linear_bias_gradient(&spec, dy, dbias)
}
