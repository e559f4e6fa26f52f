//! What [`unsloth_core::ops::attention`] has to show on a device.
