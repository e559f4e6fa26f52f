//! Copies between devices and host memory, and from one device to another, with what they cost.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use unsloth_core::{Category, DType, Device, Error, Init, Result, Shape, Tensor, Transfers};

use crate::{HostBlock, HostPool, Ledger};

/// What a tensor is besides its contents.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Where it is, or is to be.
    pub device: Device,
    /// Type of the elements.
    pub dtype: DType,
    /// Dimensions, row-major.
    pub shape: Shape,
}

impl Layout {
    /// Of a tensor that is there.
    pub fn of(tensor: &Tensor) -> Self {
        Self { device: tensor.device().clone(), dtype: tensor.dtype(), shape: *tensor.shape() }
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.shape.num_elements() * self.dtype.size_bytes()
    }
}

/// Host buffers that contents of tensors pass through or wait in, reused from copy to copy. They have an account of their own:
/// the host's column beside a device's.
///
/// It is ordinary memory, and a call returns when its bytes have arrived. Tensors that are to wait for long leave a device that computes
/// meanwhile through a [`DoubleBuffer`](crate::DoubleBuffer).
pub struct Staging {
    pool: Arc<HostPool>,
    /// From devices, and to them.
    counts: Mutex<[Transfers; 2]>,
}

impl Staging {
    /// Buffers of at most this many bytes together; `None` means what the system gives.
    pub fn new(budget_bytes: Option<u64>) -> Arc<Self> {
        let pool = HostPool::new(Ledger::new("host", budget_bytes));
        Arc::new(Self { pool, counts: Mutex::new([Transfers::default(); 2]) })
    }

    /// The buffers.
    pub fn pool(&self) -> &Arc<HostPool> {
        &self.pool
    }

    /// A buffer of arbitrary contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn empty(&self, bytes: usize) -> Result<HostBlock> {
        self.pool.allocate(bytes, Category::Activations, Init::Arbitrary)
    }

    /// Copies a tensor to the host. Waits for its device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Launch`] if pending work failed.
    pub fn read(&self, tensor: &Tensor) -> Result<HostBlock> {
        let mut block = self.empty(tensor.bytes())?;
        let start = Instant::now();
        tensor.device().backend().read(tensor.buffer(), block.as_mut_slice())?;
        self.counts()[0].add(tensor.bytes() as u64, start.elapsed());
        Ok(block)
    }

    /// Makes a tensor, as an activation, from what [`Staging::read`] gave of one of this size.
    ///
    /// # Errors
    /// [`Error::Length`] for a buffer of another size; [`Error::OutOfMemory`].
    pub fn write(&self, block: &HostBlock, layout: &Layout) -> Result<Tensor> {
        let Layout { device, dtype, shape } = layout;
        let (expected, actual) = (layout.bytes(), block.as_slice().len());
        if expected != actual {
            return Err(Error::Length { op: "write", arg: "block", expected, actual });
        }
        let mut tensor = device.empty(*shape, *dtype, Category::Activations)?;
        let start = Instant::now();
        let buffer = tensor.buffer_mut().ok_or(Error::Shared { op: "write", arg: "tensor" })?;
        device.backend().write(buffer, block.as_slice())?;
        self.counts()[1].add(expected as u64, start.elapsed());
        Ok(tensor)
    }

    /// The same tensor, as an activation, on another device. Passes through the host: no two runtimes here share memory.
    ///
    /// # Errors
    /// [`Error::UnsupportedDType`] if the other device lacks the type; [`Error::OutOfMemory`]; [`Error::Launch`].
    pub fn copy(&self, tensor: &Tensor, device: &Device) -> Result<Tensor> {
        self.write(&self.read(tensor)?, &Layout { device: device.clone(), ..Layout::of(tensor) })
    }

    /// What was copied from devices and to them.
    pub fn transfers(&self) -> [Transfers; 2] {
        *self.counts()
    }

    /// Counters are whole between any two statements.
    fn counts(&self) -> MutexGuard<'_, [Transfers; 2]> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
