//! Reference of [`unsloth_core::ops::adamw`].
