//! What a call costs at least: the numbers that a measurement is held against.

use std::{iter::Sum, ops::Add};

use crate::{DType, Tensor};

/// Least work of one call. Each operator's file says what its calls cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Multiplications and additions of matrix products. Arithmetic beside them is left out: memory bounds it.
    pub flops: u64,
    /// Bytes moved where every input is read once and every output written once; what is added to is both.
    pub bytes: u64,
}

impl Cost {
    /// Traffic alone.
    pub const fn bytes(bytes: usize) -> Self {
        Self { flops: 0, bytes: bytes as u64 }
    }

    /// `count` products of `rows x inner` with `inner x columns`, without their traffic.
    pub(super) const fn products(count: u64, [rows, inner, columns]: [usize; 3]) -> Self {
        Self { flops: count * 2 * rows as u64 * inner as u64 * columns as u64, bytes: 0 }
    }

    /// Every element of these tensors read or written once.
    pub(super) fn of(tensors: &[&Tensor]) -> Self {
        Self::bytes(tensors.iter().map(|tensor| tensor.bytes()).sum())
    }
}

impl Add for Cost {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Self::add)
    }
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

    /// Forward: 2 * 2 * 3 * 5 FLOPs; x 6 and y 10 elements of bf16, 15 weights of f32: 32 + 60 bytes.
    /// Weight gradient: dy and x in, 15 elements of f32 in and out: 32 + 120 bytes.
    #[test]
    fn linear_by_hand() {
        assert_eq!(LINEAR.forward_cost(), Cost { flops: 60, bytes: 92 });
        assert_eq!(LINEAR.input_gradient_cost(), LINEAR.forward_cost());
        assert_eq!(LINEAR.weight_gradient_cost(), Cost { flops: 60, bytes: 152 });
        assert_eq!(LINEAR.bias_gradient_cost(), Cost { flops: 0, bytes: 60 });
    }

    /// Rank 1: A and B have 3 and 5 elements of f32, h 2. Forward adds 2 * 2 * 1 * 8 FLOPs and 32 + 8 bytes; backward with all
    /// gradients costs twice that low-rank part, and x and the two gradients in and out besides.
    #[test]
    fn lora_linear_by_hand() {
        let adapter_dtype = DType::F32;
        let spec = lora_linear::Spec { base: LINEAR, rank: 1, scale: 1.0, adapter_dtype, dropout: None };
        assert_eq!(spec.forward_cost(), Cost { flops: 60 + 32, bytes: 92 + 40 });
        assert_eq!(spec.backward_cost(true, true, true), Cost { flops: 60 + 64, bytes: 92 + 40 + 12 + 64 });
        // dB alone: dy in (20), h in (8), dB in and out (40).
        assert_eq!(spec.backward_cost(false, false, true), Cost { flops: 20, bytes: 68 });
    }

    /// Two rows of four bf16 elements, weight f32: 16 bytes a matrix, 16 the weight, 8 the statistics.
    #[test]
    fn rms_norm_by_hand() {
        let (dtype, weight_dtype) = (DType::BF16, DType::F32);
        let spec = rms_norm::Spec { rows: 2, hidden_size: 4, eps: 1e-5, weight_offset: 0.0, dtype, weight_dtype };
        assert_eq!(spec.forward_cost(false), Cost::bytes(2 * 16 + 16 + 8));
        assert_eq!(spec.forward_cost(true), Cost::bytes(4 * 16 + 16 + 8));
        assert_eq!(spec.backward_cost(true, true), Cost::bytes(4 * 16 + 16 + 8 + 32));
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
            assert_eq!(cost.bytes, 4 * (8 * seq_q + 4 * seq_k + 2 * seq_q) as u64);
            let backward = spec.backward_cost(&[0, seq_q], &[0, seq_k]);
            assert_eq!(backward.flops, 5 * 2 * 2 * 2 * pairs);
            assert_eq!(backward.bytes, 4 * (16 * seq_q + 8 * seq_k + 2 * seq_q) as u64);
        }
    }
}
