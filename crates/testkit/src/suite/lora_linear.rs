//! What [`unsloth_core::ops::lora_linear`] has to show on a device.
