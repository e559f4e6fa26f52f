//! What [`unsloth_core::ops::linear_cross_entropy`] has to show on a device.
