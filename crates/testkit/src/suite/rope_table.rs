//! What [`unsloth_core::ops::rope_table`] has to show.
