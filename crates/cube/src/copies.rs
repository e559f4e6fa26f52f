//! Host memory for tensors of a device that goes on computing.

use std::{
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use cubecl::{
    bytes::{AllocationProperty, Bytes},
    prelude::Runtime,
    server::ServerError,
};
use unsloth_core::{Category, Error, Result, Tensor};
use unsloth_memory::{Copies, Layout};

use crate::{
    backend::CubeBuffer,
    queue::{Queue, Read},
};

/// Copies between a device and memory that its runtime has made for them: page-locked on CUDA, mapped buffers through wgpu.
///
/// A thread waits for them. Through wgpu somebody has to: as long as a read is not taken, CubeCL polls the device, and wgpu holds new
/// work back while it is polled.
pub(crate) struct HostCopies<R: Runtime> {
    queue: Arc<Queue<R>>,
    /// `None` once the thread is to end.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

struct Job {
    read: Read,
    answer: mpsc::Sender<Result<Bytes, ServerError>>,
}

/// The thread that waits for copies has panicked.
#[derive(Debug, thiserror::Error)]
#[error("the runtime panicked while copying")]
struct NoAnswer;

fn wait(jobs: &mpsc::Receiver<Job>) {
    for Job { read, answer } in jobs {
        // The second buffer is there for the order alone.
        let read = cubecl::future::block_on(read).map(|mut buffers| buffers.swap_remove(0));
        // Nobody listens when a step was given up.
        let _ = answer.send(read);
    }
}

impl<R: Runtime> HostCopies<R> {
    /// # Errors
    /// [`Error::Launch`] if there is no thread to be had.
    pub(crate) fn open(queue: Arc<Queue<R>>) -> Result<Self> {
        let (jobs, received) = mpsc::channel();
        let thread = std::thread::Builder::new().name("unsloth-copies".to_owned()).spawn(move || wait(&received));
        let thread = thread.map_err(|source| queue.error("store", source))?;
        Ok(Self { queue, jobs: Some(jobs), thread: Some(thread) })
    }
}

impl<R: Runtime> Drop for HostCopies<R> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // If it has panicked, whoever waited for a copy was told.
            let _ = thread.join();
        }
    }
}

impl<R: Runtime> Copies for HostCopies<R> {
    type Copy = mpsc::Receiver<Result<Bytes, ServerError>>;
    type Contents = Bytes;

    fn begin(&self, tensor: &Tensor) -> Result<Self::Copy> {
        self.queue.check("put")?;
        let (expected, actual) = (self.queue.name(), tensor.device().name());
        let buffer = tensor.buffer().as_any().downcast_ref::<CubeBuffer>().filter(|_| expected == actual);
        let expected = || expected.to_owned();
        let buffer = buffer.ok_or_else(|| Error::Device { op: "put", arg: "tensor", expected: expected(), actual })?;
        let read = self.queue.begin_read(buffer.handle().clone());
        let (answer, copy) = mpsc::channel();
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(Job { read, answer }).is_ok());
        if sent { Ok(copy) } else { Err(self.queue.error("put", NoAnswer)) }
    }

    fn finish(&self, copy: Self::Copy) -> Result<Bytes> {
        let read = copy.recv();
        self.queue.check("put")?;
        let read = read.map_err(|_| self.queue.error("put", NoAnswer))?;
        read.map_err(|source| self.queue.error("put", source))
    }

    fn pinned_bytes(&self, contents: &Bytes) -> usize {
        if contents.property() == AllocationProperty::Pinned { contents.len() } else { 0 }
    }

    fn restore(&self, contents: Bytes, layout: &Layout) -> Result<Tensor> {
        self.queue.check("take")?;
        let charge = self.queue.reserve("take", layout.bytes(), Category::Activations)?;
        let buffer = Arc::new(CubeBuffer::new(self.queue.upload_words(contents), charge));
        Ok(Tensor::from_buffer(layout.device.clone(), layout.dtype, layout.shape, buffer))
    }
}
