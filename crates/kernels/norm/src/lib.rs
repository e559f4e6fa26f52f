#![doc = include_str!("../README.md")]

mod backward;
pub mod layer_norm;
mod parameters;
pub mod rms_norm;
mod rows;

pub use backward::Gradient;

/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
/// What this crate gives or takes besides.
pub use unsloth_common::{LaunchError, column_parts};
