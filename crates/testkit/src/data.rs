//! Seeded inputs, and tensors from and to f64.

use half::{bf16, f16};
use unsloth_core::{Category, DType, Device, Result, Shape, Tensor, rng::Philox};

use crate::arith::{round, to_odd};

/// A source of inputs: the same seed gives the same numbers in the same order.
#[derive(Clone, Debug)]
pub struct Data {
    stream: Philox,
    drawn: u32,
}

impl Data {
    /// A source of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self { stream: Philox::new(seed, 0), drawn: 0 }
    }

    fn next(&mut self) -> f64 {
        self.drawn += 1;
        f64::from(self.stream.uniform(0, 0, 0, self.drawn - 1))
    }

    /// Normally distributed numbers with standard deviation `scale`, rounded to `dtype` so that every device sees the same
    /// input as the oracle.
    pub fn normal(&mut self, count: usize, scale: f64, dtype: DType) -> Vec<f64> {
        let mut draw = || {
            // Box-Muller; 1 - u is above 0, so the logarithm is finite.
            let radius = (-2.0 * (1.0 - self.next()).ln()).sqrt();
            round(dtype, scale * radius * (std::f64::consts::TAU * self.next()).cos())
        };
        (0..count).map(|_| draw()).collect()
    }

    /// Uniform numbers in `low .. high`, rounded to `dtype`.
    pub fn uniform(&mut self, count: usize, range: std::ops::Range<f64>, dtype: DType) -> Vec<f64> {
        (0..count).map(|_| round(dtype, range.start + (range.end - range.start) * self.next())).collect()
    }

    /// Integers in `0 .. bound`; none for a bound of 0.
    pub fn integers(&mut self, count: usize, bound: usize) -> Vec<i32> {
        (0..count).map(|_| ((self.next() * bound as f64) as i32).min(bound as i32 - 1)).collect()
    }
}

/// A device tensor of any float type; values are rounded to it.
///
/// # Errors
/// Those of [`Device::from_slice`]; [`unsloth_core::Error::DType`] for an integer type.
pub fn tensor(device: &Device, values: &[f64], shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let category = Category::Activations;
    match dtype {
        DType::F32 => device.from_slice(&values.iter().map(|&v| v as f32).collect::<Vec<_>>(), shape, category),
        DType::F16 => {
            device.from_slice(&values.iter().map(|&v| f16::from_f32(to_odd(v))).collect::<Vec<_>>(), shape, category)
        }
        DType::BF16 => {
            device.from_slice(&values.iter().map(|&v| bf16::from_f32(to_odd(v))).collect::<Vec<_>>(), shape, category)
        }
        actual => Err(unsloth_core::Error::DType {
            op: "testkit::tensor",
            arg: "dtype",
            expected: "a float type".into(),
            actual,
        }),
    }
}

/// An i32 device tensor of one dimension: ids, targets, positions.
///
/// # Errors
/// Those of [`Device::from_slice`].
pub fn integers(device: &Device, values: &[i32]) -> Result<Tensor> {
    device.from_slice(values, [values.len()], Category::Activations)
}

/// The elements of a float tensor.
///
/// # Errors
/// Those of [`Tensor::to_f32_vec`].
pub fn read(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_f32_vec()?.into_iter().map(f64::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_are_normal_and_rounded() {
        let values = Data::new(3).normal(20_000, 2.0, DType::BF16);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.05, "mean {mean}");
        assert!((variance - 4.0).abs() < 0.2, "variance {variance}");
        assert!(values.iter().all(|&v| round(DType::BF16, v) == v));
    }

    #[test]
    fn integers_stay_in_range() {
        let values = Data::new(4).integers(1000, 7);
        assert!((0..7).all(|i| values.contains(&i)));
        assert!(values.iter().all(|v| (0..7).contains(v)));
    }
}
