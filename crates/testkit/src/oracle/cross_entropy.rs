//! Reference of [`unsloth_core::ops::cross_entropy`].
