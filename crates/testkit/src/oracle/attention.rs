//! Reference of [`unsloth_core::ops::attention`].
