//! What every kernel crate of unsloth-rs needs before and inside a launch: checks against the device's properties, launch
//! geometry, sums over a cube that are right for any plane size, exponentials that are good on any device, and random numbers.
//!
//! A kernel that breaks a limit of its device reports nothing: the launch returns, and the output keeps its old contents. So
//! every launch goes through [`Launch`], which turns such a call into a [`LaunchError`] first.

mod error;
mod launch;
pub mod math;
mod reduce;
mod rng;

pub use error::LaunchError;
pub use launch::{Launch, RowGrid};
pub use reduce::{cube_max, cube_reduce_bytes, cube_sum, vector_sum};
pub use rng::philox;
