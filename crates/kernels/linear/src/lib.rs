#![doc = include_str!("../README.md")]

#[cfg(feature = "cubek")]
mod cubek;
pub mod dora;
pub mod dropout;
mod few_rows;
pub mod linear;
pub mod lora_linear;
mod measure;
mod planes;
pub mod product;
mod strategy;
mod sums;
mod tensor;

pub use strategy::names as strategies;

/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
/// What this crate gives or takes besides.
pub use unsloth_common::{Choices, LaunchError, Target, column_parts};
