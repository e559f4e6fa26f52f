#![doc = include_str!("../README.md")]

pub mod cross_entropy;
pub mod linear_cross_entropy;

/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
/// What this crate gives or takes besides.
pub use unsloth_common::{Choices, LaunchError, Target};
