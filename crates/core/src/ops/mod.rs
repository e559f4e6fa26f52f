//! One file per operator: its trait, its `Spec`, the checks that every backend shares, formula, gradient and source.
//!
//! The free functions check their arguments and call the backend of the first tensor's device. The traits are for backends;
//! their methods may assume that the checks have passed. Rules that hold for all: storage is f32, f16 or bf16 and sums are
//! f32; activation gradients are overwritten, parameter gradients accumulate into f32; the same call gives the same bits.

pub mod adafactor;
pub mod adamw;
pub mod adamw8bit;
pub mod attention;
mod check;
mod cost;
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
pub mod rope_table;
pub mod sgd;
pub mod stochastic_rounding;

pub use cost::Cost;
