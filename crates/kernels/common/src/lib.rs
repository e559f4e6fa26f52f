#![doc = include_str!("../README.md")]

mod choices;
mod columns;
mod error;
mod launch;
pub mod math;
pub mod mma;
mod reduce;
mod rng;

pub use choices::{Choices, Target};
pub use columns::{ColumnGrid, ColumnSum, FoldGrid, column_parts, fold_column, fold_columns, fold_parts};
/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
pub use error::LaunchError;
pub use launch::{Launch, RowGrid};
pub use reduce::{cube_max, cube_reduce_bytes, cube_sum, cube_sum_in_few_registers, vector_sum};
pub use rng::philox;
