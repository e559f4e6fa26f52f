//! Reductions to one device scalar. Fixed order, so the same input gives the same bits.

use super::{check, cost::Cost};
use crate::{Result, Tensor};

/// Reductions of a backend; results are f32 `[1]`.
pub trait Reduce {
    /// Sum of all elements of a float tensor.
    fn sum(&self, x: &Tensor) -> Result<Tensor>;
    /// 1 if every element of every tensor is finite, else 0. `tensors` is not empty.
    fn all_finite(&self, tensors: &[&Tensor]) -> Result<Tensor>;
    /// Euclidean norm over all elements of all tensors, infinite or NaN if one of them is. `tensors` is not empty.
    fn grad_norm(&self, tensors: &[&Tensor]) -> Result<Tensor>;
}

/// Cost of a reduction: every element in.
pub fn cost(tensors: &[&Tensor]) -> Cost {
    Cost::of(tensors, &[])
}

fn list(op: &'static str, tensors: &[&Tensor]) -> Result<()> {
    let Some(first) = tensors.first() else {
        return check::invalid(op, "tensors", 0, "at least one tensor");
    };
    for tensor in tensors {
        check::float(op, "tensors", tensor.dtype())?;
        check::on(op, "tensors", tensor.device(), first.device())?;
    }
    Ok(())
}

/// Sum of all elements, f32 `[1]`; 0 for an empty tensor.
///
/// # Errors
/// [`crate::Error::DType`] for an integer tensor.
pub fn sum(x: &Tensor) -> Result<Tensor> {
    check::float("sum", "x", x.dtype())?;
    x.device().backend().sum(x)
}

/// f32 `[1]`: 1 if no element is infinite or NaN, else 0.
///
/// # Errors
/// [`crate::Error::InvalidSpec`] for an empty list; dtype or device mismatch.
pub fn all_finite(tensors: &[&Tensor]) -> Result<Tensor> {
    list("all_finite", tensors)?;
    tensors[0].device().backend().all_finite(tensors)
}

/// f32 `[1]`: `sqrt(sum of squares)` over all elements of all tensors. It is finite only if all of them are, so that whoever looks
/// at the norm need not look at the elements again.
///
/// # Errors
/// [`crate::Error::InvalidSpec`] for an empty list; dtype or device mismatch.
pub fn grad_norm(tensors: &[&Tensor]) -> Result<Tensor> {
    list("grad_norm", tensors)?;
    tensors[0].device().backend().grad_norm(tensors)
}
