#![doc = include_str!("../README.md")]

pub mod rms_norm;

/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
