//! Host memory for tensors of a device that goes on computing while it copies.
//!
//! [`DoubleBuffer::put`] begins a copy and returns. Until it is complete the store holds the tensor, so that no operator writes into what
//! is read: one that would have worked in place makes a buffer of its own. Two copies are under way at most. The third put waits for
//! the first one's; what the device's account holds therefore depends on the order of calls alone, never on how fast a copy was, and a
//! plan that makes the same calls holds the same.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use unsloth_core::{Category, Error, Result, StoreUsage, StoredTensor, Tensor, TensorStore, Transfers};

use crate::{Charge, Layout, Ledger};

/// How a device copies without anyone waiting.
pub trait Copies: Send + Sync + 'static {
    /// A copy on its way to the host. Dropping it before it was finished must be harmless.
    type Copy: Send;
    /// What a tensor holds, in host memory.
    type Contents: Send;

    /// Begins to copy what the tensor holds once everything launched so far has run.
    ///
    /// # Errors
    /// [`Error::Launch`] if the device has failed; [`Error::Device`] for a tensor of another one.
    fn begin(&self, tensor: &Tensor) -> Result<Self::Copy>;

    /// Waits for a copy.
    ///
    /// # Errors
    /// [`Error::Launch`] if it failed.
    fn finish(&self, copy: Self::Copy) -> Result<Self::Contents>;

    /// Bytes of these contents in memory that the system does not move, as far as the runtime tells.
    fn pinned_bytes(&self, contents: &Self::Contents) -> usize;

    /// A new tensor, an activation, with these contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Launch`] if the device has failed.
    fn restore(&self, contents: Self::Contents, layout: &Layout) -> Result<Tensor>;
}

/// Copies to the host that are under way at the same time: one that is made, and one that waits for it.
const MOST_LEAVING: usize = 2;

/// Host memory for tensors of one device. It has an account of its own, beside the device's.
pub struct DoubleBuffer<C: Copies>(Arc<Shared<C>>);

/// What the store and its tensors have in common.
struct Shared<C: Copies> {
    copies: C,
    ledger: Arc<Ledger>,
    /// Of what is kept, what the system does not move.
    pinned: Arc<Ledger>,
    counts: Mutex<[Transfers; 2]>,
    /// Slots whose tensors may still be read by the device, the oldest first.
    leaving: Mutex<VecDeque<Arc<Slot<C>>>>,
}

type Slot<C> = Mutex<State<C>>;

enum State<C: Copies> {
    /// Still on the device.
    Leaving(Tensor, C::Copy),
    Kept(C::Contents, Charge),
    /// Its copy failed, and whoever waited for it was told.
    Lost,
    Taken,
}

/// A tensor whose copy failed.
#[derive(Debug, thiserror::Error)]
#[error("its copy to the host failed before")]
struct CopyFailed;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Everything behind these locks is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<C: Copies> DoubleBuffer<C> {
    /// An empty store.
    pub fn new(copies: C) -> Self {
        let (ledger, pinned) = (Ledger::new("host", None), Ledger::new("pinned host memory", None));
        let (counts, leaving) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Shared { copies, ledger, pinned, counts, leaving }))
    }
}

impl<C: Copies> TensorStore for DoubleBuffer<C> {
    fn put(&self, tensor: &Tensor) -> Result<Box<dyn StoredTensor>> {
        let (start, shared, layout) = (Instant::now(), self.0.clone(), Layout::of(tensor));
        shared.settle_down_to(MOST_LEAVING - 1)?;
        let charge = shared.ledger.charge(layout.bytes(), Category::Activations)?;
        let copy = shared.copies.begin(tensor)?;
        let slot = Arc::new(Mutex::new(State::Leaving(tensor.clone(), copy)));
        lock(&shared.leaving).push_back(slot.clone());
        lock(&shared.counts)[0].add(layout.bytes() as u64, start.elapsed());
        Ok(Box::new(Away { shared, slot, layout, _charge: charge }))
    }

    fn settle(&self) -> Result<()> {
        let start = Instant::now();
        let settled = self.0.settle_down_to(0);
        self.0.waited(0, start.elapsed());
        settled
    }

    fn usage(&self) -> StoreUsage {
        let usage = super::usage(&self.0.ledger, *lock(&self.0.counts));
        StoreUsage { pinned_peak_bytes: self.0.pinned.usage().total_peak_bytes(), ..usage }
    }
}

impl<C: Copies> Shared<C> {
    /// Waits for the oldest copies until so many are under way.
    fn settle_down_to(&self, most: usize) -> Result<()> {
        let mut leaving = lock(&self.leaving);
        while leaving.len() > most
            && let Some(oldest) = leaving.pop_front()
        {
            self.settle(&oldest)?;
        }
        Ok(())
    }

