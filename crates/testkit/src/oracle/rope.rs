//! Reference of [`unsloth_core::ops::rope`].
