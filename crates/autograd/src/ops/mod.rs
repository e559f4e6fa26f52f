//! Differentiable operators: one file each, with the formula and gradient of the operator of the same name in
//! [`unsloth_core::ops`].
//!
//! Every function computes at once, but for those that give a [`crate::Deferred`], and records only where an input or a trained parameter needs a gradient. What it records
//! is what the backward pass reads, no more: a frozen weight costs neither time nor memory. A function that takes a [`crate::Var`]
//! by value may reuse its buffer, if nothing else holds it.
//!
//! All fail on a shape, dtype or device mismatch with the error of the operator in [`unsloth_core::ops`], and with
//! [`unsloth_core::Error::InvalidSpec`] for an input that was recorded on another tape.

mod attention;
mod cross_entropy;
mod dora;
mod elementwise;
mod embedding;
mod glu;
mod layer_norm;
mod linear;
mod linear_cross_entropy;
mod lora_linear;
mod reduce;
mod rms_norm;
mod rope;

pub use attention::{AttentionSequences, attention};
pub use cross_entropy::cross_entropy;
pub use dora::dora;
pub use elementwise::{add, cast, mul, reshape, scale};
pub use embedding::embedding;
pub use glu::glu;
pub use layer_norm::{LayerNorm, add_layer_norm, layer_norm};
pub use linear::{deferred_linear, linear};
pub use linear_cross_entropy::linear_cross_entropy;
pub use lora_linear::{LoraAdapter, LoraDropout, deferred_lora_linear, lora_linear};
pub use reduce::sum;
pub use rms_norm::{NormOptions, add_rms_norm, rms_norm};
pub use rope::{RopeAngles, rope};
