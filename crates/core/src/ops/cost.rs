//! What a call costs at least: the numbers that a measurement is held against.

use std::{iter::Sum, ops::Add};

use crate::{DType, Tensor};

/// Least work of one call. Each operator's file says what its calls cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Multiplications and additions of matrix products. Arithmetic beside them is left out: memory bounds it.
    pub flops: u64,
    /// Bytes read where every input is read once. What is added to is an input and an output.
    pub read: u64,
    /// Bytes written where every output is written once.
    pub written: u64,
}

impl Cost {
    /// So many bytes in, nothing else.
    pub const fn read(bytes: usize) -> Self {
        Self { flops: 0, read: bytes as u64, written: 0 }
    }

    /// So many bytes out, nothing else.
    pub const fn written(bytes: usize) -> Self {
        Self { flops: 0, read: 0, written: bytes as u64 }
    }

    /// So many bytes in and out: something is added to them.
    pub const fn updated(bytes: usize) -> Self {
        Self { flops: 0, read: bytes as u64, written: bytes as u64 }
    }

    /// All bytes moved.
    pub const fn bytes(&self) -> u64 {
        self.read + self.written
    }

    /// `count` products of `rows x inner` with `inner x columns`, without their traffic.
    pub(super) const fn products(count: u64, [rows, inner, columns]: [usize; 3]) -> Self {
        Self { flops: count * 2 * rows as u64 * inner as u64 * columns as u64, read: 0, written: 0 }
    }

    /// These tensors in, and these out.
    pub(super) fn of(read: &[&Tensor], written: &[&Tensor]) -> Self {
        let bytes = |tensors: &[&Tensor]| tensors.iter().map(|tensor| tensor.bytes()).sum();
        Self::read(bytes(read)) + Self::written(bytes(written))
    }
}

impl Add for Cost {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, read: self.read + other.read, written: self.written + other.written }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Self::add)
    }
}

/// `bytes` where there is something to move, else none.
pub(super) const fn given(is_given: bool, bytes: usize) -> usize {
    if is_given { bytes } else { 0 }
}

/// Bytes of `elements` elements.
pub(super) const fn stored(elements: usize, dtype: DType) -> usize {
    elements * dtype.size_bytes()
}

#[cfg(test)]
mod tests {
    use super::Cost;
    use crate::{
        DType,
        ops::{attention, linear, lora_linear, rms_norm},
    };

    const LINEAR: linear::Spec =
        linear::Spec { rows: 2, in_features: 3, out_features: 5, dtype: DType::BF16, weight_dtype: DType::F32 };

    /// Forward: 2 * 2 * 3 * 5 FLOPs; x 6 and y 10 elements of bf16, 15 weights of f32: 12, 20 and 60 bytes.
    /// Weight gradient: dy and x in, 15 elements of f32 in and out. Bias gradient: dy in, 5 elements of f32 in and out.
    #[test]
    fn linear_by_hand() {
        assert_eq!(LINEAR.forward_cost(), Cost { flops: 60, read: 72, written: 20 });
        assert_eq!(LINEAR.input_gradient_cost(), Cost { flops: 60, read: 80, written: 12 });
        assert_eq!(LINEAR.weight_gradient_cost(), Cost { flops: 60, read: 32 + 60, written: 60 });
        assert_eq!(LINEAR.bias_gradient_cost(), Cost { flops: 0, read: 20 + 20, written: 20 });
    }

    /// Rank 1: A and B have 3 and 5 elements of f32, h 2. Forward adds 2 * 2 * 1 * 8 FLOPs and 32 + 8 bytes; backward with all
    /// gradients costs twice that low-rank part, and x and the two gradients in and out besides.
    #[test]
    fn lora_linear_by_hand() {
        let adapter_dtype = DType::F32;
        let spec = lora_linear::Spec { base: LINEAR, rank: 1, scale: 1.0, adapter_dtype, dropout: None };
        assert_eq!(spec.forward_cost(), Cost { flops: 60 + 32, read: 72 + 32, written: 20 + 8 });
        let read = 80 + 32 + 8 + 12 + 32;
        assert_eq!(spec.backward_cost(true, true, true), Cost { flops: 60 + 64, read, written: 12 + 32 });
        // dB alone: dy in (20), h in (8), dB in and out (40).
        assert_eq!(spec.backward_cost(false, false, true), Cost { flops: 20, read: 20 + 8 + 20, written: 20 });
    }

    /// Two rows of four bf16 elements, weight f32: 16 bytes a matrix, 16 the weight, 8 the statistics.
    #[test]
    fn rms_norm_by_hand() {
        let (dtype, weight_dtype) = (DType::BF16, DType::F32);
        let spec = rms_norm::Spec { rows: 2, hidden_size: 4, eps: 1e-5, weight_offset: 0.0, dtype, weight_dtype };
        assert_eq!(spec.forward_cost(false), Cost::read(16 + 16) + Cost::written(16 + 8));
        assert_eq!(spec.forward_cost(true), Cost::read(2 * 16 + 16) + Cost::written(2 * 16 + 8));
        assert_eq!(spec.backward_cost(true, true), Cost::read(3 * 16 + 16 + 8 + 16) + Cost::written(16 + 16));
    }

    /// Keys seen: causal over equal lengths 1 + 2 + 3; bottom-right over 2 queries and 3 keys 2 + 3; over 3 queries and 2 keys
    /// 0 + 1 + 2; with one key to the left 1 + 2 + 2; without a mask 2 * 3.
    #[test]
    fn attention_counts_what_is_seen() {
        let causal = attention::Options::causal(2);
        let sliding = attention::Options { window: attention::Window::Sliding { left: 1 }, ..causal };
        let all = attention::Options { causal: false, ..causal };
        let cases = [(causal, 3, 3, 6), (causal, 2, 3, 5), (causal, 3, 2, 3), (sliding, 3, 3, 5), (all, 2, 3, 6)];
        for (options, seq_q, seq_k, pairs) in cases {
            let spec = attention::Spec { num_heads: 2, num_kv_heads: 1, head_dim: 2, options, dtype: DType::F32 };
            let cost = spec.forward_cost(&[0, seq_q], &[0, seq_k]);
            // Two products, two heads of two channels; q and out 2 * 2, k and v 2, lse 2 elements a token.
            assert_eq!(cost.flops, 2 * 2 * 2 * 2 * pairs, "{options:?}, {seq_q} x {seq_k}");
            assert_eq!(cost.read, 4 * (4 * seq_q + 4 * seq_k) as u64);
            assert_eq!(cost.written, 4 * (4 * seq_q + 2 * seq_q) as u64);
            let backward = spec.backward_cost(&[0, seq_q], &[0, seq_k]);
            assert_eq!(backward.flops, 5 * 2 * 2 * 2 * pairs);
            assert_eq!(backward.read, 4 * (12 * seq_q + 4 * seq_k + 2 * seq_q) as u64);
            assert_eq!(backward.written, 4 * (4 * seq_q + 4 * seq_k) as u64);
        }
    }
}
