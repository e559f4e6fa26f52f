//! The backend itself: buffers, and everything that operators ask of it.

use std::{
    any::Any,
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Choices, LaunchError, Target};
use unsloth_core::{
    AllocationCounts, Buffer, Category, DType, Error, HostBytes, Init, Memory, Place, PoolUsage, Result, TensorStore,
    Usage,
};
use unsloth_memory::{Charge, DoubleBuffer};

use crate::{choices::Choosing, copies::HostCopies, pools::Pools, queue::Queue};

/// From this size on a buffer is filled by a kernel rather than by a copy from the host.
const FILL_BYTES: usize = 64 * 1024;

/// How a CubeCL backend is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CubeOptions {
    /// Most bytes that may be held at once; `None` means what the device gives.
    pub budget_bytes: Option<u64>,
    /// Bytes of the device's own memory: scratch is larger where there is much. `None` means what the driver of a card says to
    /// `vulkan`, `wgpu` and `cuda`, and unknown anywhere else.
    pub memory_bytes: Option<u64>,
    /// Fills buffers of arbitrary contents with NaN, so that a test sees an element that no kernel wrote.
    pub fill_arbitrary_with_nan: bool,
    /// Which kernel is taken where several make the same product.
    pub choosing: Choosing,
    /// How the device's memory is divided.
    pub pools: Pools,
}

impl CubeOptions {
    /// On a card of which this much is known.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub(crate) fn on_card(self, model: &str, driver: &str, memory_bytes: Option<u64>) -> Self {
        let choosing = self.choosing.on_card(model, driver);
        Self { choosing, memory_bytes: self.memory_bytes.or(memory_bytes), ..self }
    }
}

/// A device that runs CubeCL kernels.
///
/// - All work of one backend goes to one stream of its own, whichever host thread calls: results are ordered as the calls were. Copies of
///   [`Place::Host`] run beside it.
/// - Every launch is checked against the device's properties first, because a kernel that exceeds them reports nothing.
/// - A panic on the device's thread poisons the device: every later call is an [`Error::Launch`] that names the operators
///   launched since the device was last known to be well.
pub struct CubeBackend<R: Runtime> {
    queue: Arc<Queue<R>>,
    memory_bytes: Option<u64>,
    num_reads: AtomicU64,
    fill_arbitrary_with_nan: bool,
    /// See [`CubeBackend::table`].
    pub(crate) moment_maps: OnceLock<CubeBuffer>,
    choices: Option<Box<dyn Choices>>,
}

impl<R: Runtime> CubeBackend<R> {
    /// A backend on `device`, called `name` in messages, such as `vulkan:0`.
    ///
    /// # Errors
    /// [`Error::Launch`] if the device cannot be opened; [`Error::Unsupported`] for a choice of [`Pools`], which
    /// `vulkan` and `wgpu` alone take.
    pub fn new(device: &R::Device, name: impl Into<String>, options: CubeOptions) -> Result<Self> {
        let CubeOptions { budget_bytes, memory_bytes, fill_arbitrary_with_nan, choosing, pools } = options;
        let name = name.into();
        pools.refuse(&name)?;
        Ok(Self {
            queue: Arc::new(Queue::open(device, name, budget_bytes)?),
            memory_bytes,
            num_reads: AtomicU64::new(0),
            fill_arbitrary_with_nan,
            moment_maps: OnceLock::new(),
            choices: choosing.open(),
        })
    }

    /// Runs `launch`, which launches kernels, on this backend's stream. `op` names it in errors.
    ///
    /// # Errors
    /// [`Error::Launch`] if `launch` refuses, or if the device's thread has panicked before.
    pub fn launch(
        &self,
        op: &'static str,
        launch: impl FnOnce(&ComputeClient<R>) -> Result<(), LaunchError>,
    ) -> Result<()> {
        self.queue.launch(op, launch)
    }

    /// For kernels that there is a choice of: the client that [`CubeBackend::launch`] gives, and what decides.
    pub(crate) fn target<'a>(&'a self, client: &'a ComputeClient<R>) -> Target<'a, R> {
        Target { client, choices: self.choices.as_deref() }
    }

    /// For what is asked of a device; what is launched goes through [`CubeBackend::launch`].
    pub(crate) fn client(&self) -> &ComputeClient<R> {
        self.queue.client()
    }

    pub(crate) fn properties(&self) -> &cubecl::ir::DeviceProperties {
        self.client().properties()
    }

    /// A buffer of `bytes` bytes, all of them `byte`.
    fn filled(&self, bytes: usize, byte: u8) -> Result<Handle> {
        if bytes < FILL_BYTES {
            return Ok(self.queue.upload(&vec![byte; bytes]));
        }
        let words = bytes.div_ceil(4);
        let handle = self.queue.empty(bytes);
        self.launch("allocate", |client| {
            unsloth_pointwise::elementwise::fill(client, words, &handle, u32::from_ne_bytes([byte; 4]))
        })?;
        Ok(handle)
    }

