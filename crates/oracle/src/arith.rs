//! The arithmetic that a reference is computed in.

use half::{bf16, f16};
use unsloth_core::DType;

/// How a reference rounds. One reference function serves as oracle and as naive form, so that they cannot drift apart.
pub trait Arith {
    /// A value as a tensor of activations keeps it.
    fn store(&self, value: f64) -> f64;
    /// A value as f32 keeps it: statistics (rstd, LSE, norms), losses, parameter gradients, optimiser state.
    fn stat(&self, value: f64) -> f64;
    /// Sum of terms, in order.
    fn sum(&self, terms: impl IntoIterator<Item = f64>) -> f64;
    /// A value as a tensor of `dtype` keeps it, for tensors whose type is not that of the activations.
    fn store_as(&self, dtype: DType, value: f64) -> f64;
}

/// Real arithmetic as far as f64 goes: the oracle.
#[derive(Clone, Copy, Debug)]
pub struct Exact;

impl Arith for Exact {
    fn store(&self, value: f64) -> f64 {
        value
    }

    fn stat(&self, value: f64) -> f64 {
        value
    }

    fn sum(&self, terms: impl IntoIterator<Item = f64>) -> f64 {
        terms.into_iter().sum()
    }

    fn store_as(&self, _dtype: DType, value: f64) -> f64 {
        value
    }
}

/// The unfused formula: every tensor rounded to its storage type, statistics in f32, sums one after another in f32.
#[derive(Clone, Copy, Debug)]
pub struct Rounded(pub DType);

impl Arith for Rounded {
    fn store(&self, value: f64) -> f64 {
        round(self.0, value)
    }

    fn stat(&self, value: f64) -> f64 {
        round(DType::F32, value)
    }

    fn sum(&self, terms: impl IntoIterator<Item = f64>) -> f64 {
        f64::from(terms.into_iter().fold(0.0f32, |total, term| total + term as f32))
    }

    fn store_as(&self, dtype: DType, value: f64) -> f64 {
        round(dtype, value)
    }
}

/// The nearest value of a float type, ties to even.
///
/// # Panics
/// For an integer type.
pub fn round(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(value as f32),
        DType::F16 => f16::from_f32(to_odd(value)).to_f64(),
        DType::BF16 => bf16::from_f32(to_odd(value)).to_f64(),
        other => panic!("rounding is for float types, not {other}"),
    }
}

/// An f32 that rounds to the same half-precision value as `value` does: an inexact one is cut off and its last bit set, so that
/// it cannot be taken for a tie. (`half` converts f64 by its upper 32 bits alone, which loses such bits.)
pub fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || !nearest.is_finite() {
        return nearest;
    }
    let bits = nearest.to_bits();
    let cut = if f64::from(nearest).abs() > value.abs() { bits - 1 } else { bits };
    f32::from_bits(cut | 1)
}

/// Largest relative error of rounding to a float type: half a unit in the last place.
///
/// # Panics
/// For an integer type.
pub fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        other => panic!("rounding is for float types, not {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even() {
        // Between 1 and 1 + 2^-7 a tie goes to the even mantissa, which is 1.
        assert_eq!(round(DType::BF16, 1.0 + 2f64.powi(-8)), 1.0);
        assert_eq!(round(DType::BF16, 1.0 + 3.0 * 2f64.powi(-8)), 1.0 + 2f64.powi(-6));
        assert_eq!(round(DType::F16, 1.0 + 2f64.powi(-11)), 1.0);
        // Next to a tie, by the last bit of f32 and of f64.
        assert_eq!(round(DType::BF16, 1.0 + 2f64.powi(-8) + 2f64.powi(-23)), 1.0 + 2f64.powi(-7));
        assert_eq!(round(DType::BF16, 1.0 + 2f64.powi(-8) + 2f64.powi(-52)), 1.0 + 2f64.powi(-7));
        assert_eq!(round(DType::BF16, 1.0 + 2f64.powi(-8) - 2f64.powi(-52)), 1.0);
        assert_eq!(round(DType::F16, 1.0 + 3.0 * 2f64.powi(-11) - 2f64.powi(-52)), 1.0 + 2f64.powi(-10));
        assert_eq!(round(DType::F32, 1.0 + 2f64.powi(-24)), 1.0);
    }

    #[test]
    fn sums_round_in_f32() {
        // 2^24 + 1 is not an f32: a sum in f32 loses each of the ones, a sum in f64 keeps them.
        let terms = [2f64.powi(24), 1.0, 1.0];
        assert_eq!(Rounded(DType::BF16).sum(terms), 2f64.powi(24));
        assert_eq!(Exact.sum(terms), 2f64.powi(24) + 2.0);
    }
}
