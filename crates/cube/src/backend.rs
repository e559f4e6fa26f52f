//! The backend itself: client, stream, buffers, failures.

use std::{
    any::Any,
    ops::Range,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use cubecl::{device::Device as _, prelude::*, server::Handle, stream_id::StreamId};
use unsloth_common::{Choices, LaunchError, Target};
use unsloth_core::{
    AllocationCounts, Buffer, Category, DType, Error, HostBytes, Init, Memory, Place, PoolUsage, Result, TensorStore,
    Usage,
};
use unsloth_memory::{Charge, Ledger};

use crate::{
    choices::Choosing,
    poison::{self, Panicked},
};

/// From this size on a buffer is filled by a kernel rather than by a copy from the host.
const FILL_BYTES: usize = 64 * 1024;

/// How a CubeCL backend is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CubeOptions {
    /// Most bytes that may be held at once; `None` means what the device gives.
    pub budget_bytes: Option<u64>,
    /// Fills buffers of arbitrary contents with NaN, so that a test sees an element that no kernel wrote.
    pub fill_arbitrary_with_nan: bool,
    /// Which kernel is taken where several make the same product.
    pub choosing: Choosing,
}

/// A device that runs CubeCL kernels.
///
/// - All work of one backend goes to one stream, whichever host thread calls: results are ordered as the calls were.
/// - Every launch is checked against the device's properties first, because a kernel that exceeds them reports nothing.
/// - A panic on the device's thread poisons the device: every later call is an [`Error::Launch`] that names the operators
///   launched since the device was last known to be well.
pub struct CubeBackend<R: Runtime> {
    client: ComputeClient<R>,
    name: String,
    device_id: (u16, u16),
    stream: StreamId,
    ledger: Arc<Ledger>,
    launched: Mutex<Vec<&'static str>>,
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
    /// [`Error::Launch`] if the device cannot be opened.
    pub fn new(device: &R::Device, name: impl Into<String>, options: CubeOptions) -> Result<Self> {
        poison::watch();
        let name = name.into();
        let id = device.to_id();
        let open = std::panic::AssertUnwindSafe(|| R::client(device));
        let client = std::panic::catch_unwind(open).map_err(|panic| {
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            let message = message.unwrap_or_else(|| "no message".to_owned());
            Error::Launch { op: "open device", device: name.clone(), source: message.into() }
        })?;
        let backend = Self {
            client,
            device_id: (id.type_id, id.index_id),
            stream: StreamId::current(),
            ledger: Ledger::new(name.clone(), options.budget_bytes),
            name,
            launched: Mutex::new(Vec::new()),
            num_reads: AtomicU64::new(0),
            fill_arbitrary_with_nan: options.fill_arbitrary_with_nan,
            moment_maps: OnceLock::new(),
            choices: options.choosing.open(),
        };
        backend.check("open device")?;
        Ok(backend)
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
        self.check(op)?;
        self.launched.lock().unwrap_or_else(PoisonError::into_inner).push(op);
        self.stream.executes(|| launch(&self.client)).map_err(|source| Error::Launch {
            op,
            device: self.name.clone(),
            source: Box::new(source),
        })
    }

    /// # Errors
    /// [`Error::Launch`] if the device's thread has panicked.
    fn check(&self, op: &'static str) -> Result<()> {
        let Some(message) = poison::failure(self.device_id) else {
            return Ok(());
        };
        let launched = self.launched.lock().unwrap_or_else(PoisonError::into_inner);
        let launched = if launched.is_empty() { "nothing".to_owned() } else { launched.join(", ") };
        let source = Box::new(Panicked { launched, message });
        Err(Error::Launch { op, device: self.name.clone(), source })
    }

    /// Called when everything launched is known to have finished.
    fn finished(&self, op: &'static str) -> Result<()> {
        self.check(op)?;
        self.launched.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }

    /// For kernels that there is a choice of: the client that [`CubeBackend::launch`] gives, and what decides.
    pub(crate) fn target<'a>(&'a self, client: &'a ComputeClient<R>) -> Target<'a, R> {
        Target { client, choices: self.choices.as_deref() }
    }

    /// For what is asked of a device; what is launched goes through [`CubeBackend::launch`].
    pub(crate) fn client(&self) -> &ComputeClient<R> {
        &self.client
    }

    pub(crate) fn properties(&self) -> &cubecl::ir::DeviceProperties {
        self.client.properties()
    }

    /// Space for `bytes`, checked against the budget and the largest buffer that the device binds to a kernel.
    fn reserve(&self, op: &'static str, bytes: usize, category: Category) -> Result<Charge> {
        let limit_bytes = self.client.properties().memory.max_page_size;
        if bytes as u64 > limit_bytes {
            let (device, requested_bytes) = (self.name.clone(), bytes as u64);
            return Err(Error::BufferTooLarge { op, device, requested_bytes, category, limit_bytes });
        }
        self.ledger.charge(bytes, category)
    }

    /// A buffer of `bytes` bytes, all of them `byte`.
    fn filled(&self, bytes: usize, byte: u8) -> Result<Handle> {
        if bytes < FILL_BYTES {
            return Ok(self.upload(&vec![byte; bytes]));
        }
        let words = bytes.div_ceil(4);
        let handle = self.stream.executes(|| self.client.empty(words * 4));
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
        let charge = self.reserve(op, bytes.len(), Category::Workspace)?;
        let table = CubeBuffer { handle: self.upload(bytes), charge };
        Ok(slot.get_or_init(|| table).handle())
    }

