//! What [`unsloth_core::ops::reduce`] has to show on a device.
