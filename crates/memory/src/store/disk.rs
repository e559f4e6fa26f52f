//! Tensors in files, written and read by a thread while their device computes.
//!
//! [`DiskStore::put`] copies a tensor to host memory and returns; the thread writes it. The newest tensor stays in memory besides, as a
//! backward pass takes it first, and while one is used the thread reads the one that was put before it: at most two are in
//! memory at a time, or three where something is put between takes. Takes in another order are right as well, and wait.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use unsloth_core::{Category, Error, Result, StoreUsage, StoredTensor, Tensor, TensorStore, Transfers};

use super::usage;
use crate::{Charge, HostBlock, Layout, Ledger, Staging};

pub(super) struct DiskStore {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What store, tensors and thread have in common.
struct Shared {
    /// What is in memory on its way.
    staging: Arc<Staging>,
    folder: Arc<Path>,
    /// Of what is in files, or to be.
    ledger: Arc<Ledger>,
    queue: Mutex<Queue>,
    /// Something in the queue has changed.
    changed: Condvar,
    /// Number of the tensor that was put last.
    newest: AtomicU64,
    counts: Mutex<[Transfers; 2]>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Of the jobs, and of what the thread is at, tensors to be written.
    num_writes: usize,
    is_closed: bool,
    /// What has been put and may not have been taken, in this order.
    stack: Vec<Weak<Slot>>,
    /// What is read ahead and not yet taken.
    ahead: Weak<Slot>,
}

enum Job {
    Write(Arc<Slot>),
    Read(Arc<Slot>),
}

/// A tensor on its way to a file and back.
struct Slot {
    number: u64,
    bytes: usize,
    contents: Mutex<Contents>,
    /// `contents` has changed.
    changed: Condvar,
}

enum Contents {
    /// Not in a file yet.
    InMemory(Arc<HostBlock>),
    /// In a file, and while nothing newer has been put, in memory too.
    InFile(File, u32, Option<Arc<HostBlock>>),
    /// The thread reads it.
    Reading,
    /// Back from its file.
    Read(Arc<HostBlock>),
    /// What the thread has met.
    Failed(Error),
    /// Nothing is left of it.
    Taken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Everything behind these locks is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

impl DiskStore {
    /// Files in this folder.
    ///
    /// # Errors
    /// [`Error::Storage`] if no file can be made there, or no thread.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        // Found out now rather than in the middle of a step.
        new_file(folder)?;
        let shared = Arc::new(Shared {
            staging: Staging::new(None),
            folder: folder.into(),
            ledger: Ledger::new("disk", None),
            queue: Mutex::default(),
            changed: Condvar::new(),
            newest: AtomicU64::new(0),
            counts: Mutex::default(),
        });
        let worker = shared.clone();
        let thread = std::thread::Builder::new().name("unsloth-offload".to_owned()).spawn(move || worker.work());
        Ok(Self { shared, thread: Some(thread.map_err(failed("start a thread for", folder))?) })
    }
}

impl Drop for DiskStore {
    fn drop(&mut self) {
        lock(&self.shared.queue).is_closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has no way to fail: what goes wrong stays with the tensor.
            let _ = thread.join();
        }
    }
}

impl TensorStore for DiskStore {
    fn put(&self, tensor: &Tensor) -> Result<Box<dyn StoredTensor>> {
        let (start, shared, layout) = (Instant::now(), self.shared.clone(), Layout::of(tensor));
        let charge = shared.ledger.charge(layout.bytes(), Category::Activations)?;
        let block = Arc::new(shared.staging.read(tensor)?);
        let slot = shared.write_behind(block, layout.bytes());
        shared.count(0, layout.bytes(), start.elapsed());
        Ok(Box::new(InFile { shared, slot, layout, _charge: charge }))
    }

    fn usage(&self) -> StoreUsage {
        usage(&self.shared.ledger, *lock(&self.shared.counts))
    }
}

struct InFile {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    layout: Layout,
    _charge: Charge,
}

impl StoredTensor for InFile {
    fn take(self: Box<Self>) -> Result<Tensor> {
        let start = Instant::now();
        let block = self.shared.contents(&self.slot)?;
        self.shared.read_ahead();
        let tensor = self.shared.staging.write(&block, &self.layout)?;
        self.shared.count(1, self.layout.bytes(), start.elapsed());
        Ok(tensor)
    }
}