    /// What `slot` holds; if nothing yet, these values, which are then uploaded and kept as long as the backend.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(crate) fn table<'a>(
        &self,
        slot: &'a OnceLock<CubeBuffer>,
        op: &'static str,
        values: impl FnOnce() -> Vec<f32>,
    ) -> Result<&'a Handle> {
        if let Some(table) = slot.get() {
            return Ok(table.handle());
        }
        let values = values();
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        let charge = self.queue.reserve(op, bytes.len(), Category::Workspace)?;
        let table = CubeBuffer::new(self.queue.upload(bytes), charge);
        Ok(slot.get_or_init(|| table).handle())
    }
}

/// Buffer of a tensor on a CubeCL device.
pub(crate) struct CubeBuffer {
    handle: Handle,
    charge: Charge,
}

impl CubeBuffer {
    pub(crate) fn new(handle: Handle, charge: Charge) -> Self {
        Self { handle, charge }
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Buffer for CubeBuffer {
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

impl<R: Runtime> Memory for CubeBackend<R> {
    fn name(&self) -> String {
        self.queue.name().to_owned()
    }

    fn supports(&self, dtype: DType) -> bool {
        let properties = self.properties();
        match dtype {
            DType::F32 | DType::I32 => true,
            DType::F16 => properties.supports_type(half::f16::as_type_native_unchecked()),
            DType::BF16 => properties.supports_type(half::bf16::as_type_native_unchecked()),
            _ => false,
        }
    }

    fn allocate(&self, bytes: usize, category: Category, init: Init) -> Result<Arc<dyn Buffer>> {
        self.queue.check("allocate")?;
        let charge = self.queue.reserve("allocate", bytes, category)?;
        let handle = match init {
            Init::Zero => self.filled(bytes, 0)?,
            // All bits set is a NaN in every float type.
            Init::Arbitrary if self.fill_arbitrary_with_nan => self.filled(bytes, 0xFF)?,
            Init::Arbitrary => self.queue.empty(bytes),
        };
        Ok(Arc::new(CubeBuffer::new(handle, charge)))
    }

    fn adopt(
        &self,
        source: HostBytes,
        bytes: Range<usize>,
        _align: usize,
        category: Category,
    ) -> Result<Arc<dyn Buffer>> {
        self.queue.check("adopt")?;
        let charge = self.queue.reserve("adopt", bytes.len(), category)?;
        let handle = self.queue.upload(&(*source).as_ref()[bytes]);
        Ok(Arc::new(CubeBuffer::new(handle, charge)))
    }

    fn write(&self, buffer: &mut dyn Buffer, bytes: &[u8]) -> Result<()> {
        self.queue.check("write")?;
        let buffer = crate::access::cube_buffer_mut(buffer);
        let (expected, actual) = (bytes.len(), buffer.charge.bytes() as usize);
        if expected > actual {
            return Err(Error::Length { op: "write", arg: "buffer", expected, actual });
        }
        // The new contents come in a block of their own; the old one returns to the pool when pending kernels are done.
        buffer.handle = self.queue.upload(bytes);
        Ok(())
    }

    fn read(&self, buffer: &dyn Buffer, bytes: &mut [u8]) -> Result<()> {
        self.queue.check("read")?;
        let handle = crate::access::cube_buffer(buffer).handle.clone();
        self.num_reads.fetch_add(1, Ordering::Relaxed);
        let data = self.queue.read("read", handle)?;
        let (expected, actual) = (bytes.len(), data.len());
        let data = data.get(..expected).ok_or(Error::Length { op: "read", arg: "buffer", expected, actual })?;
        bytes.copy_from_slice(data);
        Ok(())
    }

    fn set_budget(&self, bytes: Option<u64>) -> Option<u64> {
        self.queue.ledger().set_budget(bytes)
    }

    fn memory_bytes(&self) -> Option<u64> {
        self.memory_bytes
    }

    fn host_threads(&self) -> Option<usize> {
        None
    }

    fn usage(&self) -> Usage {
        self.queue.ledger().usage()
    }

    fn reset_peak(&self) {
        self.queue.ledger().reset_peak();
    }

    /// CubeCL's pools do not tell fresh allocations from reused ones.
    fn allocation_counts(&self) -> AllocationCounts {
        AllocationCounts::default()
    }

    /// Of the buffers alone: what CubeCL keeps for copies to the host it does not tell.
    fn pool_usage(&self) -> Result<PoolUsage> {
        let usage = self.queue.memory_usage()?;
        let reserved_bytes = usage.bytes_reserved;
        let idle_bytes = reserved_bytes.saturating_sub(usage.bytes_in_use + usage.bytes_padding);
        Ok(PoolUsage { reserved_bytes, idle_bytes })
    }

    fn trim(&self) -> Result<()> {
        self.synchronize()?;
        self.queue.trim();
        self.synchronize()
    }

    fn store(&self, place: &Place) -> Result<Arc<dyn TensorStore>> {
        match place {
            Place::Host => Ok(Arc::new(DoubleBuffer::new(HostCopies::open(self.queue.clone())?))),
            Place::Disk { .. } => unsloth_memory::open_store(place),
        }
    }

    fn num_reads(&self) -> u64 {
        self.num_reads.load(Ordering::Relaxed)
    }

    fn synchronize(&self) -> Result<()> {
        self.queue.synchronize()
    }
}
