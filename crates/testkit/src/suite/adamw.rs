//! What [`unsloth_core::ops::adamw`] has to show on a device.
