//! A device that computes nothing but memory.
//!
//! [`PlanBackend`] follows the operator contract on shapes alone: every output, in-place reuse and scratch buffer is entered in
//! a real ledger, and no element exists. Running the real trainer on it *is* the memory plan of that run, so the plan cannot
//! drift from the code.
//!
//! ```
//! use unsloth_core::{Category, DType, Device, ops::glu};
//!
//! let device = Device::new(unsloth_plan::PlanBackend::new(unsloth_plan::PlanOptions::default())?);
//! let gate = device.empty([1 << 20, 1 << 14], DType::F32, Category::Activations)?; // 64 GiB that nobody has
//! let out = glu::forward(&gate, &gate, glu::Activation::Silu)?;
//! assert_eq!(device.usage().total_live_bytes(), 2 * (1 << 36));
//! # drop(out);
//! # Ok::<(), unsloth_core::Error>(())
//! ```

mod backend;
mod kernels;
mod ops;
mod scratch;
mod store;

pub use backend::{PlanBackend, PlanOptions, Target};
