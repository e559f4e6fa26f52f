//! Buffers that are only accounted for.

use std::{any::Any, ops::Range, sync::Arc};

use unsloth_core::{
    AllocationCounts, Buffer, Category, DType, Device, Error, HostBytes, Init, Memory, Place, PoolUsage, Result, Shape,
    Tensor, TensorStore, Usage,
};
use unsloth_memory::{Charge, DoubleBuffer, Ledger};

use crate::store::{NoCopies, PlanStore};

/// What operators take besides their results depends on what runs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The CPU backend with so many threads, each of which has scratch of its own.
    Cpu {
        /// 1 or more.
        num_threads: usize,
    },
    /// CubeCL's kernels, whose scratch is larger where there is much memory.
    Kernels {
        /// Bytes of the device's own memory; `None` where that is not known.
        memory_bytes: Option<u64>,
    },
}

impl Default for Target {
    /// The CPU with as many threads as this machine has cores.
    fn default() -> Self {
        Target::Cpu { num_threads: std::thread::available_parallelism().map_or(1, usize::from) }
    }
}

impl Target {
    /// What stands for this device.
    pub fn of(device: &Device) -> Self {
        let kernels = Target::Kernels { memory_bytes: device.memory_bytes() };
        device.host_threads().map_or(kernels, |num_threads| Target::Cpu { num_threads })
    }
}

/// Which device is planned for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Most bytes that may be held at once; `None` means no limit.
    pub budget_bytes: Option<u64>,
    /// What would run the operators.
    pub target: Target,
}

/// The device `plan`: shapes and a ledger.
pub struct PlanBackend {
    ledger: Arc<Ledger>,
    target: Target,
}

impl PlanBackend {
    /// A device with nothing on it.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`] for zero threads.
    pub fn new(options: PlanOptions) -> Result<Self> {
        let PlanOptions { budget_bytes, target } = options;
        if target == (Target::Cpu { num_threads: 0 }) {
            let (value, rule) = ("0".to_owned(), "at least 1");
            return Err(Error::InvalidSpec { op: "plan", field: "num_threads", value, rule });
        }
        Ok(Self { ledger: Ledger::new("plan", budget_bytes), target })
    }

    /// Enters scratch, buffers of so many f32, until the result is dropped.
    pub(crate) fn workspace(&self, lens: impl IntoIterator<Item = usize>) -> Result<Vec<Charge>> {
        let charge = |len: usize| self.ledger.charge(len.saturating_mul(size_of::<f32>()), Category::Workspace);
        lens.into_iter().map(charge).collect()
    }

    /// The same where the CPU is planned for, with so many threads.
    pub(crate) fn on_cpu<const N: usize>(&self, lens: impl FnOnce(usize) -> [usize; N]) -> Result<Vec<Charge>> {
        match self.target {
            Target::Cpu { num_threads } => self.workspace(lens(num_threads)),
            Target::Kernels { .. } => Ok(Vec::new()),
        }
    }

    /// The same where kernels are planned for, on a device with so much memory, if that is known.
    pub(crate) fn on_kernels<const N: usize>(
        &self,
        lens: impl FnOnce(Option<u64>) -> [usize; N],
    ) -> Result<Vec<Charge>> {
        match self.target {
            Target::Cpu { .. } => Ok(Vec::new()),
            Target::Kernels { memory_bytes } => self.workspace(lens(memory_bytes)),
        }
    }
}

struct PlanBuffer {
    charge: Charge,
    /// Adopted memory is read-only: an in-place operator copies it, here as on the CPU.
    owned: bool,
}

impl Buffer for PlanBuffer {
    fn accounted_bytes(&self) -> u64 {
        self.charge.bytes()
    }
    fn category(&self) -> Category {
        self.charge.category()
    }
    fn retag(&self, category: Category) {
        self.charge.retag(category);
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl Memory for PlanBackend {
    fn name(&self) -> String {
        "plan".into()
    }

    fn supports(&self, dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::I32)
    }

    fn allocate(&self, bytes: usize, category: Category, _init: Init) -> Result<Arc<dyn Buffer>> {
        Ok(Arc::new(PlanBuffer { charge: self.ledger.charge(bytes, category)?, owned: true }))
    }

    fn adopt(
        &self,
        _source: HostBytes,
        bytes: Range<usize>,
        _align: usize,
        category: Category,
    ) -> Result<Arc<dyn Buffer>> {
        Ok(Arc::new(PlanBuffer { charge: self.ledger.charge(bytes.len(), category)?, owned: false }))
    }

    fn write(&self, buffer: &mut dyn Buffer, bytes: &[u8]) -> Result<()> {
        let (expected, actual) = (bytes.len(), buffer.accounted_bytes() as usize);
        if expected > actual {
            return Err(Error::Length { op: "write", arg: "buffer", expected, actual });
        }
        Ok(())
    }

    /// Gives zeros: nothing was computed.
    fn read(&self, _buffer: &dyn Buffer, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0);
        Ok(())
    }

    fn memory_bytes(&self) -> Option<u64> {
        match self.target {
            Target::Cpu { .. } => None,
            Target::Kernels { memory_bytes } => memory_bytes,
        }
    }

    fn host_threads(&self) -> Option<usize> {
        match self.target {
            Target::Cpu { num_threads } => Some(num_threads),
            Target::Kernels { .. } => None,
        }
    }

    fn set_budget(&self, bytes: Option<u64>) -> Option<u64> {
        self.ledger.set_budget(bytes)
    }

    fn usage(&self) -> Usage {
        self.ledger.usage()
    }

    fn reset_peak(&self) {
        self.ledger.reset_peak();
    }

    fn allocation_counts(&self) -> AllocationCounts {
        AllocationCounts::default()
    }

    /// What is planned is taken as it is needed.
    fn pool_usage(&self) -> Result<PoolUsage> {
        Ok(PoolUsage { reserved_bytes: self.ledger.usage().total_live_bytes(), idle_bytes: 0 })
    }

    fn trim(&self) -> Result<()> {
        Ok(())
    }

    fn store(&self, place: &Place) -> Result<Arc<dyn TensorStore>> {
        let name = match (place, self.target) {
            // Kernels run while their device copies, and what it reads is held until then.
            (Place::Host, Target::Kernels { .. }) => return Ok(Arc::new(DoubleBuffer::new(NoCopies))),
            (Place::Host, Target::Cpu { .. }) => "host",
            (Place::Disk { .. }, _) => "disk",
        };
        Ok(Arc::new(PlanStore { ledger: Ledger::new(name, None), transfers: Arc::default() }))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

/// An activation on the device of `like`.
pub(crate) fn output(like: &Tensor, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
    like.device().empty(shape, dtype, Category::Activations)
}

/// What an in-place operator works on: the tensor itself if nobody shares it, else a copy.
pub(crate) fn take_or_copy(tensor: Tensor) -> Result<Tensor> {
    let owned = tensor.buffer().as_any().downcast_ref::<PlanBuffer>().is_some_and(|buffer| buffer.owned);
    if owned && tensor.is_unique() { Ok(tensor) } else { output(&tensor, tensor.dtype(), *tensor.shape()) }
}