    fn settle(&self, slot: &Slot<C>) -> Result<()> {
        let mut state = lock(slot);
        match std::mem::replace(&mut *state, State::Lost) {
            State::Leaving(tensor, copy) => {
                let contents = self.copies.finish(copy)?;
                drop(tensor);
                let pinned = self.pinned.charge(self.copies.pinned_bytes(&contents), Category::Activations)?;
                *state = State::Kept(contents, pinned);
            }
            other => *state = other,
        }
        Ok(())
    }

    fn waited(&self, direction: usize, time: Duration) {
        lock(&self.counts)[direction].time += time;
    }
}

struct Away<C: Copies> {
    shared: Arc<Shared<C>>,
    slot: Arc<Slot<C>>,
    layout: Layout,
    _charge: Charge,
}

impl<C: Copies> Away<C> {
    /// What there is of it, which from now on nobody else looks for.
    fn remove(&self) -> State<C> {
        lock(&self.shared.leaving).retain(|slot| !Arc::ptr_eq(slot, &self.slot));
        std::mem::replace(&mut *lock(&self.slot), State::Taken)
    }

    fn restore(&self, contents: C::Contents) -> Result<Tensor> {
        let start = Instant::now();
        let tensor = self.shared.copies.restore(contents, &self.layout)?;
        lock(&self.shared.counts)[1].add(self.layout.bytes() as u64, start.elapsed());
        Ok(tensor)
    }
}

impl<C: Copies> StoredTensor for Away<C> {
    fn take(self: Box<Self>) -> Result<Tensor> {
        match self.remove() {
            State::Leaving(tensor, copy) => {
                // The device reads it until then; whoever takes it may write into it.
                let start = Instant::now();
                let contents = self.shared.copies.finish(copy);
                self.shared.waited(0, start.elapsed());
                let contents = contents?;
                if tensor.is_unique() {
                    tensor.retag(Category::Activations);
                    return Ok(tensor);
                }
                drop(tensor);
                self.restore(contents)
            }
            State::Kept(contents, _pinned) => self.restore(contents),
            State::Lost => {
                let device = self.layout.device.name();
                Err(Error::Launch { op: "take", device, source: Box::new(CopyFailed) })
            }
            State::Taken => panic!("a tensor is taken once"),
        }
    }
}

