//! A device that computes on another one and shows every operator's call to an observer: what it was, and what it gave.
//!
//! For whoever looks at a run from outside, a profile or a search for the first NaN: every operator is handed on here, and nowhere
//! else.

mod ops;
mod optimizers;
mod results;

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use self::results::Results;
use crate::{
    AllocationCounts, Backend, Buffer, Category, ClassUsage, DType, Device, HostBytes, Init, Memory, Place, PoolUsage,
    Result, Tensor, TensorStore, Usage, ops::Cost,
};

/// One call of an operator.
#[derive(Debug)]
pub struct Call<'a> {
    /// Operator and part, as in `rms_norm forward`.
    pub name: &'static str,
    /// Sizes, for people.
    pub shape: String,
    /// What it reads that may be weights of a model. The first tells the layer from others.
    pub weights: Vec<&'a Tensor>,
    /// Least FLOPs and bytes.
    pub cost: Cost,
}

/// Sees the calls of a device. An operator that a backend makes of others counts as one call.
pub trait Observer: Send + Sync + 'static {
    /// Whether it wants to see the next call.
    fn is_on(&self) -> bool;

    /// A call is about to begin on `device`.
    ///
    /// # Errors
    /// Its own, which the caller of the operator gets.
    fn before(&self, device: &Device) -> Result<()>;

    /// The call has ended, or been launched, and given these tensors, those that it has added to or written over included.
    /// Nothing is told of a call that failed. Left out are logarithms of sums, which attention gives as infinite where a row is
    /// masked, and what an optimiser updates.
    ///
    /// # Errors
    /// Its own, which the caller of the operator gets.
    fn after(&self, device: &Device, call: &Call<'_>, results: &[&Tensor]) -> Result<()>;
}

/// `device`, with an observer of its calls. Tensors that are made on it are its own: a model to be observed is loaded there.
pub fn observed(device: &Device, observer: Arc<dyn Observer>) -> Device {
    Device::new(Observed { inner: device.clone(), observer, depth: AtomicUsize::new(0) })
}

/// Hands every call to the device inside.
struct Observed {
    inner: Device,
    observer: Arc<dyn Observer>,
    /// Observed calls that have not returned.
    depth: AtomicUsize,
}

/// A call that the observer sees.
struct Seen<'a> {
    call: Call<'a>,
    _depth: Depth<'a>,
}

/// One level of calls within calls, while it lives.
struct Depth<'a>(&'a AtomicUsize);

impl Drop for Depth<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Observed {
    fn backend(&self) -> &dyn Backend {
        self.inner.backend()
    }

    /// A call that gives its results.
    fn call<'a, T: Results>(
        &'a self,
        about: impl FnOnce() -> Call<'a>,
        work: impl FnOnce(&dyn Backend) -> Result<T>,
    ) -> Result<T> {
        let seen = self.begin(about)?;
        let result = work(self.backend())?;
        self.end(seen, result.tensors())?;
        Ok(result)
    }

    /// The beginning of a call; `None` if the observer does not see it.
    fn begin<'a>(&'a self, about: impl FnOnce() -> Call<'a>) -> Result<Option<Seen<'a>>> {
        if !self.observer.is_on() {
            return Ok(None);
        }
        let outer = self.depth.fetch_add(1, Ordering::Relaxed);
        let depth = Depth(&self.depth);
        if outer > 0 {
            return Ok(None);
        }
        let seen = Seen { _depth: depth, call: about() };
        self.observer.before(&self.inner)?;
        Ok(Some(seen))
    }

    /// The end of a call that gave these results.
    fn end<'a>(&self, seen: Option<Seen<'_>>, results: impl IntoIterator<Item = &'a Tensor>) -> Result<()> {
        match seen {
            None => Ok(()),
            Some(seen) => {
                let results: Vec<&Tensor> = results.into_iter().collect();
                self.observer.after(&self.inner, &seen.call, &results)
            }
        }
    }
}

impl Memory for Observed {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn supports(&self, dtype: DType) -> bool {
        self.inner.supports(dtype)
    }

    fn allocate(&self, bytes: usize, category: Category, init: Init) -> Result<Arc<dyn Buffer>> {
        self.backend().allocate(bytes, category, init)
    }

    fn adopt(
        &self,
        source: HostBytes,
        bytes: Range<usize>,
        align: usize,
        category: Category,
    ) -> Result<Arc<dyn Buffer>> {
        self.backend().adopt(source, bytes, align, category)
    }

    fn write(&self, buffer: &mut dyn Buffer, bytes: &[u8]) -> Result<()> {
        self.backend().write(buffer, bytes)
    }

    fn read(&self, buffer: &dyn Buffer, bytes: &mut [u8]) -> Result<()> {
        self.backend().read(buffer, bytes)
    }

    fn usage(&self) -> Usage {
        self.inner.usage()
    }

    fn reset_peak(&self) {
        self.backend().reset_peak();
    }

    fn num_reads(&self) -> u64 {
        self.backend().num_reads()
    }

    fn allocation_counts(&self) -> AllocationCounts {
        self.backend().allocation_counts()
    }

    fn set_budget(&self, bytes: Option<u64>) -> Option<u64> {
        self.inner.set_budget(bytes)
    }

    fn memory_bytes(&self) -> Option<u64> {
        self.inner.memory_bytes()
    }

    fn host_threads(&self) -> Option<usize> {
        self.inner.host_threads()
    }

    fn pool_usage(&self) -> Result<PoolUsage> {
        self.inner.pool_usage()
    }

    fn pool_classes(&self) -> Vec<ClassUsage> {
        self.inner.pool_classes()
    }

    fn trim(&self) -> Result<()> {
        self.inner.trim()
    }

    fn store(&self, place: &Place) -> Result<Arc<dyn TensorStore>> {
        self.inner.store(place)
    }

    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }
}
