#![doc = include_str!("../README.md")]

pub mod dora;
pub mod dropout;
mod few_rows;
pub mod linear;
pub mod lora_linear;
pub mod product;
mod sums;
mod tensor;

/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
