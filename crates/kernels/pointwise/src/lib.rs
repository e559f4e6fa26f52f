#![doc = include_str!("../README.md")]

pub mod adamw;
pub mod adamw8bit;
pub mod elementwise;
pub mod embedding;
mod groups;
pub mod lion;
pub mod muon;
pub mod reduce;
pub mod sgd;

/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
