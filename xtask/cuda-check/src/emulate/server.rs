//! The runtime of the emulated card.

use std::{collections::HashMap, ffi::c_void, sync::Arc};

use anyhow::{Context, Result, anyhow, ensure};
use cubecl::{
    bytes::Bytes,
    device::{Device, DeviceId, DeviceService, ServerUtilitiesHandle},
    future::DynFut,
    prelude::*,
    profile::ProfileDuration,
    server::{
        Binding, ComputeServer, CopyDescriptor, ExecutionMode, IoError, KernelArguments, ProfileError, ProfilingToken,
        ServerCommunication, ServerError, ServerUtilities,
    },
    stream_id::StreamId,
    zspace::{Shape, Strides},
};
use cubecl_cpp::shared::CompilationOptions;
use cubecl_runtime::{
    allocator::PitchedMemoryLayoutPolicy,
    compiler::CubeTask,
    id::KernelId,
    logging::ServerLogger,
    memory_management::{
        ManagedMemoryHandle, MemoryAllocationMode, MemoryConfiguration, MemoryManagement, MemoryManagementOptions,
        MemoryUsage,
    },
    storage::{BytesResource, BytesStorage, ManagedResource},
    timestamp_profiler::TimestampProfiler,
};

use super::host::{Host, Kernel};
use crate::{
    architecture::ARCHITECTURES,
    offline::{ALIGNMENT, CudaCompiler, OfflineCuda, describe},
};

/// An emulated card. Those of different numbers share nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct EmulatedDevice {
    pub(crate) number: u16,
    /// Which of [`MUTATIONS`] every kernel has.
    pub(crate) mutation: Option<u16>,
}

