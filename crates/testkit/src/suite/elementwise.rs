//! What [`unsloth_core::ops::elementwise`] has to show on a device.
