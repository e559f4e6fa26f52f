//! Tensors that wait outside their device, accounted for as their device's are.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use unsloth_core::{Category, DType, Device, Result, Shape, StoreUsage, StoredTensor, Tensor, TensorStore, Transfers};
use unsloth_memory::{Charge, Copies, Layout, Ledger};

/// Copies to the store, and back.
type Counts = Mutex<[Transfers; 2]>;

/// Nothing is copied: what the copies would take is entered.
pub(crate) struct PlanStore {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) transfers: Arc<Counts>,
}

impl TensorStore for PlanStore {
    fn put(&self, tensor: &Tensor) -> Result<Box<dyn StoredTensor>> {
        let charge = self.ledger.charge(tensor.bytes(), Category::Activations)?;
        lock(&self.transfers)[0].add(tensor.bytes() as u64, Duration::ZERO);
        let (device, dtype, shape) = (tensor.device().clone(), tensor.dtype(), *tensor.shape());
        Ok(Box::new(Planned { device, dtype, shape, transfers: self.transfers.clone(), _charge: charge }))
    }

    fn usage(&self) -> StoreUsage {
        let (usage, [put, taken]) = (self.ledger.usage(), *lock(&self.transfers));
        let (live_bytes, peak_bytes) = (usage.total_live_bytes(), usage.total_peak_bytes());
        StoreUsage { live_bytes, peak_bytes, pinned_peak_bytes: 0, put, taken }
    }
}

/// The copies of a device that goes on computing, for a store that has their order alone.
pub(crate) struct NoCopies;

impl Copies for NoCopies {
    type Copy = ();
    type Contents = ();

    fn begin(&self, _tensor: &Tensor) -> Result<()> {
        Ok(())
    }

    fn finish(&self, (): ()) -> Result<()> {
        Ok(())
    }

    fn pinned_bytes(&self, (): &()) -> usize {
        0
    }

    fn restore(&self, (): (), layout: &Layout) -> Result<Tensor> {
        layout.device.empty(layout.shape, layout.dtype, Category::Activations)
    }
}

struct Planned {
    device: Device,
    dtype: DType,
    shape: Shape,
    transfers: Arc<Counts>,
    _charge: Charge,
}

impl StoredTensor for Planned {
    fn take(self: Box<Self>) -> Result<Tensor> {
        let tensor = self.device.empty(self.shape, self.dtype, Category::Activations)?;
        lock(&self.transfers)[1].add(tensor.bytes() as u64, Duration::ZERO);
        Ok(tensor)
    }
}

/// Counters are whole between any two statements.
fn lock(counts: &Counts) -> MutexGuard<'_, [Transfers; 2]> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}
