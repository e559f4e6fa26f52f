//! Rounding to bf16 up or down at random, so that what many small steps add up to is not lost in between.
//!                                                                   Gupta et al. 2015, arXiv:1502.02551
//!
//! A number between two neighbours in bf16 becomes the one further from 0 with a probability that is its share of the way there,
//! and the other one otherwise: the mean over many draws is the number itself. What bf16 holds stays as it is; an infinity or a
//! NaN stays one.
//!
//! The share is compared with 16 random bits. Those of element `i` are half of a word of [`Philox::block`] for the counter
//! `(step, tensor, (i / 8) >> 32, i / 8)`: word `i % 8 / 2`, the lower half for an even `i`.

use super::{check, cost::Cost};
use crate::{DType, Result, Tensor, rng::Philox};

/// Which random bits a call draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The stream of the run.
    pub stream: Philox,
    /// Optimiser step.
    pub step: u32,
    /// Number of the tensor in the model.
    pub tensor: u32,
}

/// Elements whose bits are one block.
pub const GROUP: usize = 8;

/// Stochastic rounding of a backend.
pub trait StochasticRounding {
    /// Rounds `x`, f32, into `out`, bf16.
    fn round_stochastically(&self, spec: &Spec, x: &Tensor, out: &mut Tensor) -> Result<()>;
}

/// Cost of [`round`]: one type in, the other out.
pub fn cost(x: &Tensor, out: &Tensor) -> Cost {
    Cost::of(&[x], &[out])
}

/// Rounds every element of `x`, f32, into `out`, bf16 of its shape.
///
/// # Errors
/// Shape, dtype or device mismatch; [`crate::Error::Shared`]; [`crate::Error::Unsupported`].
pub fn round(spec: &Spec, x: &Tensor, out: &mut Tensor) -> Result<()> {
    const OP: &str = "stochastic_rounding";
    check::dtype(OP, "x", x, DType::F32)?;
    check::tensor(OP, "out", out, (x.shape(), DType::BF16, x.device()))?;
    let device = x.device().clone();
    device.backend().round_stochastically(spec, x, out)
}
