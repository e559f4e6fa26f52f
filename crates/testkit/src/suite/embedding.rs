//! What [`unsloth_core::ops::embedding`] has to show on a device.
