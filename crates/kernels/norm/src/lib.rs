#![doc = include_str!("../README.md")]

pub mod rms_norm;
