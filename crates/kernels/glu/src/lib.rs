#![doc = include_str!("../README.md")]

pub mod glu;

/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
