//! Reference of [`unsloth_core::ops::elementwise`].

use crate::arith::Arith;

/// `a + b`
pub fn add<A: Arith>(arith: &A, a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| arith.store(a + b)).collect()
}

/// `a * b`
pub fn mul<A: Arith>(arith: &A, a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| arith.store(a * b)).collect()
}

/// `x * factor`
pub fn scale<A: Arith>(arith: &A, x: &[f64], factor: f64) -> Vec<f64> {
    x.iter().map(|x| arith.store(x * factor)).collect()
}

/// `accumulator + x`, kept in f32
pub fn accumulate<A: Arith>(arith: &A, accumulator: &[f64], x: &[f64]) -> Vec<f64> {
    accumulator.iter().zip(x).map(|(accumulator, x)| arith.stat(accumulator + x)).collect()
}
