//! Elementwise operators, reductions to a scalar and AdamW in CubeCL, generic over the runtime.
//!
//! All of them are bound by memory: each reads every operand once and writes every result once.

pub mod adamw;
pub mod elementwise;
pub mod reduce;
