//! The tensors in what an operator gives.

use crate::{
    Tensor,
    ops::{attention, cross_entropy, glu, layer_norm, linear_cross_entropy, lora_linear, rms_norm},
};

/// What an operator gives.
pub(super) trait Results {
    /// Its tensors, but for logarithms of sums.
    fn tensors(&self) -> Vec<&Tensor>;
}

impl Results for Tensor {
    fn tensors(&self) -> Vec<&Tensor> {
        vec![self]
    }
}

impl Results for (Tensor, Tensor) {
    fn tensors(&self) -> Vec<&Tensor> {
        vec![&self.0, &self.1]
    }
}

impl Results for rms_norm::Forward {
    fn tensors(&self) -> Vec<&Tensor> {
        self.sum.iter().chain([&self.rstd, &self.out]).collect()
    }
}

impl Results for layer_norm::Forward {
    fn tensors(&self) -> Vec<&Tensor> {
        self.sum.iter().chain([&self.mean, &self.rstd, &self.out]).collect()
    }
}

impl Results for glu::Gradients {
    fn tensors(&self) -> Vec<&Tensor> {
        vec![&self.dgate, &self.dup]
    }
}

impl Results for attention::Forward {
    fn tensors(&self) -> Vec<&Tensor> {
        vec![&self.out]
    }
}

impl Results for attention::Gradients {
    fn tensors(&self) -> Vec<&Tensor> {
        vec![&self.dq, &self.dk, &self.dv]
    }
}

impl Results for lora_linear::Forward {
    fn tensors(&self) -> Vec<&Tensor> {
        vec![&self.h, &self.y]
    }
}

impl Results for cross_entropy::Forward {
    fn tensors(&self) -> Vec<&Tensor> {
        vec![&self.loss]
    }
}

impl Results for linear_cross_entropy::Forward {
    fn tensors(&self) -> Vec<&Tensor> {
        [&self.loss].into_iter().chain(&self.dx).collect()
    }
}
