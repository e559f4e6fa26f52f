//! Threads that share the work of one operator after another.
//!
//! Generating a token calls a hundred operators of tens of microseconds. Putting a thread to sleep between two of them and waking it
//! again takes as long as such an operator, so threads look out for more work for a while before they sleep, whoever calls takes
//! part, and nobody waits for a thread that has not yet begun.

use std::{
    any::Any,
    cell::UnsafeCell,
    hint,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

/// How often a thread looks for more work before it sleeps: about a tenth of a millisecond.
const LOOKS: u32 = 4000;
/// How often a caller looks whether others have finished before it lets somebody else have the processor.
const PATIENCE: u32 = 1000;

// The state is one word, so that joining a job and finding it closed exclude each other.
/// A job may be joined.
const OPEN: u64 = 1;
/// The team is at its end.
const STOP: u64 = 2;
/// One thread that has joined the job and not left it.
const MEMBER: u64 = 4;
const MEMBERS: u64 = (1 << 32) - MEMBER;
/// Jobs are told apart by a number above these bits.
const JOB: u64 = 1 << 32;

fn job_of(state: u64) -> u64 {
    state / JOB
}

#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    num_threads: usize,
}

struct Shared {
    state: AtomicU64,
    /// Written while no job is open and none has members; read by members.
    job: UnsafeCell<Option<Job>>,
    /// What a thread panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// For each thread, whether it has to be woken.
    asleep: Vec<AtomicBool>,
    looks: u32,
}

#[allow(unsafe_code, reason = "threads read the job that a caller has written")]
// SAFETY: see `Shared::job`: `state` orders the writes before the reads. What a job points to is `Sync`, and outlives the job because
// its caller waits until nobody is a member.
unsafe impl Sync for Shared {}

#[allow(unsafe_code, reason = "see `Sync`")]
// SAFETY: as above.
unsafe impl Send for Shared {}

/// A caller's own thread and others that help it.
pub(crate) struct Team {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Held by the caller whose job it is.
    busy: Mutex<()>,
}

impl Team {
    /// A team of `num_threads`, of which one is whoever calls.
    ///
    /// # Errors
    /// What the system says where it does not start a thread.
    pub(crate) fn new(num_threads: usize) -> std::io::Result<Self> {
        let others = num_threads.saturating_sub(1);
        // With more threads than cores, one that looks out takes a core from one that works.
        let looks = if num_threads > available() { 1 } else { LOOKS };
        // Those that did start are stopped where another one does not.
        let mut team = Self::of(Shared::new(others, looks));
        for index in 0..others {
            let shared = Arc::clone(&team.shared);
            let thread = thread::Builder::new().name(format!("unsloth-cpu-{}", index + 1));
            team.threads.push(thread.spawn(move || shared.serve(index))?);
        }
        Ok(team)
    }

    /// Nobody but whoever calls.
    pub(crate) fn alone() -> Self {
        Self::of(Shared::new(0, 0))
    }

    fn of(shared: Shared) -> Self {
        Self { shared: Arc::new(shared), threads: Vec::new(), busy: Mutex::new(()) }
    }

    /// Threads, the caller's own included.
    pub(crate) fn num_threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `work(0)` here, and `work(i)` on threads `i` below `num_threads` that are free before it has returned. The calls have to
    /// share what is to be done: any of the others may never come. Returns when all that were begun have returned. Where the team is busy
    /// with another caller's work, or this is called by such work, there is only the call here.
    ///
    /// # Panics
    /// As `work` does, on whichever thread.
    pub(crate) fn run(&self, num_threads: usize, work: impl Fn(usize) + Sync) {
        let others = num_threads.min(self.num_threads()) - 1;
        let busy = match self.busy.try_lock() {
            _ if others == 0 => None,
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if busy.is_none() {
            return work(0);
        }
        let job = self.shared.open(&work, others + 1);
        for (thread, asleep) in self.threads[..others].iter().zip(&self.shared.asleep) {
            if asleep.load(Ordering::SeqCst) {
                thread.thread().unpark();
            }
        }
        work(0);
        drop(job);
        let panic = lock(&self.shared.panic).take();
        drop(busy);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.state.fetch_or(STOP, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A thread catches the panics of its jobs, so there is nothing to hear of.
            let _ = thread.join();
        }
    }
}

/// A job that threads may join, until it is dropped.
struct OpenJob<'a>(&'a Shared);

impl Drop for OpenJob<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0;
        while state & MEMBERS != 0 {
            if looks < PATIENCE {
                looks += 1;
                hint::spin_loop();
            } else {
                thread::yield_now();
            }
            state = self.0.state.load(Ordering::Acquire);
        }
    }
}

impl Shared {
    fn new(others: usize, looks: u32) -> Self {
        let asleep = (0..others).map(|_| AtomicBool::new(false)).collect();
        let (state, job) = (AtomicU64::new(0), UnsafeCell::new(None));
        Self { state, job, panic: Mutex::new(None), asleep, looks }
    }

