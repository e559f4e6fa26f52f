//! A device that keeps a record of its calls: which operator, what it costs at least, and on request how long it took.
//!
//! Costs are those that the operators' contracts state for the `Spec` that the backend receives, so whatever runs on the device,
//! a single call or a training step, has its FLOPs and bytes counted by the same formulas.

mod ops;

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use unsloth_rs::{
    Category, DType, Device, Result, Tensor,
    core::{
        AllocationCounts, Backend, Buffer, HostBytes, Init, Memory, Place, PoolUsage, TensorStore, Usage, Weight,
        ops::Cost,
    },
};

/// One call of an operator.
#[derive(Clone, Debug)]
pub struct Call {
    /// Operator and part, as in `rms_norm forward`.
    pub name: &'static str,
    /// Sizes, for people.
    pub shape: String,
    /// Tells the matrix or adapter of a layer from that of another: see [`address`].
    pub subject: Option<usize>,
    /// Least FLOPs and bytes.
    pub cost: Cost,
    /// When it began, since the recording did.
    pub start: Duration,
    /// How long it took, the wait for the device included.
    pub elapsed: Duration,
    /// Bytes held when it had ended, by category.
    pub live_bytes: [u64; Category::ALL.len()],
}

/// Identity of a tensor's storage, while it lives.
pub fn address(tensor: &Tensor) -> usize {
    std::ptr::from_ref(tensor.buffer()).cast::<()>().addr()
}

/// [`address`] of a matrix; `None` for one that is not dense.
pub fn weight_address(weight: &Weight) -> Option<usize> {
    match weight {
        Weight::Dense(tensor) => Some(address(tensor)),
        _ => None,
    }
}

/// Record of a device's calls. Off at first.
#[derive(Debug)]
pub struct Recording {
    is_on: AtomicBool,
    /// Calls that have not returned: an operator that a backend makes of others counts once.
    depth: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    start: Instant,
    calls: Vec<Call>,
}

impl Recording {
    fn new() -> Self {
        let state = Mutex::new(State { start: Instant::now(), calls: Vec::new() });
        Self { is_on: AtomicBool::new(false), depth: AtomicUsize::new(0), state }
    }

    /// Forgets what happened so far, if it is on.
    pub fn restart(&self) {
        if self.is_on.load(Ordering::Relaxed) {
            self.start();
        }
    }

    /// Begins anew. While it is on every call waits for the device before and after, so that each has its own time.
    pub fn start(&self) {
        *self.lock() = State { start: Instant::now(), calls: Vec::new() };
        self.is_on.store(true, Ordering::Relaxed);
    }

    /// Ends it, with what happened since it began.
    pub fn stop(&self) -> Vec<Call> {
        self.is_on.store(false, Ordering::Relaxed);
        std::mem::take(&mut self.lock().calls)
    }

    /// What `work` costs at least.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn cost_of<E>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Cost, E> {
        self.start();
        let done = work();
        let cost = self.stop().iter().map(|call| call.cost).sum();
        done.map(|()| cost)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `device`, with a record of its calls.
pub fn recorded(device: &Device) -> (Device, Arc<Recording>) {
    let recording = Arc::new(Recording::new());
    (Device::new(Recorder { inner: device.clone(), recording: recording.clone() }), recording)
}

/// What a call is, as the record keeps it. Made only while the record is on.
struct About {
    name: &'static str,
    shape: String,
    subject: Option<usize>,
    cost: Cost,
}

/// Hands every call to the device inside.
struct Recorder {
    inner: Device,
    recording: Arc<Recording>,
}

impl Recorder {
    fn call<T>(&self, about: impl FnOnce() -> About, work: impl FnOnce(&dyn Backend) -> Result<T>) -> Result<T> {
        let backend = self.inner.backend();
        let recording = &*self.recording;
        if !recording.is_on.load(Ordering::Relaxed) || recording.depth.fetch_add(1, Ordering::Relaxed) > 0 {
            let result = work(backend);
            self.leave();
            return result;
        }
        let About { name, shape, subject, cost } = about();
        let result = self.timed(backend, work).inspect(|&(_, begin, elapsed)| {
            let live_bytes = backend.usage().live_bytes;
            let mut state = recording.lock();
            let start = begin.saturating_duration_since(state.start);
            state.calls.push(Call { name, shape, subject, cost, start, elapsed, live_bytes });
        });
        self.leave();
        result.map(|(result, ..)| result)
    }

    fn timed<T>(
        &self,
        backend: &dyn Backend,
        work: impl FnOnce(&dyn Backend) -> Result<T>,
    ) -> Result<(T, Instant, Duration)> {
        backend.synchronize()?;
        let begin = Instant::now();
        let result = work(backend)?;
        backend.synchronize()?;
        Ok((result, begin, begin.elapsed()))
    }

    fn leave(&self) {
        // A record that was off when the call began has not counted it.
        let down = |depth: usize| depth.checked_sub(1);
        let _ = self.recording.depth.fetch_update(Ordering::Relaxed, Ordering::Relaxed, down);
    }
}

impl Memory for Recorder {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn supports(&self, dtype: DType) -> bool {
        self.inner.supports(dtype)
    }

    fn allocate(&self, bytes: usize, category: Category, init: Init) -> Result<Arc<dyn Buffer>> {
        self.inner.backend().allocate(bytes, category, init)
    }

    fn adopt(
        &self,
        source: HostBytes,
        bytes: Range<usize>,
        align: usize,
        category: Category,
    ) -> Result<Arc<dyn Buffer>> {
        self.inner.backend().adopt(source, bytes, align, category)
    }

    fn write(&self, buffer: &mut dyn Buffer, bytes: &[u8]) -> Result<()> {
        self.inner.backend().write(buffer, bytes)
    }

    fn read(&self, buffer: &dyn Buffer, bytes: &mut [u8]) -> Result<()> {
        self.inner.backend().read(buffer, bytes)
    }

    fn usage(&self) -> Usage {
        self.inner.usage()
    }

    fn reset_peak(&self) {
        self.inner.backend().reset_peak();
    }

    fn num_reads(&self) -> u64 {
        self.inner.backend().num_reads()
    }

    fn allocation_counts(&self) -> AllocationCounts {
        self.inner.backend().allocation_counts()
    }

    fn set_budget(&self, bytes: Option<u64>) -> Option<u64> {
        self.inner.set_budget(bytes)
    }

    fn host_threads(&self) -> Option<usize> {
        self.inner.host_threads()
    }

    fn pool_usage(&self) -> Result<PoolUsage> {
        self.inner.pool_usage()
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