impl Drop for InFile {
    fn drop(&mut self) {
        *lock(&self.slot.contents) = Contents::Taken;
    }
}

impl Shared {
    fn count(&self, direction: usize, bytes: usize, time: Duration) {
        lock(&self.counts)[direction].add(bytes as u64, time);
    }

    /// Hands a tensor to the thread, once that has written the one before.
    fn write_behind(&self, block: Arc<HostBlock>, bytes: usize) -> Arc<Slot> {
        let mut queue = lock(&self.queue);
        while queue.num_writes > 0 {
            queue = wait(&self.changed, queue);
        }
        let number = self.newest.load(Ordering::Relaxed) + 1;
        let contents = Mutex::new(Contents::InMemory(block));
        let slot = Arc::new(Slot { number, bytes, contents, changed: Condvar::new() });
        // The one before need not be in memory any more.
        self.newest.store(number, Ordering::Relaxed);
        if let Some(before) = queue.stack.last().and_then(Weak::upgrade)
            && let Contents::InFile(_, _, block) = &mut *lock(&before.contents)
        {
            *block = None;
        }
        queue.stack.retain(|slot| slot.strong_count() > 0);
        queue.stack.push(Arc::downgrade(&slot));
        queue.jobs.push_back(Job::Write(slot.clone()));
        queue.num_writes += 1;
        self.changed.notify_all();
        slot
    }

    /// Takes what a tensor holds, from memory where it is there.
    fn contents(&self, slot: &Slot) -> Result<Arc<HostBlock>> {
        let mut contents = lock(&slot.contents);
        while matches!(*contents, Contents::Reading) {
            contents = wait(&slot.changed, contents);
        }
        match std::mem::replace(&mut *contents, Contents::Taken) {
            Contents::InMemory(block) | Contents::Read(block) | Contents::InFile(_, _, Some(block)) => Ok(block),
            Contents::InFile(file, checksum, None) => Ok(Arc::new(self.read(file, checksum, slot.bytes)?)),
            Contents::Failed(error) => Err(error),
            Contents::Reading | Contents::Taken => panic!("a tensor is taken once, and waited for before"),
        }
    }

    /// Has the thread read what a backward pass takes next, if nothing else is read ahead.
    fn read_ahead(&self) {
        let mut queue = lock(&self.queue);
        let is_left = |slot: &Arc<Slot>| !matches!(*lock(&slot.contents), Contents::Taken);
        if queue.ahead.upgrade().is_some_and(|slot| is_left(&slot)) {
            return;
        }
        while let Some(last) = queue.stack.last() {
            match last.upgrade().filter(is_left) {
                None => drop(queue.stack.pop()),
                Some(slot) => {
                    queue.ahead = Arc::downgrade(&slot);
                    queue.jobs.push_back(Job::Read(slot));
                    self.changed.notify_all();
                    return;
                }
            }
        }
    }

    /// What the thread does until the store is dropped. What has not been written then is in memory.
    fn work(&self) {
        let mut queue = lock(&self.queue);
        while !queue.is_closed {
            let Some(job) = queue.jobs.pop_front() else {
                queue = wait(&self.changed, queue);
                continue;
            };
            drop(queue);
            let is_write = matches!(job, Job::Write(_));
            match job {
                Job::Write(slot) => self.write_slot(&slot),
                Job::Read(slot) => self.read_slot(&slot),
            }
            queue = lock(&self.queue);
            queue.num_writes -= usize::from(is_write);
            self.changed.notify_all();
        }
    }

    fn write_slot(&self, slot: &Slot) {
        let block = match &*lock(&slot.contents) {
            Contents::InMemory(block) => block.clone(),
            // Taken or dropped already.
            _ => return,
        };
        let written = self.write(block.as_slice());
        let mut contents = lock(&slot.contents);
        // It may have been taken meanwhile.
        if matches!(*contents, Contents::InMemory(_)) {
            let is_newest = self.newest.load(Ordering::Relaxed) == slot.number;
            *contents = match written {
                Ok((file, checksum)) => Contents::InFile(file, checksum, is_newest.then_some(block)),
                Err(error) => Contents::Failed(error),
            };
        }
    }

