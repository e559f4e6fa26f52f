//! What [`unsloth_core::ops::linear`] has to show on a device.
