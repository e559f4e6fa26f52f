//! Output projection and cross entropy in one pass over chunks of tokens; `[tokens, vocab_size]` never exists.
//!
//! `logits = x W^T`, loss and `dlogits` as in [`super::cross_entropy`]; `dx = dlogits W`; `dweight += dlogits^T x`. Gradients
//! are made in the forward pass, while a chunk's logits are at hand: recomputing them costs half as much again.
//! Liger-Kernel (arXiv:2410.10989) and Cut Cross Entropy (arXiv:2411.09009) use the same idea.

use super::{
    check,
    cost::{Cost, given, stored},
    cross_entropy::LossSpec,
};
use crate::{DType, Result, Tensor, Weight};

/// What defines one loss over hidden states.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Rows of `x`.
    pub tokens: usize,
    /// Columns of `x`.
    pub hidden_size: usize,
    /// Rows of the matrix, at least 1.
    pub vocab_size: usize,
    /// The loss.
    pub loss: LossSpec,
    /// Whether `dx` is wanted.
    pub needs_dx: bool,
    /// Storage type of `x` and `dx`. Logits of a chunk are f32 before they are reduced.
    pub dtype: DType,
    /// Storage type of the matrix.
    pub weight_dtype: DType,
}

impl Spec {
    /// A product each for logits, dx and dweight; `x`, the matrix and targets in, `dx` out, `dweight` in and out. Every row counts
    /// as one with a target.
    pub fn cost(&self, needs_dweight: bool) -> Cost {
        let products = 1 + u64::from(self.needs_dx) + u64::from(needs_dweight);
        let (x, matrix) = (self.tokens * self.hidden_size, self.vocab_size * self.hidden_size);
        Cost::products(products, [self.tokens, self.hidden_size, self.vocab_size])
            + Cost::read(stored(x, self.dtype) + stored(self.tokens, DType::I32) + stored(matrix, self.weight_dtype))
            + Cost::written(given(self.needs_dx, stored(x, self.dtype)))
            + Cost::updated(given(needs_dweight, stored(matrix, DType::F32)))
    }
}

/// Results: the loss, and the gradient it already has.
#[derive(Debug)]
pub struct Forward {
    /// f32 `[1]`, not multiplied by the loss scale.
    pub loss: Tensor,
    /// `[tokens, hidden_size]`, multiplied by the loss scale; present if it was wanted.
    pub dx: Option<Tensor>,
}

/// Linear cross entropy of a backend.
pub trait LinearCrossEntropy {
    /// Loss and wanted gradients. `dweight`, f32 `[vocab_size, hidden_size]`, is added to (loss scale included).
    fn linear_cross_entropy(
        &self,
        spec: &Spec,
        x: &Tensor,
        weight: &Weight,
        targets: &Tensor,
        dweight: Option<&mut Tensor>,
    ) -> Result<Forward>;
}

/// Loss of `x W^T`, `x`: `[tokens, hidden_size]`, against targets i32 `[tokens]`, with the gradients that are wanted.
///
/// # Errors
/// Shape, dtype or device mismatch; a field of `loss` out of its range; a target outside the vocabulary;
/// [`crate::Error::Shared`] for a shared `dweight`.
pub fn forward(
    x: &Tensor,
    weight: &Weight,
    targets: &Tensor,
    loss: LossSpec,
    needs_dx: bool,
    dweight: Option<&mut Tensor>,
) -> Result<Forward> {
    const OP: &str = "linear_cross_entropy";
    check::float(OP, "x", x.dtype())?;
    check::in_features(OP, "x", x, weight)?;
    check::on(OP, "weight", weight.device(), x.device())?;
    let (tokens, hidden_size, vocab_size) = (x.shape()[0], x.shape()[1], weight.out_features());
    if vocab_size == 0 {
        return check::invalid(OP, "vocab_size", 0, "at least 1");
    }
    check::tensor(OP, "targets", targets, (&[tokens], DType::I32, x.device()))?;
    loss.validate(OP)?;
    if let Some(dweight) = &dweight {
        check::tensor(OP, "dweight", dweight, (&[vocab_size, hidden_size], DType::F32, x.device()))?;
    }
    let (dtype, weight_dtype) = (x.dtype(), weight.dtype());
    let spec = Spec { tokens, hidden_size, vocab_size, loss, needs_dx, dtype, weight_dtype };
    x.device().backend().linear_cross_entropy(&spec, x, weight, targets, dweight)
}
