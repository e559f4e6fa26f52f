#![doc = include_str!("../README.md")]

pub mod adafactor;
pub mod adamw;
pub mod adamw8bit;
pub mod elementwise;
pub mod embedding;
mod groups;
pub mod lion;
pub mod muon;
pub mod reduce;
pub mod sgd;
pub mod stochastic_rounding;

/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
/// What this crate gives or takes besides.
pub use unsloth_common::LaunchError;
