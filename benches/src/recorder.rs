//! A device that keeps a record of its calls: which operator, what it costs at least, and on request how long it took.
//!
//! Costs are those that the operators' contracts state for the `Spec` that the backend receives, so whatever runs on the device,
//! a single call or a training step, has its FLOPs and bytes counted by the same formulas.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use unsloth_rs::{
    Category, Device, Result, Tensor,
    core::{
        BufferId,
        observe::{self, Observer, observed},
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
    /// Tells the matrix or adapter of a layer from that of another.
    pub subject: Option<BufferId>,
    /// Least FLOPs and bytes.
    pub cost: Cost,
    /// When it began, since the recording did.
    pub start: Duration,
    /// How long it took, the wait for the device included.
    pub elapsed: Duration,
    /// Bytes held when it had ended, by category.
    pub live_bytes: [u64; Category::ALL.len()],
}

/// Record of a device's calls. Off at first.
#[derive(Debug)]
pub struct Recording {
    is_on: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    start: Instant,
    /// When the call began that has not returned.
    begin: Instant,
    calls: Vec<Call>,
}

impl State {
    fn new() -> Self {
        let now = Instant::now();
        Self { start: now, begin: now, calls: Vec::new() }
    }
}

impl Recording {
    fn new() -> Self {
        Self { is_on: AtomicBool::new(false), state: Mutex::new(State::new()) }
    }

    /// Forgets what happened so far, if it is on.
    pub fn restart(&self) {
        if self.is_on.load(Ordering::Relaxed) {
            self.start();
        }
    }

    /// Begins anew. While it is on every call waits for the device before and after, so that each has its own time.
    pub fn start(&self) {
        *self.lock() = State::new();
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

impl Observer for Recording {
    fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    fn before(&self, device: &Device) -> Result<()> {
        device.synchronize()?;
        self.lock().begin = Instant::now();
        Ok(())
    }

    fn after(&self, device: &Device, call: &observe::Call<'_>, _results: &[&Tensor]) -> Result<()> {
        device.synchronize()?;
        let end = Instant::now();
        let live_bytes = device.usage().live_bytes;
        let mut state = self.lock();
        let (start, elapsed) = (state.begin.saturating_duration_since(state.start), end - state.begin);
        let &observe::Call { name, cost, .. } = call;
        let (shape, subject) = (call.shape.clone(), call.weights.first().map(|weight| weight.buffer_id()));
        state.calls.push(Call { name, shape, subject, cost, start, elapsed, live_bytes });
        Ok(())
    }
}

/// `device`, with a record of its calls.
pub fn recorded(device: &Device) -> (Device, Arc<Recording>) {
    let recording = Arc::new(Recording::new());
    (observed(device, recording.clone()), recording)
}
