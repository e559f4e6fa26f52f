#![doc = include_str!("../README.md")]

pub mod cross_entropy;
pub mod linear_cross_entropy;
