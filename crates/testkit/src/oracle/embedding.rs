//! Reference of [`unsloth_core::ops::embedding`].