impl<C: Copies> Drop for Away<C> {
    fn drop(&mut self) {
        if let State::Leaving(tensor, copy) = self.remove() {
            // Nobody wants the contents, nor to know whether they arrived; but the device may still read the tensor.
            let _ = self.shared.copies.finish(copy);
            drop(tensor);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use unsloth_core::{Device, Place};

    use super::*;

    const LENGTH: usize = 64;
    const BYTES: u64 = 4 * LENGTH as u64;

    /// A device that copies when somebody waits for it, notes when that is, and can fail.
    #[derive(Default)]
    struct Slow {
        finished: Arc<Mutex<Vec<f32>>>,
        fails: Arc<AtomicBool>,
    }

    impl Copies for Slow {
        type Copy = Tensor;
        type Contents = Vec<f32>;

        fn begin(&self, tensor: &Tensor) -> Result<Tensor> {
            Ok(tensor.clone())
        }

        fn finish(&self, copy: Tensor) -> Result<Vec<f32>> {
            if self.fails.load(Relaxed) {
                return Err(Error::Launch { op: "copy", device: "slow".into(), source: "made to fail".into() });
            }
            let contents = copy.to_vec::<f32>()?;
            lock(&self.finished).push(contents[0]);
            Ok(contents)
        }

        fn pinned_bytes(&self, contents: &Vec<f32>) -> usize {
            size_of_val(contents.as_slice())
        }

        fn restore(&self, contents: Vec<f32>, layout: &Layout) -> Result<Tensor> {
            layout.device.from_slice(&contents, layout.shape, Category::Activations)
        }
    }

    fn put(store: &dyn TensorStore, device: &Device, first: f32) -> Box<dyn StoredTensor> {
        let values: Vec<f32> = (0..LENGTH).map(|i| first + i as f32).collect();
        store.put(&device.from_slice(&values, [LENGTH], Category::Optimiser).unwrap()).unwrap()
    }

    fn first(tensor: &Tensor) -> f32 {
        tensor.to_vec::<f32>().unwrap()[0]
    }

    #[test]
    fn two_are_under_way_and_a_third_waits_for_the_first() {
        let (device, slow) = (unsloth_cpu::device(), Slow::default());
        let finished = slow.finished.clone();
        let store = DoubleBuffer::new(slow);
        let mut stored = Vec::new();
        for i in 0..5 {
            stored.push(put(&store, &device, i as f32));
            let on_device = 2.min(i + 1);
            assert_eq!(lock(&finished).len(), i + 1 - on_device);
            assert_eq!(device.usage().total_live_bytes(), on_device as u64 * BYTES);
            assert_eq!(store.usage().live_bytes, (i + 1) as u64 * BYTES);
        }
        assert_eq!(*lock(&finished), [0.0, 1.0, 2.0]);
        // The last two have not left: they come back as they are, without a copy to the device.
        let mut taken: Vec<Tensor> = stored.drain(3..).rev().map(|stored| stored.take().unwrap()).collect();
        assert_eq!((store.usage().taken.num, device.usage().total_live_bytes()), (0, 2 * BYTES));
        taken.extend(stored.into_iter().rev().map(|stored| stored.take().unwrap()));
        assert_eq!(taken.iter().map(first).collect::<Vec<_>>(), [4.0, 3.0, 2.0, 1.0, 0.0]);
        assert_eq!(device.usage().live_bytes[Category::Activations.index()], 5 * BYTES);
        let usage = store.usage();
        assert_eq!((usage.put.num, usage.put.bytes, usage.taken.num, usage.taken.bytes), (5, 5 * BYTES, 3, 3 * BYTES));
        assert_eq!((usage.live_bytes, usage.peak_bytes, usage.pinned_peak_bytes), (0, 5 * BYTES, 3 * BYTES));
    }

    #[test]
    fn settled_is_off_the_device() {
        let (device, slow) = (unsloth_cpu::device(), Slow::default());
        let finished = slow.finished.clone();
        let store = DoubleBuffer::new(slow);
        let [a, b] = [1.0, 2.0].map(|first| put(&store, &device, first));
        store.settle().unwrap();
        assert_eq!((device.usage().total_live_bytes(), &*lock(&finished)), (0, &vec![1.0, 2.0]));
        assert_eq!([b, a].map(|stored| first(&stored.take().unwrap())), [2.0, 1.0]);
        assert_eq!(store.usage().taken.num, 2);
    }

    /// Whoever still has the tensor may not see what is done to the one that was taken.
    #[test]
    fn a_tensor_that_somebody_holds_is_not_given_twice() {
        let device = unsloth_cpu::device();
        let store = DoubleBuffer::new(Slow::default());
        let held = device.zeros([LENGTH], unsloth_core::DType::F32, Category::Activations).unwrap();
        let mut taken = store.put(&held).unwrap().take().unwrap();
        taken.write(&[1.0f32; LENGTH]).unwrap();
        assert_eq!((first(&held), first(&taken), store.usage().taken.num), (0.0, 1.0, 1));
    }

    #[test]
    fn what_is_dropped_is_gone_and_was_waited_for() {
        let (device, slow) = (unsloth_cpu::device(), Slow::default());
        let finished = slow.finished.clone();
        let store = DoubleBuffer::new(slow);
        let stored: Vec<_> = (0..3).map(|i| put(&store, &device, i as f32)).collect();
        drop(stored);
        assert_eq!((device.usage().total_live_bytes(), store.usage().live_bytes), (0, 0));
        assert_eq!(*lock(&finished), [0.0, 1.0, 2.0]);
        assert_eq!(store.0.pinned.usage().total_live_bytes(), 0);
        assert!(lock(&store.0.leaving).is_empty());
    }

    #[test]
    fn a_copy_that_fails_is_told_at_the_next_put_and_at_its_own_take() {
        let (device, slow) = (unsloth_cpu::device(), Slow::default());
        let fails = slow.fails.clone();
        let store = DoubleBuffer::new(slow);
        let [a, b] = [1.0, 2.0].map(|first| put(&store, &device, first));
        fails.store(true, Relaxed);
        let third = device.from_slice(&[0.0f32; LENGTH], [LENGTH], Category::Activations).unwrap();
        let error = store.put(&third).map(drop).unwrap_err();
        assert_eq!(error.to_string(), "copy: launch failed on slow");
        assert_eq!(b.take().unwrap_err().to_string(), "copy: launch failed on slow");
        fails.store(false, Relaxed);
        let error = a.take().unwrap_err();
        assert_eq!(error.to_string(), "take: launch failed on cpu");
        let source = std::error::Error::source(&error).map(ToString::to_string);
        assert_eq!(source.as_deref(), Some("its copy to the host failed before"));
        // The store itself goes on.
        let stored = store.put(&third).unwrap();
        drop(third);
        assert_eq!((first(&stored.take().unwrap()), store.usage().live_bytes), (0.0, 0));
    }

    #[test]
    fn a_store_that_waits_settles_at_once() {
        let device = unsloth_cpu::device();
        let store = device.store(&Place::Host).unwrap();
        let stored = put(&*store, &device, 1.0);
        assert_eq!(device.usage().total_live_bytes(), 0);
        store.settle().unwrap();
        assert_eq!(first(&stored.take().unwrap()), 1.0);
    }
}
