//! What [`unsloth_core::ops::rope`] has to show on a device.
