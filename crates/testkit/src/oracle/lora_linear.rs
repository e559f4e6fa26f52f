//! Reference of [`unsloth_core::ops::lora_linear`].
