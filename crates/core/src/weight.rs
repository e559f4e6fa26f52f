//! The matrix of a linear layer.

use crate::{DType, Device, Error, Result, Tensor};

/// A matrix `[out_features, in_features]` in the one form it is kept in; every use (forward, input gradient, embedding rows,
/// a tied head) reads this copy.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Weight {
    /// Elements as loaded or memory-mapped, `[out_features, in_features]`.
    Dense(Tensor),
}

impl Weight {
    /// # Errors
    /// [`Error::Shape`] unless `dense` has two dimensions.
    pub(crate) fn dense(dense: Tensor) -> Result<Self> {
        if dense.shape().len() != 2 {
            let expected = "[out_features, in_features]".to_owned();
            return Err(Error::Shape { op: "weight", arg: "dense", expected, actual: *dense.shape() });
        }
        Ok(Weight::Dense(dense))
    }

    /// Rows of the matrix: outputs of the layer, or entries of an embedding table.
    pub fn out_features(&self) -> usize {
        match self {
            Weight::Dense(tensor) => tensor.shape()[0],
        }
    }

    /// Columns of the matrix: inputs of the layer, or the width of an embedding.
    pub fn in_features(&self) -> usize {
        match self {
            Weight::Dense(tensor) => tensor.shape()[1],
        }
    }

    /// Storage type of the elements, or of what they dequantise to.
    pub fn dtype(&self) -> DType {
        match self {
            Weight::Dense(tensor) => tensor.dtype(),
        }
    }

    /// Where the matrix lives.
    pub fn device(&self) -> &Device {
        match self {
            Weight::Dense(tensor) => tensor.device(),
        }
    }

    /// The matrix as a dense tensor; shares the buffer where it is dense already.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if a quantised matrix has to be expanded.
    pub fn to_dense(&self) -> Result<Tensor> {
        match self {
            Weight::Dense(tensor) => Ok(tensor.clone()),
        }
    }
}