/// Changes of the generated code that the suites have to notice: what it is, and what takes the place of what.
pub(crate) const MUTATIONS: [(&str, &str, &str); 4] = [
    ("two registers of a left operand swapped", r#""r"(reg_a_1), "r"(reg_a_2)"#, r#""r"(reg_a_2), "r"(reg_a_1)"#),
    ("two registers of a right operand swapped", r#""r"(reg_b_0), "r"(reg_b_1)"#, r#""r"(reg_b_1), "r"(reg_b_0)"#),
    ("loads not transposed", ".trans.shared", ".shared"),
    ("no barriers", "__syncthreads();", ""),
];

impl Device for EmulatedDevice {
    fn from_id(id: DeviceId) -> Self {
        Self { number: id.index_id, mutation: id.type_id.checked_sub(1) }
    }
    fn to_id(&self) -> DeviceId {
        DeviceId::new(self.mutation.map_or(0, |mutation| mutation + 1), self.number)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct EmulatedCuda;

impl Runtime for EmulatedCuda {
    type Compiler = CudaCompiler;
    type Server = EmulatedServer;
    type Device = EmulatedDevice;

    fn client(device: &EmulatedDevice) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }
    fn name(_client: &ComputeClient<Self>) -> &'static str {
        "cuda"
    }
    fn require_array_lengths() -> bool {
        OfflineCuda::require_array_lengths()
    }
    fn max_cube_count() -> (u32, u32, u32) {
        OfflineCuda::max_cube_count()
    }
    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        OfflineCuda::can_read_tensor(shape, strides)
    }
    fn target_properties() -> cubecl::ir::TargetProperties {
        OfflineCuda::target_properties()
    }
    fn enumerate_devices(_type_id: u16, _info: &()) -> Vec<DeviceId> {
        vec![EmulatedDevice::default().to_id()]
    }
}

/// A kernel of the host, and its shared memory.
#[derive(Debug)]
struct Loaded {
    kernel: Kernel,
    block: [u32; 3],
    shared_bytes: usize,
}

#[derive(Debug)]
pub(crate) struct EmulatedServer {
    memory: MemoryManagement<BytesStorage>,
    host: Host,
    options: CompilationOptions,
    device: EmulatedDevice,
    kernels: HashMap<KernelId, Loaded>,
    profiler: TimestampProfiler,
    utilities: Arc<ServerUtilities<Self>>,
}

impl EmulatedServer {
    /// # Errors
    /// If the kernel cannot be generated, compiled or run.
    fn run(
        &mut self,
        kernel: Box<dyn CubeTask<CudaCompiler>>,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
    ) -> Result<()> {
        let CubeCount::Static(x, y, z) = count else { return Err(anyhow!("a grid that the device computes")) };
        let mut id = kernel.id();
        id.mode(mode);
        if !self.kernels.contains_key(&id) {
            let loaded = self.load(kernel, mode)?;
            self.kernels.insert(id.clone(), loaded);
        }
        let KernelArguments { buffers, mut info, tensor_maps } = arguments;
        ensure!(tensor_maps.is_empty(), "tensor maps are not emulated");
        ensure!(info.dynamic_metadata_offset >= info.data.len(), "shapes of tensors are not emulated");
        let mut pointers = Vec::with_capacity(buffers.len());
        for Binding { memory, offset_start, offset_end, .. } in buffers {
            let resource = self.memory.get_resource(memory, offset_start, offset_end)?;
            pointers.push(resource.get_write_ptr_and_length().0.cast::<c_void>());
        }
        let mut arguments: Vec<*mut c_void> =
            pointers.iter_mut().map(|pointer| std::ptr::from_mut(pointer).cast()).collect();
        arguments.push(info.data.as_mut_ptr().cast());
        let Loaded { kernel, block, shared_bytes } = self.kernels.get(&id).context("loaded just above")?;
        kernel.launch([x, y, z], *block, *shared_bytes, &mut arguments)
    }

    fn load(&self, kernel: Box<dyn CubeTask<CudaCompiler>>, mode: ExecutionMode) -> Result<Loaded> {
        let generated = kernel
            .compile(&mut Default::default(), &self.options, mode, kernel.address_type())
            .map_err(|error| anyhow!("{error}"))?;
        let repr = generated.repr.context("the code generator gave no kernel")?;
        let source = match self.device.mutation.map(|mutation| MUTATIONS[mutation as usize]) {
            Some((_, from, to)) => generated.source.replace(from, to),
            None => generated.source,
        };
        let kernel = self.host.compile(&source, &generated.entrypoint_name, self.kernels.len())?;
        let CubeDim { x, y, z } = generated.cube_dim;
        Ok(Loaded { kernel, block: [x, y, z], shared_bytes: repr.shared_memory_size() })
    }

    /// The bytes of a buffer.
    fn resource(&mut self, binding: Binding) -> BytesResource {
        match self.memory.get_resource(binding.memory, binding.offset_start, binding.offset_end) {
            Ok(resource) => resource,
            Err(error) => panic!("a binding without memory: {error:?}"),
        }
    }
}

impl ServerCommunication for EmulatedServer {
    const SERVER_COMM_ENABLED: bool = false;
}

impl DeviceService for EmulatedServer {
    fn init(id: DeviceId) -> Self {
        let (properties, options) = describe(&ARCHITECTURES[0]);
        let host = match Host::new() {
            Ok(host) => host,
            Err(error) => panic!("{error:#}"),
        };
        let logger = Arc::new(ServerLogger::default());
        let memory = MemoryManagement::from_configuration(
            BytesStorage::default(),
            &properties.memory,
            MemoryConfiguration::default(),
            logger.clone(),
            MemoryManagementOptions::new("emulated"),
        );
        let policy = PitchedMemoryLayoutPolicy::new(ALIGNMENT as usize);
        let utilities = Arc::new(ServerUtilities::new(properties, logger, (), policy));
        let device = EmulatedDevice::from_id(id);
        let profiler = TimestampProfiler::default();
        Self { memory, host, options, device, kernels: HashMap::new(), profiler, utilities }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl ComputeServer for EmulatedServer {
    type Kernel = Box<dyn CubeTask<CudaCompiler>>;
    type Storage = BytesStorage;
    type MemoryLayoutPolicy = PitchedMemoryLayoutPolicy;
    type Info = ();

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }
    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    #[allow(unsafe_code, reason = "the trait's signature")]
    // SAFETY: see `Kernel::launch`.
    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        _stream: StreamId,
    ) {
        let name = kernel.name();
        // As a failure on a card's thread: the backend sees a panic, and says which operator it was.
        if let Err(error) = self.run(kernel, count, arguments, mode) {
            panic!("{name}: {error:#}");
        }
    }

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, _stream: StreamId) {
        let reserved = self.memory.reserve(size).and_then(|reserved| self.memory.bind(reserved, memory, 0));
        if let Err(error) = reserved {
            panic!("{size} bytes: {error:?}");
        }
    }
    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, _stream: StreamId) {
        for (copy, data) in descriptors {
            self.resource(copy.handle).write()[..data.len()].copy_from_slice(&data);
        }
    }
    fn read(&mut self, descriptors: Vec<CopyDescriptor>, _stream: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let read = |copy: CopyDescriptor| {
            let size = copy.handle.size_in_used() as usize;
            Bytes::from_bytes_vec(self.resource(copy.handle).read()[..size].to_vec())
        };
        let bytes = descriptors.into_iter().map(read).collect();
        Box::pin(async move { Ok(bytes) })
    }
    fn get_resource(
        &mut self,
        _binding: Binding,
        _stream: StreamId,
    ) -> Result<ManagedResource<BytesResource>, ServerError> {
        Err(IoError::UnsupportedIoOperation { backtrace: cubecl::backtrace::BackTrace::capture() }.into())
    }
    fn sync(&mut self, _stream: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }
    fn flush(&mut self, _stream: StreamId) -> Result<(), ServerError> {
        Ok(())
    }
    fn memory_usage(&mut self, _stream: StreamId) -> Result<MemoryUsage, ServerError> {
        Ok(self.memory.memory_usage())
    }
    fn memory_cleanup(&mut self, _stream: StreamId) {
        self.memory.cleanup(true);
    }
    fn allocation_mode(&mut self, mode: MemoryAllocationMode, _stream: StreamId) {
        self.memory.mode(mode);
    }
    fn start_profile(&mut self, _stream: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.profiler.start())
    }
    fn end_profile(&mut self, _stream: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.profiler.stop(token)
    }
}
