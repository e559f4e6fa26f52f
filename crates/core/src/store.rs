//! Where tensors wait that are not needed for a while.

use std::{path::PathBuf, time::Duration};

use crate::{Result, Tensor};

/// A place outside a device's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Memory of the host. On a device that computes there it is the same memory, under another name in the accounts.
    Host,
    /// Files without a name in this folder, which vanish with the process, however it ends. Their contents are checked when they
    /// are read.
    Disk {
        /// An existing folder, on a disk rather than in memory.
        folder: PathBuf,
    },
}

/// Keeps the contents of tensors in a [`Place`].
pub trait TensorStore: Send + Sync {
    /// Copies a tensor's contents away, as they are now. Where the device goes on computing meanwhile, the store keeps the tensor until the
    /// copy is complete: at the second put after this one, or at [`TensorStore::settle`]. Its memory is free once the tensor and its
    /// clones are dropped.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if pending work failed, or an earlier copy; [`crate::Error::OutOfMemory`] if the host has no room;
    /// [`crate::Error::Storage`]; [`crate::Error::Device`] for a tensor of a device that the store cannot copy from.
    fn put(&self, tensor: &Tensor) -> Result<Box<dyn StoredTensor>>;

    /// Waits until everything that was put has left its device.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if a copy failed.
    fn settle(&self) -> Result<()> {
        Ok(())
    }

    /// What is kept, and what was moved.
    fn usage(&self) -> StoreUsage;
}

/// A tensor in a [`TensorStore`]; what it takes there is freed when it is dropped.
pub trait StoredTensor {
    /// A tensor with the same bits on the device that the first one was on: a new one, or the first one itself where it has not left
    /// and nobody else has it.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; [`crate::Error::Storage`]; [`crate::Error::Damaged`] for contents that are not those that
    /// were put.
    fn take(self: Box<Self>) -> Result<Tensor>;
}

/// What a [`TensorStore`] keeps and has moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreUsage {
    /// Bytes kept now.
    pub live_bytes: u64,
    /// Most bytes kept at once.
    pub peak_bytes: u64,
    /// Most bytes kept at once in memory that the system does not move, as far as the runtime tells.
    pub pinned_peak_bytes: u64,
    /// From devices to the store.
    pub put: Transfers,
    /// From the store to devices; what had not left its device is not among it.
    pub taken: Transfers,
}

impl StoreUsage {
    /// Of two stores together. Their peaks may have been at different times: the sum is no less than what both kept at once.
    pub fn and(self, other: Self) -> Self {
        let both = |a: Transfers, b: Transfers| Transfers {
            num: a.num + b.num,
            bytes: a.bytes + b.bytes,
            time: a.time + b.time,
        };
        Self {
            live_bytes: self.live_bytes + other.live_bytes,
            peak_bytes: self.peak_bytes + other.peak_bytes,
            pinned_peak_bytes: self.pinned_peak_bytes + other.pinned_peak_bytes,
            put: both(self.put, other.put),
            taken: both(self.taken, other.taken),
        }
    }
}

/// Copies in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfers {
    /// Copies.
    pub num: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Time that callers have waited for them.
    pub time: Duration,
}

impl Transfers {
    /// Counts a copy.
    pub fn add(&mut self, bytes: u64, time: Duration) {
        self.num += 1;
        self.bytes += bytes;
        self.time += time;
    }
}
