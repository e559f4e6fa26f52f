//! Rows of a table picked by token id.
//! - `out[t] = weight[ids[t]]`
//! - `dweight[ids[t]] += dout[t]`, in the order of `t`

use super::{
    check,
    cost::{Cost, stored},
};
use crate::{DType, Result, Tensor, Weight};

/// What defines one lookup.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Number of ids.
    pub tokens: usize,
    /// Rows of the table.
    pub vocab_size: usize,
    /// Columns of the table.
    pub hidden_size: usize,
    /// Storage type of the table.
    pub weight_dtype: DType,
    /// Storage type of `out`; differs from the table's under mixed precision.
    pub dtype: DType,
}

impl Spec {
    /// Ids and their rows in, `out` out.
    pub fn forward_cost(&self) -> Cost {
        self.cost(&[self.weight_dtype], self.dtype)
    }

    /// Ids and `dout` in, their rows of `dweight` in and out; a row once per token.
    pub fn backward_cost(&self) -> Cost {
        self.cost(&[self.dtype, DType::F32], DType::F32)
    }

    /// Ids and a row of each of these types in, one out, for every token.
    fn cost(&self, read: &[DType], written: DType) -> Cost {
        let row = |dtype: DType| stored(self.tokens * self.hidden_size, dtype);
        let read: usize = read.iter().map(|&dtype| row(dtype)).sum();
        Cost::read(stored(self.tokens, DType::I32) + read) + Cost::written(row(written))
    }
}

/// Embedding lookup of a backend.
pub trait Embedding {
    /// `out`: `[tokens, hidden_size]` of `spec.dtype`.
    ///
    /// # Errors
    /// [`crate::Error::InvalidSpec`] for an id outside the table, on devices whose host can see the ids; other devices
    /// give a row of zeros. No device reads outside the table.
    fn embedding_forward(&self, spec: &Spec, weight: &Weight, ids: &Tensor) -> Result<Tensor>;
    /// Adds to `dweight`, f32 `[vocab_size, hidden_size]`.
    fn embedding_backward(&self, spec: &Spec, ids: &Tensor, dout: &Tensor, dweight: &mut Tensor) -> Result<()>;
}

/// Picks rows: `[tokens, hidden_size]` of `dtype` from ids i32 `[tokens]`.
///
/// # Errors
/// Shape, dtype or device mismatch; an id outside the table (see [`Embedding::embedding_forward`]).
pub fn forward(weight: &Weight, ids: &Tensor, dtype: DType) -> Result<Tensor> {
    check::float("embedding", "dtype", dtype)?;
    check::rank("embedding", "ids", ids, 1, "[tokens]")?;
    check::dtype("embedding", "ids", ids, DType::I32)?;
    check::on("embedding", "weight", weight.device(), ids.device())?;
    let (vocab_size, hidden_size) = (weight.out_features(), weight.in_features());
    let spec = Spec { tokens: ids.shape()[0], vocab_size, hidden_size, weight_dtype: weight.dtype(), dtype };
    ids.device().backend().embedding_forward(&spec, weight, ids)
}

/// Adds the gradient of the table to `dweight`, f32 `[vocab_size, hidden_size]`.
///
/// # Errors
/// Shape, dtype or device mismatch.
pub fn backward(ids: &Tensor, dout: &Tensor, dweight: &mut Tensor) -> Result<()> {
    check::rank("embedding", "ids", ids, 1, "[tokens]")?;
    check::dtype("embedding", "ids", ids, DType::I32)?;
    check::rank("embedding", "dweight", dweight, 2, "[vocab_size, hidden_size]")?;
    check::dtype("embedding", "dweight", dweight, DType::F32)?;
    check::float("embedding", "dout", dout.dtype())?;
    let (vocab_size, hidden_size) = (dweight.shape()[0], dweight.shape()[1]);
    check::tensor("embedding", "dout", dout, (&[ids.shape()[0], hidden_size], dout.dtype(), ids.device()))?;
    check::on("embedding", "dweight", dweight.device(), ids.device())?;
    let spec = Spec { tokens: ids.shape()[0], vocab_size, hidden_size, weight_dtype: DType::F32, dtype: dout.dtype() };
    ids.device().backend().embedding_backward(&spec, ids, dout, dweight)
}
