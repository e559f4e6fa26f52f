//! Storage behind a tensor.

use std::{any::Any, sync::Arc};

use crate::Category;

/// Bytes in host memory that a device may adopt without a copy: a memory-mapped file or a shared vector.
pub type HostBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A block of device memory. Dropping it returns the block to the backend's pool and its bytes to the ledger.
pub trait Buffer: Any + Send + Sync {
    /// Bytes that the ledger counts for this buffer: the size asked for, rounded up to 256.
    fn accounted_bytes(&self) -> u64;
    /// What the buffer is held for.
    fn category(&self) -> Category;
    /// Moves the buffer's bytes to another category in the ledger.
    fn retag(&self, category: Category);
    /// For the owning backend to recover its own type.
    fn as_any(&self) -> &dyn Any;
    /// For the owning backend to recover its own type.
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

/// Which buffer a tensor has: tensors that share one are told from all others while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(usize);

impl BufferId {
    pub(crate) fn of(buffer: &dyn Buffer) -> Self {
        Self(std::ptr::from_ref(buffer).cast::<()>().addr())
    }
}
