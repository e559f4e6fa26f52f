//! How far a result may be from the oracle.
//!
//! `max|actual - exact| <= 2 * max|naive - exact| + floor`. The naive form rounds every tensor of the unfused formula, so a
//! fused operator that keeps intermediates in f32 is usually better than it; the factor 2 admits another order of summation.

use unsloth_core::{DType, Tensor};

use crate::{
    arith::unit_roundoff,
    data,
    report::{Case, Checked, Failure, FailureKind},
};

/// What is added to the budget, because the naive form can be exact by luck where a correct device is not.
#[derive(Clone, Copy, Debug)]
pub enum Floor {
    /// One rounding of the largest element to the storage type, and [`Floor::F32_STEPS`] roundings in f32: a device may
    /// evaluate `exp`, `tanh` or `rsqrt` with an error of a few units, and sum in another order.
    Stored(DType),
    /// [`Floor::F32_STEPS`] roundings in f32 of the sum of the terms' magnitudes: terms that cancel leave a result
    /// much smaller than the roundings on the way to it.
    Cancelling {
        /// Storage type of the result.
        dtype: DType,
        /// Largest sum of magnitudes of the terms of an element.
        magnitude: f64,
    },
    /// Nothing: the result is a copy or one correctly rounded operation, as the naive form is.
    Exact,
}

impl Floor {
    /// Roundings in f32 that any device may make over the shortest formula.
    pub const F32_STEPS: f64 = 8.0;

    fn value(self, largest: f64) -> f64 {
        let f32_steps = Self::F32_STEPS * unit_roundoff(DType::F32);
        match self {
            Floor::Stored(dtype) => (unit_roundoff(dtype) + f32_steps) * largest + smallest(dtype),
            Floor::Cancelling { dtype, magnitude } => {
                unit_roundoff(dtype) * largest + f32_steps * magnitude + smallest(dtype)
            }
            Floor::Exact => 0.0,
        }
    }
}

/// Below this a device may flush to zero: the smallest normal f32, and for f16 its smallest subnormal, since f16 subnormals
/// are ordinary f32 values until the last rounding.
fn smallest(dtype: DType) -> f64 {
    if dtype == DType::F16 { 2f64.powi(-24) } else { f64::from(f32::MIN_POSITIVE) }
}

/// What a tensor has to be.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// From the oracle in [`crate::arith::Exact`]. Finite, or -inf where the operator defines it so (LSE of a masked row).
    pub exact: &'a [f64],
    /// From the oracle in [`crate::arith::Rounded`].
    pub naive: &'a [f64],
    /// Row of the floor table.
    pub floor: Floor,
}

/// Holds a tensor to its budget.
///
/// # Errors
/// A failure that names the worst element: its error is above the limit, or it is NaN or infinite where the oracle is not.
pub fn check(case: &Case, tensor: &str, actual: &[f64], expected: Expected<'_>) -> Checked {
    let Expected { exact, naive, floor } = expected;
    if actual.len() != exact.len() || naive.len() != exact.len() {
        let lengths = format!("{} elements, oracle {}, naive {}", actual.len(), exact.len(), naive.len());
        return Err(case.hazard(format!("`{tensor}` has {lengths}")));
    }
    let (mut naive_error, mut largest) = (0.0f64, 0.0f64);
    for (index, (&e, &n)) in exact.iter().zip(naive).enumerate() {
        if e == f64::NEG_INFINITY && n == e {
            continue;
        }
        if !e.is_finite() || !n.is_finite() {
            return Err(case.hazard(format!("the reference of `{tensor}`[{index}] is {e}, naive {n}: not a test")));
        }
        naive_error = naive_error.max((n - e).abs());
        largest = largest.max(e.abs());
    }
    let limit = 2.0 * naive_error + floor.value(largest);
    let mut worst: Option<(usize, f64)> = None;
    for (index, (&a, &e)) in actual.iter().zip(exact).enumerate() {
        let error = if a == e { 0.0 } else { (a - e).abs() };
        // NaN compares false with everything, so the condition says when an element is good.
        let good = error <= limit;
        if !good && worst.is_none_or(|(_, most)| error > most || error.is_nan()) {
            worst = Some((index, error));
        }
    }
    match worst {
        None => Ok(()),
        Some((index, error)) => {
            let (actual, exact) = (actual[index], exact[index]);
            let tensor = tensor.to_owned();
            Err(case.failure(FailureKind::Budget { tensor, index, actual, exact, error, limit }))
        }
    }
}

/// [`check`] of a device tensor.
///
/// # Errors
/// As [`check`], or the tensor cannot be read.
pub fn check_tensor(case: &Case, name: &str, tensor: &Tensor, expected: Expected<'_>) -> Checked {
    let actual = data::read(tensor).map_err(|error| Failure::from(error).within(case))?;
    check(case, name, &actual, expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(actual: &[f64], exact: &[f64], naive: &[f64]) -> bool {
        let case = Case::detached("budget");
        check(&case, "out", actual, Expected { exact, naive, floor: Floor::Exact }).is_ok()
    }

    #[test]
    fn admits_twice_the_naive_error() {
        assert!(verdict(&[1.2], &[1.0], &[1.1]));
        assert!(!verdict(&[1.3], &[1.0], &[1.1]));
    }

    #[test]
    fn refuses_what_is_not_a_number() {
        assert!(!verdict(&[f64::NAN], &[1.0], &[1.1]));
        assert!(!verdict(&[1.0, f64::INFINITY], &[1.0, 1.0], &[1.1, 1.0]));
        assert!(!verdict(&[f64::NAN], &[f64::NAN], &[f64::NAN]));
        assert!(!verdict(&[1.0], &[1.0], &[f64::INFINITY]), "an infinite limit admits everything");
    }

    #[test]
    fn minus_infinity_has_to_match() {
        let masked = f64::NEG_INFINITY;
        assert!(verdict(&[masked, 1.0], &[masked, 1.0], &[masked, 1.0]));
        assert!(!verdict(&[-1e30, 1.0], &[masked, 1.0], &[masked, 1.0]));
        assert!(!verdict(&[masked, 1.0], &[0.0, 1.0], &[0.0, 1.0]));
    }

    #[test]
    fn refuses_another_length() {
        assert!(!verdict(&[1.0], &[1.0, 1.0], &[1.0, 1.0]));
    }
}
