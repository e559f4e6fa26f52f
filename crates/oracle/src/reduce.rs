//! Reference of [`unsloth_core::ops::reduce`].

use crate::arith::Arith;

/// Sum of all elements.
pub fn sum<A: Arith>(arith: &A, x: &[f64]) -> f64 {
    arith.stat(arith.sum(x.iter().copied()))
}

/// Euclidean norm over all elements of all tensors.
pub fn grad_norm<A: Arith>(arith: &A, tensors: &[Vec<f64>]) -> f64 {
    arith.stat(arith.sum(tensors.iter().flatten().map(|x| x * x)).sqrt())
}
