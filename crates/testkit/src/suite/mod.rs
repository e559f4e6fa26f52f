//! What each operator has to show on a device, the same for every backend.
//!
//! A suite is `run(device)`, which panics, on top of `check(device)`, which returns the failure; [`crate::mutant`] holds the
//! latter to failing on wrong backends.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod elementwise;
pub mod embedding;
pub mod glu;
pub mod linear;
pub mod linear_cross_entropy;
pub mod lora_linear;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod rope_table;
