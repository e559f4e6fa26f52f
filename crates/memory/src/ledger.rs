//! Live and peak bytes of one device by category, and the budget that they must stay within.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use unsloth_core::{Category, Error, Result, Usage};

/// Account of one device. Cheap to share behind an `Arc`; every change is atomic.
#[derive(Debug)]
pub struct Ledger {
    device: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    budget_bytes: Option<u64>,
    usage: Usage,
}

impl Ledger {
    /// An empty account. Without a budget only the system's own limit holds.
    pub fn new(device: impl Into<String>, budget_bytes: Option<u64>) -> Arc<Self> {
        let state = Mutex::new(State { budget_bytes, usage: Usage::default() });
        Arc::new(Self { device: device.into(), state })
    }

    /// Enters `bytes` (counted as rounded by [`crate::round_up`]) until the [`Charge`] is dropped.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the total would exceed the budget; nothing is entered then.
    pub fn charge(self: &Arc<Self>, bytes: usize, category: Category) -> Result<Charge> {
        let bytes = crate::round_up(bytes) as u64;
        let mut state = self.lock();
        let total = state.usage.total_live_bytes().saturating_add(bytes);
        // Without a budget a request beyond the address space still has to fail as an error, not as an abort.
        let budget_bytes = state.budget_bytes.unwrap_or(isize::MAX as u64);
        if total > budget_bytes {
            let (device, breakdown) = (self.device.clone(), Box::new(state.usage));
            return Err(Error::OutOfMemory { device, requested_bytes: bytes, category, budget_bytes, breakdown });
        }
        state.usage.live_bytes[category.index()] += bytes;
        record_peaks(&mut state.usage);
        drop(state);
        Ok(Charge { ledger: Arc::clone(self), bytes, category: Mutex::new(category) })
    }

    /// The limit on the total, if one was set.
    pub fn budget_bytes(&self) -> Option<u64> {
        self.lock().budget_bytes
    }

    /// Sets the limit on the total and gives the one before. What is entered stays, even beyond it.
    pub fn set_budget(&self, bytes: Option<u64>) -> Option<u64> {
        std::mem::replace(&mut self.lock().budget_bytes, bytes)
    }

    /// What is held now and what the peaks were.
    pub fn usage(&self) -> Usage {
        self.lock().usage
    }

    /// Forgets peaks: each becomes what is live now.
    pub fn reset_peak(&self) {
        let usage = &mut self.lock().usage;
        usage.peak_bytes = usage.live_bytes;
        usage.at_peak_bytes = usage.live_bytes;
    }

    /// The account holds numbers only: whatever panicked elsewhere while it was locked left them whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn record_peaks(usage: &mut Usage) {
    for (peak, &live) in usage.peak_bytes.iter_mut().zip(&usage.live_bytes) {
        *peak = live.max(*peak);
    }
    if usage.total_live_bytes() > usage.total_peak_bytes() {
        usage.at_peak_bytes = usage.live_bytes;
    }
}

/// Bytes entered in a [`Ledger`]; dropping it takes them out.
#[derive(Debug)]
pub struct Charge {
    ledger: Arc<Ledger>,
    bytes: u64,
    category: Mutex<Category>,
}

impl Charge {
    /// Bytes entered.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What they are entered for.
    pub fn category(&self) -> Category {
        *self.category.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the bytes to another category. The total does not change, so it cannot fail.
    pub fn retag(&self, category: Category) {
        let mut current = self.category.lock().unwrap_or_else(PoisonError::into_inner);
        let usage = &mut self.ledger.lock().usage;
        usage.live_bytes[current.index()] -= self.bytes;
        usage.live_bytes[category.index()] += self.bytes;
        record_peaks(usage);
        *current = category;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let category = self.category();
        self.ledger.lock().usage.live_bytes[category.index()] -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_live_and_peak_by_category() {
        let ledger = Ledger::new("cpu", None);
        let weights = ledger.charge(1000, Category::Weights).unwrap();
        let scratch = ledger.charge(1, Category::Workspace).unwrap();
        assert_eq!(ledger.usage().live_bytes[Category::Weights.index()], 1024);
        assert_eq!(ledger.usage().total_live_bytes(), 1280);
        drop(scratch);
        assert_eq!(ledger.usage().total_live_bytes(), 1024);
        assert_eq!(ledger.usage().total_peak_bytes(), 1280);
        assert_eq!(ledger.usage().at_peak_bytes[Category::Workspace.index()], 256);
        ledger.reset_peak();
        assert_eq!(ledger.usage().total_peak_bytes(), 1024);
        drop(weights);
        assert_eq!(ledger.usage().total_live_bytes(), 0);
    }

    #[test]
    fn retag_moves_bytes() {
        let ledger = Ledger::new("cpu", None);
        let charge = ledger.charge(256, Category::Activations).unwrap();
        charge.retag(Category::KvCache);
        let usage = ledger.usage();
        assert_eq!(usage.live_bytes[Category::Activations.index()], 0);
        assert_eq!(usage.live_bytes[Category::KvCache.index()], 256);
        assert_eq!(usage.peak_bytes[Category::KvCache.index()], 256);
        drop(charge);
        assert_eq!(ledger.usage().total_live_bytes(), 0);
    }

    #[test]
    fn refuses_beyond_the_budget_and_names_what_is_held() {
        let ledger = Ledger::new("cpu", Some(1024));
        let held = ledger.charge(700, Category::Weights).unwrap();
        let error = ledger.charge(512, Category::Activations).unwrap_err();
        assert_eq!(
            error.to_string(),
            "out of memory on cpu: 512 bytes for activations do not fit the budget of 1024 bytes; in use: weights 768"
        );
        assert_eq!(ledger.usage().total_live_bytes(), 768);
        assert_eq!(ledger.set_budget(Some(512)), Some(1024));
        assert!(ledger.charge(1, Category::Activations).is_err());
        assert_eq!((ledger.set_budget(None), ledger.usage().total_live_bytes()), (Some(512), 768));
        assert!(ledger.charge(1 << 40, Category::Activations).is_ok());
        assert_eq!(ledger.set_budget(Some(1024)), None);
        drop(held);
        assert!(ledger.charge(1024, Category::Activations).is_ok());
    }

    #[test]
    fn absurd_sizes_are_errors() {
        let ledger = Ledger::new("cpu", None);
        assert!(matches!(ledger.charge(usize::MAX, Category::Weights), Err(Error::OutOfMemory { .. })));
    }
}