    fn upload(&self, bytes: &[u8]) -> Handle {
        // Devices copy whole words, and a buffer cannot be empty.
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(4).max(4), 0);
        self.stream.executes(|| self.client.create_from_slice(&padded))
    }
}

/// Buffer of a tensor on a CubeCL device.
pub(crate) struct CubeBuffer {
    handle: Handle,
    charge: Charge,
}

impl CubeBuffer {
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
        self.name.clone()
    }

    fn supports(&self, dtype: DType) -> bool {
        let properties = self.client.properties();
        match dtype {
            DType::F32 | DType::I32 => true,
            DType::F16 => properties.supports_type(half::f16::as_type_native_unchecked()),
            DType::BF16 => properties.supports_type(half::bf16::as_type_native_unchecked()),
            _ => false,
        }
    }

    fn allocate(&self, bytes: usize, category: Category, init: Init) -> Result<Arc<dyn Buffer>> {
        self.check("allocate")?;
        let charge = self.reserve("allocate", bytes, category)?;
        let handle = match init {
            Init::Zero => self.filled(bytes, 0)?,
            // All bits set is a NaN in every float type.
            Init::Arbitrary if self.fill_arbitrary_with_nan => self.filled(bytes, 0xFF)?,
            Init::Arbitrary => {
                let padded = bytes.next_multiple_of(4).max(4);
                self.stream.executes(|| self.client.empty(padded))
            }
        };
        Ok(Arc::new(CubeBuffer { handle, charge }))
    }

    fn adopt(
        &self,
        source: HostBytes,
        bytes: Range<usize>,
        _align: usize,
        category: Category,
    ) -> Result<Arc<dyn Buffer>> {
        self.check("adopt")?;
        let charge = self.reserve("adopt", bytes.len(), category)?;
        let handle = self.upload(&(*source).as_ref()[bytes]);
        Ok(Arc::new(CubeBuffer { handle, charge }))
    }

    fn write(&self, buffer: &mut dyn Buffer, bytes: &[u8]) -> Result<()> {
        self.check("write")?;
        let buffer = crate::access::cube_buffer_mut(buffer);
        let (expected, actual) = (bytes.len(), buffer.charge.bytes() as usize);
        if expected > actual {
            return Err(Error::Length { op: "write", arg: "buffer", expected, actual });
        }
        // The new contents come in a block of their own; the old one returns to the pool when pending kernels are done.
        buffer.handle = self.upload(bytes);
        Ok(())
    }

    fn read(&self, buffer: &dyn Buffer, bytes: &mut [u8]) -> Result<()> {
        self.check("read")?;
        let handle = crate::access::cube_buffer(buffer).handle.clone();
        self.num_reads.fetch_add(1, Ordering::Relaxed);
        let data = self.stream.executes(|| self.client.read_one(handle));
        self.finished("read")?;
        let data =
            data.map_err(|source| Error::Launch { op: "read", device: self.name.clone(), source: Box::new(source) })?;
        let (expected, actual) = (bytes.len(), data.len());
        let data = data.get(..expected).ok_or(Error::Length { op: "read", arg: "buffer", expected, actual })?;
        bytes.copy_from_slice(data);
        Ok(())
    }

    fn set_budget(&self, bytes: Option<u64>) -> Option<u64> {
        self.ledger.set_budget(bytes)
    }

    fn host_threads(&self) -> Option<usize> {
        None
    }

    fn usage(&self) -> Usage {
        self.ledger.usage()
    }

    fn reset_peak(&self) {
        self.ledger.reset_peak();
    }

    /// CubeCL's pools do not tell fresh allocations from reused ones.
    fn allocation_counts(&self) -> AllocationCounts {
        AllocationCounts::default()
    }

    /// Of the stream that this backend's work goes to.
    fn pool_usage(&self) -> Result<PoolUsage> {
        let usage = self.stream.executes(|| self.client.memory_usage());
        self.check("pool_usage")?;
        let usage = usage.map_err(|source| Error::Launch {
            op: "pool_usage",
            device: self.name.clone(),
            source: Box::new(source),
        })?;
        let reserved_bytes = usage.bytes_reserved;
        let idle_bytes = reserved_bytes.saturating_sub(usage.bytes_in_use + usage.bytes_padding);
        Ok(PoolUsage { reserved_bytes, idle_bytes })
    }

    fn trim(&self) -> Result<()> {
        self.synchronize()?;
        self.stream.executes(|| self.client.memory_cleanup());
        self.synchronize()
    }

    fn store(&self, place: &Place) -> Result<Arc<dyn TensorStore>> {
        unsloth_memory::open_store(place)
    }

    fn num_reads(&self) -> u64 {
        self.num_reads.load(Ordering::Relaxed)
    }

    fn synchronize(&self) -> Result<()> {
        let result = self.stream.executes(|| cubecl::future::block_on(self.client.sync()));
        self.finished("synchronize")?;
        result.map_err(|source| Error::Launch {
            op: "synchronize",
            device: self.name.clone(),
            source: Box::new(source),
        })
    }
}
