//! What tasks on several threads share: scratch and disjoint pieces of the outputs.

use std::{
    marker::PhantomData,
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use unsloth_core::Result;

use crate::{CpuBackend, team::lock};

/// A slice of which tasks write disjoint ranges, each contiguous but interleaved with the ranges of other tasks.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

#[allow(unsafe_code, reason = "rows of one head are not one contiguous slice that could be split safely")]
// SAFETY: `piece`, the only access, demands ranges that no other task uses; elements are sent between threads as with any
// `&mut [T]`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

#[allow(unsafe_code, reason = "see `Sync`")]
// SAFETY: as for a `&mut [T]`.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// # Safety
    /// While the piece lives, no other piece may overlap it.
    #[allow(unsafe_code, reason = "the caller promises that ranges do not overlap")]
    #[allow(clippy::mut_from_ref, reason = "pieces are disjoint by the caller's promise")]
    pub(crate) unsafe fn piece(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a task writes inside the slice");
        // SAFETY: the range lies in the slice (asserted), which is borrowed mutably for `'a`; nobody else holds a part of
        // this range (promised by the caller).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

impl CpuBackend {
    /// Runs `work(task, scratch)` for every task, on one thread each, with `scratch_len` f32 of arbitrary contents. There is one
    /// scratch per thread, taken before the first task, so that memory does not depend on how tasks are scheduled. A single
    /// task runs on the calling thread.
    pub(crate) fn for_each_task<Task: Sync>(
        &self,
        tasks: &[Task],
        scratch_len: usize,
        work: impl Fn(&Task, &mut [f32]) + Sync,
    ) -> Result<()> {
        self.for_each_task_on(if tasks.len() < 2 { 1 } else { self.num_threads() }, tasks, scratch_len, work)
    }

    /// [`Self::for_each_task`] with scratch for `num_threads`: the calling thread alone, or all of the backend's.
    pub(crate) fn for_each_task_on<Task: Sync>(
        &self,
        num_threads: usize,
        tasks: &[Task],
        scratch_len: usize,
        work: impl Fn(&Task, &mut [f32]) + Sync,
    ) -> Result<()> {
        let mut scratch = self.workspace(num_threads * scratch_len)?;
        self.share_tasks(tasks, &mut scratch, (num_threads, scratch_len), work);
        Ok(())
    }

    /// [`Self::for_each_task`] with the caller's scratch, which holds `scratch_len` for each of `num_threads`: the calling thread
    /// alone, or all of the backend's.
    pub(crate) fn share_tasks<Task: Sync>(
        &self,
        tasks: &[Task],
        scratch: &mut [f32],
        (num_threads, scratch_len): (usize, usize),
        work: impl Fn(&Task, &mut [f32]) + Sync,
    ) {
        if num_threads == 1 {
            return tasks.iter().for_each(|task| work(task, &mut scratch[..scratch_len]));
        }
        // Each thread has a slab to itself; a lock that nobody else asks for says so to the compiler.
        let mut rest = &mut scratch[..num_threads * scratch_len];
        let mut slabs = Vec::with_capacity(num_threads);
        for _ in 0..num_threads {
            let (slab, others) = std::mem::take(&mut rest).split_at_mut(scratch_len);
            slabs.push(Mutex::new(slab));
            rest = others;
        }
        // Tasks are taken in their order as threads become free, so the small ones at the end even out what came before.
        let next = AtomicUsize::new(0);
        self.team().run(num_threads, |thread| {
            let mut slab = lock(&slabs[thread]);
            while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                work(task, &mut slab);
            }
        });
    }

    /// Calls `work` for every part, on all threads; for a single one on the calling thread. Parts are taken in their order as threads become
    /// free.
    pub(crate) fn for_each_part<P: Send>(
        &self,
        parts: impl IntoIterator<Item = P, IntoIter: Send>,
        work: impl Fn(P) + Sync,
    ) {
        let parts = parts.into_iter();
        if parts.size_hint().1.is_some_and(|len| len < 2) {
            return parts.for_each(work);
        }
        let parts = Mutex::new(parts);
        let next = || lock(&parts).next();
        self.team().run(self.num_threads(), |_| {
            while let Some(part) = next() {
                work(part);
            }
        });
    }

    /// What `work` makes of every part, in the order of the parts; on all threads.
    pub(crate) fn map_parts<P: Send, R: Send + Default>(
        &self,
        parts: impl IntoIterator<Item = P, IntoIter: Send + ExactSizeIterator>,
        work: impl Fn(P) -> R + Sync,
    ) -> Vec<R> {
        let parts = parts.into_iter();
        let mut results = Vec::new();
        results.resize_with(parts.len(), R::default);
        self.for_each_part(parts.zip(&mut results), |(part, result)| *result = work(part));
        results
    }
}
