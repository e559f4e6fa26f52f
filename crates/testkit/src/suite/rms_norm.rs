//! What [`unsloth_core::ops::rms_norm`] has to show on a device.
