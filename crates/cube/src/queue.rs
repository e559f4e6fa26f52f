//! What a backend sends its device, in which order, and what became of it.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker},
};

use cubecl::{
    MemoryUsage,
    bytes::Bytes,
    device::Device as _,
    prelude::*,
    server::{Handle, ServerError},
    stream_id::StreamId,
};
use unsloth_common::LaunchError;
use unsloth_core::{Category, Error, Result};
use unsloth_memory::{Charge, Ledger};

use crate::poison::{self, Panicked};

/// A copy to the host that is under way.
pub(crate) type Read = Pin<Box<dyn Future<Output = Result<Vec<Bytes>, ServerError>> + Send>>;

/// A device's two streams, its account, and the failures of its thread.
///
/// CubeCL gives each host thread a stream unless told otherwise. A queue has two of its own, which neither another backend on this thread
/// nor another thread on this backend changes: one for everything whose order matters, and one for copies to the host that run beside it.
pub(crate) struct Queue<R: Runtime> {
    client: ComputeClient<R>,
    name: String,
    device_id: (u16, u16),
    /// Of kernels, uploads and reads that are waited for.
    stream: StreamId,
    /// Of [`Queue::begin_read`].
    copies: StreamId,
    ledger: Arc<Ledger>,
    launched: Mutex<Vec<&'static str>>,
}

