//! Reference of [`unsloth_core::ops::reduce`].
