//! Properties that are not error budgets: the same bits, and typed errors.

use unsloth_core::{DType, Error, Tensor};

use crate::report::{Case, Checked};

/// Both tensors have the same type, shape and bits.
///
/// # Errors
/// A failure that names the first element that differs.
pub fn same_bits(case: &Case, tensor: &str, a: &Tensor, b: &Tensor) -> Checked {
    if a.dtype() != b.dtype() || a.shape() != b.shape() {
        return Err(case.hazard(format!("`{tensor}` is {a:?} and {b:?}")));
    }
    // Widening to f32 keeps the bits apart, so bits can be compared after it.
    let bits = |t: &Tensor| -> Checked<Vec<u32>> {
        Ok(match t.dtype() {
            DType::I32 => t.to_vec::<i32>()?.into_iter().map(|v| v as u32).collect(),
            _ => t.to_f32_vec()?.into_iter().map(f32::to_bits).collect(),
        })
    };
    let (a, b) = (bits(a).map_err(|e| e.within(case))?, bits(b).map_err(|e| e.within(case))?);
    match a.iter().zip(&b).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(index) => {
            let (a, b) = (f32::from_bits(a[index]), f32::from_bits(b[index]));
            Err(case.hazard(format!("`{tensor}`[{index}] is {a:e} and {b:e}, not the same bits")))
        }
    }
}

/// The tensor has this shape and type.
///
/// # Errors
/// A failure with both if it does not.
pub fn form(case: &Case, name: &str, tensor: &Tensor, (shape, dtype): (&[usize], DType)) -> Checked {
    let what = format!("`{name}` is {tensor:?}, expected {dtype} {shape:?}");
    holds(case, &what, **tensor.shape() == *shape && tensor.dtype() == dtype)
}

/// A property holds.
///
/// # Errors
/// A failure with `what` if it does not.
pub fn holds(case: &Case, what: &str, condition: bool) -> Checked {
    if condition { Ok(()) } else { Err(case.hazard(what)) }
}

/// A typed error that a call has to return.
#[derive(Clone, Copy, Debug)]
pub enum Rejects {
    /// [`Error::Shape`] of this argument.
    Shape(&'static str),
    /// [`Error::DType`] of this argument.
    DType(&'static str),
    /// [`Error::Device`] of this argument.
    Device(&'static str),
    /// [`Error::InvalidSpec`] of this field.
    Spec(&'static str),
    /// [`Error::Shared`] of this argument.
    Shared(&'static str),
}

/// The call was refused with the right error.
///
/// # Errors
/// A failure if the call succeeded or returned another error.
pub fn rejects<T>(case: &Case, expected: Rejects, result: unsloth_core::Result<T>) -> Checked {
    let Err(error) = result else {
        return Err(case.hazard(format!("accepted a call that has to fail with {expected:?}")));
    };
    let right = match (&error, expected) {
        (Error::Shape { arg, .. }, Rejects::Shape(name))
        | (Error::DType { arg, .. }, Rejects::DType(name))
        | (Error::Device { arg, .. }, Rejects::Device(name))
        | (Error::Shared { arg, .. }, Rejects::Shared(name)) => *arg == name,
        (Error::InvalidSpec { field, .. }, Rejects::Spec(name)) => *field == name,
        _ => false,
    };
    holds(case, &format!("rejects with \"{error}\", expected {expected:?}"), right)
}
