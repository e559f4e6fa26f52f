#![doc = include_str!("../README.md")]

pub mod rope;

/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
/// What this crate gives or takes besides.
pub use unsloth_common::LaunchError;
