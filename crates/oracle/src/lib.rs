//! References: plain loops over `f64` slices that read like the formulas in [`unsloth_core::ops`], generic over the
//! arithmetic. No helper is shared with a backend.
//!
//! With [`arith::Exact`] they are what `unsloth-testkit` and the device `unsloth-exact` call right; with [`arith::Rounded`] they
//! are the naive form that every backend has to match.

#![allow(clippy::needless_range_loop, reason = "references index as their formulas do")]

pub mod adafactor;
pub mod adamw;
pub mod adamw8bit;
pub mod arith;
pub mod attention;
pub mod cross_entropy;
pub mod dora;
pub mod elementwise;
pub mod embedding;
pub mod glu;
pub mod layer_norm;
pub mod linear;
pub mod linear_cross_entropy;
pub mod lion;
pub mod lora_linear;
pub mod muon;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod sgd;
pub mod stochastic_rounding;
