//! A device that computes in f64, with the oracles' loops: what other devices' losses and gradients are held to.
//!
//! To the layers above its tensors are f32. What an operator computes is kept in f64 all the same, from the first operator to the
//! loss and back, and [`values`] reads it; what the host writes is widened. [`set_values`] moves a parameter by less than an f32
//! can say, which is what central differences need. It is slow, has no optimisers, no dropout and no cache of past keys, and its
//! gradients are those of the oracles, which `unsloth-testkit` holds to central differences operator by operator.

mod backend;
mod linears;
mod ops;
mod optimizers;

pub use backend::{ExactBackend, set_values, values};
use unsloth_core::Device;

/// The device `exact`.
pub fn device() -> Device {
    Device::new(ExactBackend::new())
}
