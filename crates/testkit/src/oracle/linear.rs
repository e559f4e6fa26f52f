//! Reference of [`unsloth_core::ops::linear`].
