//! Documents into batches.
