//! Reference of [`unsloth_core::ops::linear_cross_entropy`].
