#![doc = include_str!("../README.md")]

mod few_rows;
pub mod linear;
pub mod lora_linear;
pub mod product;
