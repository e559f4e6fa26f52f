//! Reference of [`unsloth_core::ops::glu`].
