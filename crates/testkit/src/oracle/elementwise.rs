//! Reference of [`unsloth_core::ops::elementwise`].