    fn read_slot(&self, slot: &Slot) {
        let mut contents = lock(&slot.contents);
        let (file, checksum) = match std::mem::replace(&mut *contents, Contents::Reading) {
            Contents::InFile(file, checksum, None) => (file, checksum),
            // It is in memory, or has been taken.
            other => return *contents = other,
        };
        drop(contents);
        let read = self.read(file, checksum, slot.bytes);
        let mut contents = lock(&slot.contents);
        if matches!(*contents, Contents::Reading) {
            *contents = read.map_or_else(Contents::Failed, |block| Contents::Read(Arc::new(block)));
        }
        slot.changed.notify_all();
    }

    fn write(&self, bytes: &[u8]) -> Result<(File, u32)> {
        let mut file = new_file(&self.folder)?;
        file.write_all(bytes).map_err(failed("write", &self.folder))?;
        Ok((file, crc32fast::hash(bytes)))
    }

    fn read(&self, mut file: File, expected: u32, bytes: usize) -> Result<HostBlock> {
        let mut block = self.staging.empty(bytes)?;
        let read = file.rewind().and_then(|()| file.read_exact(block.as_mut_slice()));
        read.map_err(failed("read", &self.folder))?;
        let actual = crc32fast::hash(block.as_slice());
        if expected != actual {
            return Err(Error::Damaged { folder: PathBuf::from(&*self.folder), expected, actual });
        }
        Ok(block)
    }
}

/// A file that has no name, so that nothing is left behind however the process ends.
fn new_file(folder: &Path) -> Result<File> {
    tempfile::tempfile_in(folder).map_err(failed("create", folder))
}

fn failed(action: &'static str, folder: &Path) -> impl FnOnce(io::Error) -> Error {
    let folder = folder.to_owned();
    move |source| Error::Storage { action, folder, source }
}

#[cfg(test)]
mod tests {
    use std::io::SeekFrom;

    use unsloth_core::{DType, Device};

    use super::*;

    const LENGTH: usize = 3000;

    fn tensor(device: &Device, first: f32) -> Tensor {
        let values: Vec<f32> = (0..LENGTH).map(|i| first + i as f32).collect();
        device.from_slice(&values, [LENGTH], Category::Activations).unwrap()
    }

    /// A store, and as many tensors in it, as the store knows them.
    fn filled(folder: &Path, count: usize) -> (Device, DiskStore, Vec<InFile>) {
        let (device, store) = (unsloth_cpu::device(), DiskStore::open(folder).unwrap());
        let put = |i: usize| {
            let tensor = tensor(&device, i as f32);
            let (shared, layout) = (store.shared.clone(), Layout::of(&tensor));
            let charge = shared.ledger.charge(layout.bytes(), Category::Activations).unwrap();
            let slot = shared.write_behind(Arc::new(shared.staging.read(&tensor).unwrap()), layout.bytes());
            InFile { shared, slot, layout, _charge: charge }
        };
        let stored = (0..count).map(put).collect();
        (device, store, stored)
    }

    /// Waits until the thread has nothing to do.
    fn settled(store: &DiskStore) {
        let busy = || {
            let queue = lock(&store.shared.queue);
            queue.num_writes > 0 || !queue.jobs.is_empty()
        };
        while busy() {
            std::thread::yield_now();
        }
    }

    fn values(stored: InFile) -> Result<Vec<f32>> {
        Box::new(stored).take()?.to_vec()
    }

    fn expected(i: usize) -> Vec<f32> {
        (0..LENGTH).map(|element| i as f32 + element as f32).collect()
    }

    #[test]
    fn takes_in_any_order_give_what_was_put() {
        let folder = tempfile::tempdir().unwrap();
        for order in [vec![5, 4, 3, 2, 1, 0], vec![0, 1, 2, 3, 4, 5], vec![2, 5, 0, 4, 1, 3]] {
            let (_device, _store, stored) = filled(folder.path(), 6);
            let mut stored: Vec<_> = stored.into_iter().map(Some).collect();
            for i in order {
                assert_eq!(values(stored[i].take().unwrap()).unwrap(), expected(i), "{i}");
            }
        }
    }

