//! Elementwise operators without parameters, casts and copies.

use super::{
    check,
    cost::{Cost, stored},
};
use crate::{DType, Result, Tensor};

/// Elementwise operators of a backend. Arithmetic is f32, results are rounded once to the storage type.
pub trait Elementwise {
    /// `a + b`, reusing `a`.
    fn add(&self, a: Tensor, b: &Tensor) -> Result<Tensor>;
    /// `a * b`, reusing `a`.
    fn mul(&self, a: Tensor, b: &Tensor) -> Result<Tensor>;
    /// `x * factor`, reusing `x`.
    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor>;
    /// `x * scalar[0]` with a device scalar, reusing `x`.
    fn scale_by(&self, x: Tensor, scalar: &Tensor) -> Result<Tensor>;
    /// `accumulator += x`, `accumulator` in f32.
    fn accumulate(&self, accumulator: &mut Tensor, x: &Tensor) -> Result<()>;
    /// The same values in another storage type, rounded to nearest even; the category is kept.
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor>;
    /// A copy in a buffer of its own; the category is kept.
    fn copy(&self, x: &Tensor) -> Result<Tensor>;
    /// Sets every element to zero.
    fn fill_zero(&self, x: &mut Tensor) -> Result<()>;
}

/// Cost of [`add`] and [`mul`]: two operands in, one out.
pub fn binary_cost(a: &Tensor) -> Cost {
    Cost::of(&[a, a], &[a])
}

/// Cost of [`scale`], [`scale_by`] and [`copy`]: one in, one out.
pub fn unary_cost(x: &Tensor) -> Cost {
    Cost::of(&[x], &[x])
}

/// Cost of [`accumulate`]: `x` in, the accumulator in and out.
pub fn accumulate_cost(accumulator: &Tensor, x: &Tensor) -> Cost {
    Cost::of(&[x, accumulator], &[accumulator])
}

/// Cost of [`cast`]: one type in, the other out.
pub fn cast_cost(x: &Tensor, dtype: DType) -> Cost {
    Cost::read(x.bytes()) + Cost::written(stored(x.num_elements(), dtype))
}

/// Cost of [`fill_zero`]: one out.
pub fn fill_cost(x: &Tensor) -> Cost {
    Cost::of(&[], &[x])
}

fn pair(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    check::float(op, "a", a.dtype())?;
    check::tensor(op, "b", b, (a.shape(), a.dtype(), a.device()))
}

/// `a + b` of one shape and type; `a` is reused when unique.
///
/// # Errors
/// Shape, dtype or device mismatch.
pub fn add(a: Tensor, b: &Tensor) -> Result<Tensor> {
    pair("add", &a, b)?;
    let device = a.device().clone();
    device.backend().add(a, b)
}

/// `a * b` of one shape and type; `a` is reused when unique.
///
/// # Errors
/// Shape, dtype or device mismatch.
pub fn mul(a: Tensor, b: &Tensor) -> Result<Tensor> {
    pair("mul", &a, b)?;
    let device = a.device().clone();
    device.backend().mul(a, b)
}

/// `x * factor`; `x` is reused when unique.
///
/// # Errors
/// [`crate::Error::DType`] for an integer tensor.
pub fn scale(x: Tensor, factor: f32) -> Result<Tensor> {
    check::float("scale", "x", x.dtype())?;
    let device = x.device().clone();
    device.backend().scale(x, factor)
}

/// `x * scalar[0]`, where `scalar` is f32 `[1]` on the device; `x` is reused when unique.
///
/// # Errors
/// Shape, dtype or device mismatch.
pub fn scale_by(x: Tensor, scalar: &Tensor) -> Result<Tensor> {
    check::float("scale_by", "x", x.dtype())?;
    check::tensor("scale_by", "scalar", scalar, (&[1], DType::F32, x.device()))?;
    let device = x.device().clone();
    device.backend().scale_by(x, scalar)
}

/// `accumulator += x`, where `accumulator` is f32 and `x` any float type of the same shape.
///
/// # Errors
/// Shape, dtype or device mismatch; [`crate::Error::Shared`].
pub fn accumulate(accumulator: &mut Tensor, x: &Tensor) -> Result<()> {
    check::float("accumulate", "x", x.dtype())?;
    check::tensor("accumulate", "accumulator", accumulator, (x.shape(), DType::F32, x.device()))?;
    let device = x.device().clone();
    device.backend().accumulate(accumulator, x)
}

/// The same values in another float type, rounded to nearest even. A cast to the same type shares the buffer.
///
/// # Errors
/// [`crate::Error::DType`] for integers; [`crate::Error::UnsupportedDType`].
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    check::float("cast", "x", x.dtype())?;
    check::float("cast", "dtype", dtype)?;
    if x.dtype() == dtype { Ok(x.clone()) } else { x.device().backend().cast(x, dtype) }
}

/// A copy in a buffer of its own.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub fn copy(x: &Tensor) -> Result<Tensor> {
    x.device().backend().copy(x)
}

/// Sets every element to zero in place.
///
/// # Errors
/// [`crate::Error::Shared`] if another tensor shares the buffer.
pub fn fill_zero(x: &mut Tensor) -> Result<()> {
    let device = x.device().clone();
    device.backend().fill_zero(x)
}