    /// The caller keeps `work` until what this gives is dropped, and opens one job at a time.
    fn open<'a>(&'a self, work: &'a (dyn Fn(usize) + Sync), num_threads: usize) -> OpenJob<'a> {
        #[allow(unsafe_code, reason = "threads outlive the work that they are given")]
        // SAFETY: only the lifetime changes. Members alone call the work, and dropping `OpenJob`, which borrows it, waits for them.
        let work = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + 'a), *const (dyn Fn(usize) + Sync + 'static)>(work)
        };
        #[allow(unsafe_code, reason = "the job is written through a shared reference")]
        // SAFETY: no job is open and none has members, so nobody reads.
        unsafe {
            *self.job.get() = Some(Job { work, num_threads });
        }
        // Where the last caller panicked as well, nobody has heard of this one.
        *lock(&self.panic) = None;
        let before = self.state.load(Ordering::Relaxed);
        self.state.store(before.wrapping_add(JOB) | OPEN, Ordering::SeqCst);
        OpenJob(self)
    }

    /// What thread `index` of the others does.
    fn serve(&self, index: usize) {
        let mut last = 0;
        loop {
            let state = self.next(index, last);
            if state & STOP != 0 {
                return;
            }
            last = match self.join(state) {
                Ok(state) => {
                    self.work(index + 1);
                    // Gives the work back to its caller.
                    self.state.fetch_sub(MEMBER, Ordering::Release);
                    job_of(state)
                }
                Err(state) => job_of(state),
            };
        }
    }

    /// The state once there is another job than `last`, or the end.
    fn next(&self, index: usize, last: u64) -> u64 {
        let is_new = |state: u64| job_of(state) != last || state & STOP != 0;
        loop {
            for _ in 0..self.looks {
                let state = self.state.load(Ordering::Acquire);
                if is_new(state) {
                    return state;
                }
                hint::spin_loop();
            }
            // Whoever opens a job looks here after it is open, and this looks for one after saying so: one sees the other.
            self.asleep[index].store(true, Ordering::SeqCst);
            if !is_new(self.state.load(Ordering::SeqCst)) {
                thread::park();
            }
            self.asleep[index].store(false, Ordering::SeqCst);
        }
    }

    /// Becomes a member of the job that is open, and gives the state found; an error where none is.
    fn join(&self, mut state: u64) -> Result<u64, u64> {
        while state & OPEN != 0 {
            match self.state.compare_exchange_weak(state, state + MEMBER, Ordering::Acquire, Ordering::Relaxed) {
                Ok(state) => return Ok(state),
                Err(now) => state = now,
            }
        }
        Err(state)
    }

    /// A member's share.
    fn work(&self, thread: usize) {
        #[allow(unsafe_code, reason = "the job belongs to a caller on another thread")]
        // SAFETY: this thread is a member: the job was written before it was open, and stays until this thread has left.
        let job = unsafe { *self.job.get() };
        let Some(Job { work, .. }) = job.filter(|job| thread < job.num_threads) else { return };
        #[allow(unsafe_code, reason = "as above")]
        // SAFETY: as above; a caller keeps its work for as long as its job has members.
        let work = unsafe { &*work };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(thread))) {
            lock(&self.panic).get_or_insert(panic);
        }
    }
}

/// Threads that the system lets this program have at once.
pub(crate) fn available() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// What is locked here stays whole when a holder panics.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Every item of every job is done once and by the time its job returns, whether threads are awake or asleep.
    #[test]
    fn jobs_are_complete_when_they_return() {
        for num_threads in 1..5 {
            let team = Team::new(num_threads).unwrap();
            for round in 0..2000 {
                let items: Vec<AtomicUsize> = (0..round % 37).map(|_| AtomicUsize::new(0)).collect();
                let next = AtomicUsize::new(0);
                team.run(1 + round % 4, |thread| {
                    assert!(thread < num_threads.min(1 + round % 4));
                    while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                        item.fetch_add(round + 1, Ordering::Relaxed);
                    }
                });
                assert!(items.iter().all(|item| item.load(Ordering::Relaxed) == round + 1), "{num_threads} {round}");
                if round % 500 == 0 {
                    thread::sleep(std::time::Duration::from_millis(3));
                }
            }
        }
    }

    /// All threads take part in work that goes on until they have.
    #[test]
    fn sleepers_are_woken() {
        let team = Team::new(3).unwrap();
        for _ in 0..20 {
            thread::sleep(std::time::Duration::from_millis(2));
            let present = AtomicUsize::new(0);
            team.run(3, |_| {
                present.fetch_add(1, Ordering::Relaxed);
                while present.load(Ordering::Relaxed) < 3 {
                    thread::yield_now();
                }
            });
        }
    }

    /// Work within work, and work of two callers at once, is done by whoever calls.
    #[test]
    fn a_busy_team_leaves_work_to_its_caller() {
        let team = Team::new(2).unwrap();
        let count = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let done = AtomicBool::new(false);
                        team.run(2, |_| {
                            if !done.swap(true, Ordering::Relaxed) {
                                team.run(2, |thread| {
                                    assert_eq!(thread, 0);
                                    count.fetch_add(1, Ordering::Relaxed);
                                });
                            }
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 1000);
    }

    /// A panic reaches the caller from any thread, and the team goes on.
    #[test]
    fn a_panic_is_the_callers() {
        let team = Team::new(2).unwrap();
        for culprit in 0..2 {
            let present = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.run(2, |thread| {
                    present.fetch_add(1, Ordering::Relaxed);
                    while present.load(Ordering::Relaxed) < 2 {
                        thread::yield_now();
                    }
                    assert_ne!(thread, culprit, "on purpose");
                });
            }));
            assert!(result.is_err());
        }
        let count = AtomicUsize::new(0);
        team.run(2, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert!(count.into_inner() >= 1);
    }
}
