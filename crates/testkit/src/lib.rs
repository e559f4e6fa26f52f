//! What proves an operator right, on any backend.
//!
//! - [`oracle`]: each operator as plain loops that read like its formula, generic over an [`arith::Arith`]: with
//!   [`arith::Exact`] it is the f64 oracle, with [`arith::Rounded`] the *naive* form that every backend has to match
//! - [`budget`]: the error a backend may have, derived from the naive form rather than chosen
//! - [`gradcheck`]: central differences, which prove the oracles' gradients
//! - [`suite`]: everything an operator has to show on a [`unsloth_core::Device`]; the same suite for every backend
//! - [`mutant`]: backends that are wrong in one way each; a suite that passes one of them proves nothing

pub mod budget;
pub mod data;
pub mod expect;
pub mod gradcheck;
pub mod mutant;
pub mod report;
pub mod suite;

pub use unsloth_oracle as oracle;
pub use unsloth_oracle::arith;
