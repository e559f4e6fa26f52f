//! What [`unsloth_core::ops::cross_entropy`] has to show on a device.