/// A stream that nobody else has: CubeCL numbers them by the threads that ask.
fn fresh_stream() -> StreamId {
    let asked = std::thread::spawn(StreamId::current).join();
    asked.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl<R: Runtime> Queue<R> {
    /// # Errors
    /// [`Error::Launch`] if the device cannot be opened, or has failed before.
    pub(crate) fn open(device: &R::Device, name: String, budget_bytes: Option<u64>) -> Result<Self> {
        poison::watch();
        let id = device.to_id();
        let open = || (R::client(device), fresh_stream(), fresh_stream());
        let (client, stream, copies) = poison::caught("open device", &name, open)?;
        let queue = Self {
            client,
            device_id: (id.type_id, id.index_id),
            stream,
            copies,
            ledger: Ledger::new(name.clone(), budget_bytes),
            name,
            launched: Mutex::new(Vec::new()),
        };
        queue.check("open device")?;
        Ok(queue)
    }

    /// For what is asked of a device; what is launched goes through [`Queue::launch`].
    pub(crate) fn client(&self) -> &ComputeClient<R> {
        &self.client
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    pub(crate) fn launch(
        &self,
        op: &'static str,
        launch: impl FnOnce(&ComputeClient<R>) -> Result<(), LaunchError>,
    ) -> Result<()> {
        self.check(op)?;
        self.launched.lock().unwrap_or_else(PoisonError::into_inner).push(op);
        self.stream.executes(|| launch(&self.client)).map_err(|source| self.error(op, source))
    }

    /// # Errors
    /// [`Error::Launch`] if the device's thread has panicked.
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let Some(message) = poison::failure(self.device_id) else {
            return Ok(());
        };
        let launched = self.launched.lock().unwrap_or_else(PoisonError::into_inner);
        let launched = if launched.is_empty() { "nothing".to_owned() } else { launched.join(", ") };
        Err(self.error(op, Panicked { launched, message }))
    }

    /// Called when everything launched is known to have finished.
    fn finished(&self, op: &'static str) -> Result<()> {
        self.check(op)?;
        self.launched.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }

    pub(crate) fn error(&self, op: &'static str, source: impl std::error::Error + Send + Sync + 'static) -> Error {
        Error::Launch { op, device: self.name.clone(), source: Box::new(source) }
    }

    /// Room for `bytes`, checked against the budget and the largest buffer that the device binds to a kernel.
    pub(crate) fn reserve(&self, op: &'static str, bytes: usize, category: Category) -> Result<Charge> {
        let limit_bytes = self.client.properties().memory.max_page_size;
        if bytes as u64 > limit_bytes {
            let (device, requested_bytes) = (self.name.clone(), bytes as u64);
            return Err(Error::BufferTooLarge { op, device, requested_bytes, category, limit_bytes });
        }
        self.ledger.charge(bytes, category)
    }

    /// Devices copy whole words, and a buffer cannot be empty.
    fn padded(bytes: usize) -> usize {
        bytes.next_multiple_of(4).max(4)
    }

    /// A buffer of arbitrary contents.
    pub(crate) fn empty(&self, bytes: usize) -> Handle {
        self.stream.executes(|| self.client.empty(Self::padded(bytes)))
    }

    /// A buffer with these contents.
    pub(crate) fn upload(&self, bytes: &[u8]) -> Handle {
        let mut padded = Vec::with_capacity(Self::padded(bytes.len()));
        padded.extend_from_slice(bytes);
        padded.resize(Self::padded(bytes.len()), 0);
        self.upload_words(Bytes::from_bytes_vec(padded))
    }

    /// A buffer with the contents that were read of one. CubeCL copies them once on the host, into memory that is not pinned.
    pub(crate) fn upload_words(&self, bytes: Bytes) -> Handle {
        self.stream.executes(|| self.client.create(bytes))
    }

    /// What a buffer holds once everything launched has run.
    pub(crate) fn read(&self, op: &'static str, handle: Handle) -> Result<Bytes> {
        let bytes = self.stream.executes(|| self.client.read_one(handle));
        self.finished(op)?;
        bytes.map_err(|source| self.error(op, source))
    }

    /// Begins to copy what a buffer holds once everything launched so far has run. Nothing may write into the buffer until the copy has been
    /// waited for, which is for the caller to see to: what is launched later does not wait for it.
    ///
    /// The copy goes to a stream of its own. Where a stream is a queue of the device, as on CUDA, kernels run beside it; wgpu has
    /// one queue, in which the copy stands behind what was submitted before. CUDA makes the one stream wait for the other if a buffer of the
    /// read is *younger* than their last meeting: when it was made is noted, when a kernel last wrote to it is not. A buffer of a word,
    /// made here and read along, is always younger, so that the copy waits for everything that stands in the stream now.
    pub(crate) fn begin_read(&self, handle: Handle) -> Read {
        let (client, meeting) = (self.client.clone(), self.empty(0));
        let mut read: Read = Box::pin(async move {
            let read = client.read_async(vec![handle, meeting]);
            // The first poll ends here, with the copy under way: CUDA's would otherwise wait for it.
            let mut is_begun = false;
            poll_fn(|_| if std::mem::replace(&mut is_begun, true) { Poll::Ready(()) } else { Poll::Pending }).await;
            read.await
        });
        let begun = self.copies.executes(|| read.as_mut().poll(&mut Context::from_waker(Waker::noop())));
        debug_assert!(begun.is_pending(), "the first poll begins the copy");
        read
    }

    /// Of the stream that buffers are made on.
    pub(crate) fn memory_usage(&self) -> Result<MemoryUsage> {
        let usage = self.stream.executes(|| self.client.memory_usage());
        self.check("pool_usage")?;
        usage.map_err(|source| self.error("pool_usage", source))
    }

    /// Gives the driver back what no buffer has.
    pub(crate) fn trim(&self) {
        self.stream.executes(|| self.client.memory_cleanup());
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        let result = self.stream.executes(|| cubecl::future::block_on(self.client.sync()));
        self.finished("synchronize")?;
        result.map_err(|source| self.error("synchronize", source))
    }
}

impl<R: Runtime> Drop for Queue<R> {
    /// Its streams are never used again, and CubeCL would keep their memory until the process ends.
    fn drop(&mut self) {
        if self.check("close device").is_err() {
            return;
        }
        let close = || {
            self.trim();
            // Nothing that was sent arrives before somebody waits.
            self.stream.executes(|| self.client.flush())
        };
        // Of what goes wrong now nobody can be told.
        let _ = poison::caught("close device", &self.name, close);
    }
}

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

    use cubecl_wgpu::{WgpuDevice, WgpuRuntime};

    use super::*;

    #[test]
    fn a_closed_device_has_given_its_memory_back() {
        let queue = Queue::<WgpuRuntime>::open(&WgpuDevice::Cpu, "vulkan:0".to_owned(), None).unwrap();
        let (client, stream) = (queue.client.clone(), queue.stream);
        let reserved_bytes = || stream.executes(|| client.memory_usage()).unwrap().bytes_reserved;
        let handle = queue.upload(&[7; 1 << 20]);
        assert_eq!(queue.read("read", handle.clone()).unwrap()[..], [7; 1 << 20]);
        drop(handle);
        assert!(reserved_bytes() >= 1 << 20);
        drop(queue);
        assert_eq!(reserved_bytes(), 0);
    }
}
