//! Reference of [`unsloth_core::ops::rms_norm`].
