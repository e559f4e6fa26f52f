//! What [`unsloth_core::ops::glu`] has to show on a device.
