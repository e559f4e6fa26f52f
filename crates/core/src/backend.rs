//! What a processor must offer.

use std::{ops::Range, sync::Arc};

use crate::{Buffer, Category, DType, HostBytes, Place, Result, TensorStore, Usage, ops};

/// Contents of a fresh buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// All bytes zero.
    Zero,
    /// Whatever was there; the caller writes before it reads.
    Arbitrary,
}

/// How often a backend had to ask the system for memory rather than reuse its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AllocationCounts {
    /// Buffers of at least [`AllocationCounts::LARGE_BYTES`] taken fresh from the system or driver.
    pub fresh_large: u64,
    /// Buffers served from the pool.
    pub reused: u64,
}

impl AllocationCounts {
    /// From this size on an allocation counts as large.
    pub const LARGE_BYTES: usize = 64 * 1024;
}

/// Memory that a backend has taken from the system or driver. Mapped files are not among it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Bytes taken, those in buffers and those that wait to be used again.
    pub reserved_bytes: u64,
    /// Bytes that no buffer has.
    pub idle_bytes: u64,
}

/// Blocks of one size in the pool of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassUsage {
    /// Size of each.
    pub block_bytes: u64,
    /// Lent now.
    pub num_lent: u64,
    /// Waiting to be lent again.
    pub num_idle: u64,
    /// How often one was taken from the system.
    pub num_fresh: u64,
    /// How often one that had been released was lent again.
    pub num_reused: u64,
}

/// Buffers of a device and their accounting.
pub trait Memory {
    /// Name as the command line spells it.
    fn name(&self) -> String;
    /// Whether tensors of this type can be stored and computed with.
    fn supports(&self, dtype: DType) -> bool;
    /// A buffer of at least `bytes` bytes.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] or [`crate::Error::BufferTooLarge`], before anything is allocated.
    fn allocate(&self, bytes: usize, category: Category, init: Init) -> Result<Arc<dyn Buffer>>;
    /// A buffer with the contents of `source[bytes]`, by reference where the device can (aligned to `align`), else by copy.
    ///
    /// # Errors
    /// As [`Memory::allocate`].
    fn adopt(
        &self,
        source: HostBytes,
        bytes: Range<usize>,
        align: usize,
        category: Category,
    ) -> Result<Arc<dyn Buffer>>;
    /// Copies host bytes to the start of a buffer.
    ///
    /// # Errors
    /// [`crate::Error::Shared`] for an adopted, read-only buffer; [`crate::Error::Length`] if it is too small.
    fn write(&self, buffer: &mut dyn Buffer, bytes: &[u8]) -> Result<()>;
    /// Copies the start of a buffer to the host; waits for pending work on it.
    ///
    /// # Errors
    /// [`crate::Error::Length`] if the buffer is too small; [`crate::Error::Launch`] if pending work failed.
    fn read(&self, buffer: &dyn Buffer, bytes: &mut [u8]) -> Result<()>;
    /// Memory held, by category.
    fn usage(&self) -> Usage;
    /// Most bytes that may be held from now on; `None` means what the device gives. Gives what it was before.
    fn set_budget(&self, bytes: Option<u64>) -> Option<u64>;
    /// Bytes of memory that the device has of its own; `None` where it has none, or nothing tells.
    fn memory_bytes(&self) -> Option<u64> {
        None
    }
    /// Threads of this process that operators run on, each with scratch of its own; `None` where something else computes.
    fn host_threads(&self) -> Option<usize>;
    /// Forgets peaks: each becomes what is live now.
    fn reset_peak(&self);
    /// How often the host has read a buffer since the backend was made, waiting for what the device had to do before; 0 where the
    /// host has the memory itself.
    fn num_reads(&self) -> u64 {
        0
    }
    /// How often memory was taken fresh or reused since the backend was made.
    fn allocation_counts(&self) -> AllocationCounts;
    /// What has been taken from the system or driver; waits for what was launched.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if pending work failed.
    fn pool_usage(&self) -> Result<PoolUsage>;
    /// Every size of block that was ever lent, the smallest first; none where the backend's pool does not tell.
    fn pool_classes(&self) -> Vec<ClassUsage> {
        Vec::new()
    }
    /// Gives back what no buffer has.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if pending work failed.
    fn trim(&self) -> Result<()>;
    /// Somewhere else to keep tensors of this device.
    ///
    /// # Errors
    /// [`crate::Error::Storage`] if no file can be made in the folder; [`crate::Error::Launch`] if the system has no thread for the
    /// copies.
    fn store(&self, place: &Place) -> Result<Arc<dyn TensorStore>>;
    /// Waits for everything launched.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if a kernel failed.
    fn synchronize(&self) -> Result<()>;
}

/// A processor: memory and every operator. Implemented by implementing the parts.
pub trait Backend:
    Memory
    + ops::elementwise::Elementwise
    + ops::reduce::Reduce
    + ops::embedding::Embedding
    + ops::rms_norm::RmsNorm
    + ops::layer_norm::LayerNorm
    + ops::rope::Rope
    + ops::glu::Glu
    + ops::attention::Attention
    + ops::linear::Linear
    + ops::lora_linear::LoraLinear
    + ops::dora::Dora
    + ops::cross_entropy::CrossEntropy
    + ops::linear_cross_entropy::LinearCrossEntropy
    + ops::adamw::AdamW
    + ops::adamw8bit::AdamW8bit
    + ops::adafactor::Adafactor
    + ops::lion::Lion
    + ops::muon::Muon
    + ops::sgd::Sgd
    + ops::stochastic_rounding::StochasticRounding
    + Send
    + Sync
    + 'static
{
}

impl<T> Backend for T where
    T: Memory
        + ops::elementwise::Elementwise
        + ops::reduce::Reduce
        + ops::embedding::Embedding
        + ops::rms_norm::RmsNorm
        + ops::layer_norm::LayerNorm
        + ops::rope::Rope
        + ops::glu::Glu
        + ops::attention::Attention
        + ops::linear::Linear
        + ops::lora_linear::LoraLinear
        + ops::dora::Dora
        + ops::cross_entropy::CrossEntropy
        + ops::linear_cross_entropy::LinearCrossEntropy
        + ops::adamw::AdamW
        + ops::adamw8bit::AdamW8bit
        + ops::adafactor::Adafactor
        + ops::lion::Lion
        + ops::muon::Muon
        + ops::sgd::Sgd
        + ops::stochastic_rounding::StochasticRounding
        + Send
        + Sync
        + 'static
{
}
