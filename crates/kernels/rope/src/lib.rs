#![doc = include_str!("../README.md")]

pub mod rope;

/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
