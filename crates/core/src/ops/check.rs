//! Argument checks shared by the operators.

use super::adamw::StepState;
use crate::{DType, Device, Error, Result, Tensor, Weight};

pub(super) fn shape(op: &'static str, arg: &'static str, tensor: &Tensor, expected: &[usize]) -> Result<()> {
    if **tensor.shape() == *expected {
        return Ok(());
    }
    Err(Error::Shape { op, arg, expected: format!("{expected:?}"), actual: *tensor.shape() })
}

/// `names` describes the dimensions for the message, as in `[rows, hidden_size]`.
pub(super) fn rank(op: &'static str, arg: &'static str, tensor: &Tensor, rank: usize, names: &str) -> Result<()> {
    if tensor.shape().len() == rank {
        return Ok(());
    }
    Err(Error::Shape { op, arg, expected: names.to_owned(), actual: *tensor.shape() })
}

pub(super) fn dtype(op: &'static str, arg: &'static str, tensor: &Tensor, expected: DType) -> Result<()> {
    if tensor.dtype() == expected {
        return Ok(());
    }
    Err(Error::DType { op, arg, expected: expected.to_string(), actual: tensor.dtype() })
}

pub(super) fn float(op: &'static str, arg: &'static str, dtype: DType) -> Result<()> {
    if dtype.is_float() {
        return Ok(());
    }
    Err(Error::DType { op, arg, expected: "a float type".into(), actual: dtype })
}

pub(super) fn on(op: &'static str, arg: &'static str, device: &Device, expected: &Device) -> Result<()> {
    if device == expected {
        return Ok(());
    }
    Err(Error::Device { op, arg, expected: expected.name(), actual: device.name() })
}

/// Shape, dtype and device at once.
pub(super) fn tensor(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    (expected_shape, expected_dtype, device): (&[usize], DType, &Device),
) -> Result<()> {
    shape(op, arg, tensor, expected_shape)?;
    dtype(op, arg, tensor, expected_dtype)?;
    on(op, arg, tensor.device(), device)
}

pub(super) fn in_features(op: &'static str, arg: &'static str, x: &Tensor, weight: &Weight) -> Result<()> {
    if x.shape().len() == 2 && x.shape()[1] == weight.in_features() {
        return Ok(());
    }
    Err(Error::Shape { op, arg, expected: format!("[rows, {}]", weight.in_features()), actual: *x.shape() })
}

pub(super) fn invalid<T>(
    op: &'static str,
    field: &'static str,
    value: impl std::fmt::Display,
    rule: &'static str,
) -> Result<T> {
    Err(Error::InvalidSpec { op, field, value: value.to_string(), rule })
}

pub(super) fn positive(op: &'static str, field: &'static str, value: f32) -> Result<()> {
    if value > 0.0 && value.is_finite() { Ok(()) } else { invalid(op, field, value, "positive and finite") }
}

pub(super) fn not_negative(op: &'static str, field: &'static str, value: f32) -> Result<()> {
    if value >= 0.0 && value.is_finite() { Ok(()) } else { invalid(op, field, value, "0 or more") }
}

/// In `[0, 1)`.
pub(super) fn share(op: &'static str, field: &'static str, value: f32) -> Result<()> {
    if (0.0..1.0).contains(&value) { Ok(()) } else { invalid(op, field, value, "in [0, 1)") }
}

/// What every optimiser is given: a parameter of any float type, its gradient in f32, and the state of a step.
pub(super) fn update(op: &'static str, (param, grad): (&Tensor, &Tensor), state: &StepState) -> Result<()> {
    float(op, "param", param.dtype())?;
    dtype(op, "grad", grad, DType::F32)?;
    tensor(op, "param", param, (grad.shape(), param.dtype(), grad.device()))?;
    on(op, "state", state.tensor().device(), grad.device())
}