    #[test]
    fn puts_between_takes_are_taken_too() {
        let folder = tempfile::tempdir().unwrap();
        let (device, store, mut stored) = filled(folder.path(), 4);
        assert_eq!(values(stored.pop().unwrap()).unwrap(), expected(3));
        let between = store.put(&tensor(&device, 9.0)).unwrap();
        assert_eq!(values(stored.pop().unwrap()).unwrap(), expected(2));
        assert_eq!(between.take().unwrap().to_vec::<f32>().unwrap(), expected(9));
        assert_eq!(values(stored.pop().unwrap()).unwrap(), expected(1));
        drop(store);
        // What is left can be taken without the thread.
        assert_eq!(values(stored.pop().unwrap()).unwrap(), expected(0));
    }

    #[test]
    fn two_are_in_memory_at_most() {
        let folder = tempfile::tempdir().unwrap();
        let (_device, store, stored) = filled(folder.path(), 10);
        for (i, stored) in stored.into_iter().enumerate().rev() {
            assert_eq!(values(stored).unwrap(), expected(i));
        }
        let most = store.shared.staging.pool().ledger().usage().total_peak_bytes();
        assert!(most <= 2 * (4 * LENGTH as u64).next_multiple_of(256), "{most}");
    }

    #[test]
    fn what_comes_next_is_read_ahead() {
        let folder = tempfile::tempdir().unwrap();
        let (_device, store, mut stored) = filled(folder.path(), 3);
        settled(&store);
        let state = |stored: &InFile| match &*lock(&stored.slot.contents) {
            Contents::InFile(_, _, None) => "in its file",
            Contents::InFile(_, _, Some(_)) => "in both",
            Contents::Read(_) => "read",
            _ => "elsewhere",
        };
        assert_eq!([0, 1, 2].map(|i| state(&stored[i])), ["in its file", "in its file", "in both"]);
        values(stored.pop().unwrap()).unwrap();
        let ahead = &stored[1].slot;
        let mut contents = lock(&ahead.contents);
        while !matches!(*contents, Contents::Read(_)) {
            drop(contents);
            std::thread::yield_now();
            contents = lock(&ahead.contents);
        }
        drop(contents);
        assert_eq!([0, 1].map(|i| state(&stored[i])), ["in its file", "read"]);
    }

    #[test]
    fn damage_is_found_and_named_whether_read_ahead_or_not() {
        type Spoil = fn(&mut File);
        fn flip(file: &mut File) {
            file.seek(SeekFrom::Start(100)).unwrap();
            file.write_all(&[0xFF]).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        let cases: [(Spoil, &str); 2] =
            [(flip, "is damaged"), (|file| file.set_len(1000).unwrap(), "cannot read a temporary file in `")];
        for (spoil, message) in cases {
            for ahead in [false, true] {
                let (_device, store, mut stored) = filled(folder.path(), 3);
                settled(&store);
                if let Contents::InFile(file, ..) = &mut *lock(&stored[1].slot.contents) {
                    spoil(file);
                }
                let last = stored.pop().unwrap();
                if ahead {
                    values(last).unwrap();
                }
                let error = values(stored.pop().unwrap()).unwrap_err().to_string();
                let place = folder.path().display().to_string();
                assert!(error.contains(message) && error.contains(&place), "read ahead: {ahead}: {error}");
            }
        }
    }

    #[test]
    fn a_write_that_fails_is_told_when_its_tensor_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::create_dir(&path).unwrap();
        let (device, store, _) = filled(&path, 0);
        std::fs::remove_dir(&path).unwrap();
        let stored = [0.0, 1.0].map(|first| store.put(&tensor(&device, first)).unwrap());
        settled(&store);
        for stored in stored.into_iter().rev() {
            let error = stored.take().unwrap_err().to_string();
            assert_eq!(error, format!("cannot create a temporary file in `{}`", path.display()));
        }
        assert_eq!(store.usage().live_bytes, 0);
    }

    #[test]
    fn what_is_dropped_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let (_device, store, mut stored) = filled(folder.path(), 5);
        stored.truncate(2);
        assert_eq!(store.usage().live_bytes, 2 * (4 * LENGTH as u64).next_multiple_of(256));
        for i in [1, 0] {
            let found = stored.pop().unwrap();
            assert_eq!((found.layout.dtype, values(found).unwrap()), (DType::F32, expected(i)));
        }
        settled(&store);
        assert_eq!(store.shared.staging.pool().ledger().usage().total_live_bytes(), 0);
    }
}
