//! Reductions: a partial result for each block of fixed size, combined in the order of the blocks.

use unsloth_core::{FloatElement, Result, Tensor, ops::reduce::Reduce};

use crate::{
    CpuBackend,
    access::{dispatch_float, read},
    elementwise::scalar,
    simd::{self, BLOCK, TASK, vectorised, widened},
};

impl CpuBackend {
    /// `f` of each block, summed in f64 in the order of the blocks.
    fn sum_blocks<T: FloatElement>(&self, x: &[T], f: impl Fn(&[f32]) -> f64 + Sync) -> f64 {
        let task = |part: &[T]| {
            let blocks = part.chunks(BLOCK).map(|block| f(widened(block, &mut [0.0; BLOCK])));
            blocks.sum::<f64>()
        };
        if x.len() <= TASK {
            return task(x);
        }
        let partial: Vec<f64> = self.map_parts(x.chunks(TASK), task);
        partial.into_iter().sum()
    }
}

/// Squares in f64: in f32 they overflow from 1.8e19 on, and vanish below 1e-23.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut partial = [0.0f64; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut padded = [0.0; LANES];
    padded[..tail.len()].copy_from_slice(tail);
    for chunk in chunks.iter().chain([&padded]) {
        for (sum, x) in partial.iter_mut().zip(chunk) {
            *sum += f64::from(*x) * f64::from(*x);
        }
    }
    partial.into_iter().sum()
}

/// True if no element is infinite or NaN.
#[inline(always)]
fn is_finite(x: &[f32]) -> bool {
    // A maximum, not `all`: an early exit would keep the loop from being vectorised.
    x.iter().fold(0, |largest, x| u32::max(largest, x.to_bits() & 0x7FFF_FFFF)) < 0x7F80_0000
}

impl Reduce for CpuBackend {
    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        let sum_of = |block: &[f32]| {
            f64::from(vectorised(
                #[inline(always)]
                || simd::sum(block),
            ))
        };
        let sum = dispatch_float!(x.dtype(), T => self.sum_blocks(read::<T>(x), sum_of));
        scalar(x, sum as f32)
    }

    fn all_finite(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        let bad_blocks = |block: &[f32]| {
            f64::from(u8::from(!vectorised(
                #[inline(always)]
                || is_finite(block),
            )))
        };
        let all =
            tensors.iter().all(|x| dispatch_float!(x.dtype(), T => self.sum_blocks(read::<T>(x), bad_blocks)) == 0.0);
        scalar(tensors[0], f32::from(u8::from(all)))
    }

    fn grad_norm(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        let squares = |block: &[f32]| {
            vectorised(
                #[inline(always)]
                || sum_of_squares(block),
            )
        };
        let total: f64 =
            tensors.iter().map(|x| dispatch_float!(x.dtype(), T => self.sum_blocks(read::<T>(x), squares))).sum();
        scalar(tensors[0], total.sqrt() as f32)
    }
}

#[cfg(test)]
mod tests {
    use unsloth_core::{Category, ops::reduce};

    #[test]
    fn norm_of_huge_and_tiny_values() {
        let device = crate::device();
        for size in [1e30f32, 1e-30] {
            let x = device.from_slice(&[3.0 * size, 4.0 * size], [2], Category::Gradients).unwrap();
            let norm = reduce::grad_norm(&[&x]).unwrap().to_vec::<f32>().unwrap()[0];
            assert!((norm / size - 5.0).abs() < 1e-6, "{norm}");
        }
    }

    #[test]
    fn a_single_bad_element_anywhere_is_found() {
        let device = crate::device();
        for position in [0, 1023, 1024, 16_384, 40_000] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut data = vec![f32::MAX; 40_001];
                let good = device.from_slice(&data, [data.len()], Category::Gradients).unwrap();
                data[position] = bad;
                let bad = device.from_slice(&data, [data.len()], Category::Gradients).unwrap();
                assert_eq!(reduce::all_finite(&[&good]).unwrap().to_vec::<f32>().unwrap(), [1.0]);
                assert_eq!(reduce::all_finite(&[&good, &bad]).unwrap().to_vec::<f32>().unwrap(), [0.0]);
            }
        }
    }
}
