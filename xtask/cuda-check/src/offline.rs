//! A CubeCL runtime without a device: everything above it runs as it does on CUDA, and a launch is noted instead of run.
//!
//! Memory has sizes and no contents; reading gives zeros. What a kernel is compiled for is what CubeCL's CUDA runtime would find
//! on a card of the chosen architecture.

use std::sync::{Arc, Mutex, PoisonError};

use cubecl::{
    backtrace::BackTrace,
    bytes::Bytes,
    device::{Device, DeviceId, DeviceService, ServerUtilitiesHandle},
    future::DynFut,
    ir::{
        BarrierLevel, ContiguousElements, DeviceProperties, ElemType, FloatKind, HardwareProperties, MatrixLayout,
        MemoryDeviceProperties, MmaProperties, OpaqueType, SemanticType, StorageType, TargetProperties, Type,
        VectorSize,
        features::{AtomicUsage, Plane, Tma, TypeUsage},
    },
    prelude::*,
    profile::{ProfileDuration, TimingMethod},
    server::{
        Binding, ComputeServer, CopyDescriptor, ExecutionMode, IoError, KernelArguments, ProfileError, ProfilingToken,
        ServerCommunication, ServerError, ServerUtilities,
    },
    stream_id::StreamId,
    zspace::{Shape, Strides, striding::has_pitched_row_major_strides},
};
use cubecl_cpp::{
    DialectWmmaCompiler,
    cuda::{
        CudaDialect,
        arch::CudaArchitecture,
        mma::{CudaWmmaCompiler, contiguous_elements_cuda},
    },
    register_supported_types,
    shared::{
        CompilationOptions, CppCompiler, CppSupportedFeatures, register_mma_features, register_scaled_mma_features,
        register_wmma_features,
    },
};
use cubecl_runtime::{
    allocator::PitchedMemoryLayoutPolicy,
    compiler::CubeTask,
    logging::ServerLogger,
    memory_management::{ManagedMemoryHandle, MemoryAllocationMode, MemoryUsage},
    storage::{BytesResource, BytesStorage, ManagedResource},
    timestamp_profiler::TimestampProfiler,
};

use crate::architecture::{ARCHITECTURES, Architecture, MAX_UNITS_PER_CUBE, PLANE_SIZE};

/// The code generator of CubeCL's CUDA runtime.
pub(crate) type CudaCompiler = CppCompiler<CudaDialect<CudaWmmaCompiler>>;

/// Row alignment of CubeCL's CUDA runtime, in bytes.
pub(crate) const ALIGNMENT: u64 = 512;

/// A kernel that would have run.
pub(crate) struct Launched {
    pub(crate) kernel: Box<dyn CubeTask<CudaCompiler>>,
    pub(crate) mode: ExecutionMode,
}

/// Launches of one device, in order.
#[derive(Default)]
pub(crate) struct Launches(Mutex<Vec<Launched>>);

impl Launches {
    /// What was launched since the last call.
    pub(crate) fn take(&self) -> Vec<Launched> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl std::fmt::Debug for Launches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Launches")
    }
}

/// A device of an architecture; the index is the compute capability.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct OfflineDevice {
    pub(crate) capability: u16,
}

impl Device for OfflineDevice {
    fn from_id(id: DeviceId) -> Self {
        Self { capability: id.index_id }
    }
    fn to_id(&self) -> DeviceId {
        DeviceId::new(0, self.capability)
    }
}

/// The runtime.
#[derive(Clone, Debug)]
pub(crate) struct OfflineCuda;

impl Runtime for OfflineCuda {
    type Compiler = CudaCompiler;
    type Server = OfflineServer;
    type Device = OfflineDevice;

    fn client(device: &OfflineDevice) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }
    fn name(_client: &ComputeClient<Self>) -> &'static str {
        "cuda"
    }
    fn require_array_lengths() -> bool {
        true
    }
    fn max_cube_count() -> (u32, u32, u32) {
        (i32::MAX as u32, u16::MAX.into(), u16::MAX.into())
    }
    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        has_pitched_row_major_strides(shape, strides)
    }
    fn target_properties() -> TargetProperties {
        TargetProperties {
            mma: MmaProperties {
                register_size_bits: 32,
                const_plane_size: PLANE_SIZE,
                register_layout_a: MatrixLayout::RowMajor,
                register_layout_b: MatrixLayout::ColMajor,
                register_layout_acc: MatrixLayout::RowMajor,
                register_duplication_a: 1,
                register_duplication_b: 1,
                register_duplication_acc: 1,
                contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
            },
        }
    }
    fn enumerate_devices(_type_id: u16, _launches: &Launches) -> Vec<DeviceId> {
        ARCHITECTURES.iter().map(|architecture| DeviceId::new(0, architecture.capability as u16)).collect()
    }
}

/// What CubeCL's CUDA runtime finds on such a device and tells the code generator (cubecl-cuda, runtime.rs).
pub(crate) fn describe(architecture: &Architecture) -> (DeviceProperties, CompilationOptions) {
    let hardware = HardwareProperties {
        load_width: 128,
        plane_size_min: PLANE_SIZE,
        plane_size_max: PLANE_SIZE,
        max_bindings: 1024,
        max_shared_memory_size: architecture.shared_bytes_per_cube,
        max_cube_count: (i32::MAX as u32, u16::MAX.into(), u16::MAX.into()),
        max_units_per_cube: MAX_UNITS_PER_CUBE,
        max_cube_dim: (MAX_UNITS_PER_CUBE, MAX_UNITS_PER_CUBE, 64),
        num_streaming_multiprocessors: Some(architecture.multiprocessors),
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        max_vector_size: VectorSize::MAX,
    };
    let memory = MemoryDeviceProperties { max_page_size: architecture.memory_bytes / 4, alignment: ALIGNMENT };
    let mut properties = DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System);
    register_types(&mut properties);
    let mut features =
        CppSupportedFeatures { fast_math: true, grid_constants: true, fast_tanh: true, ..Default::default() };
    let matrices = &mut properties.features.matmul;
    let halves = [FloatKind::F16, FloatKind::BF16].map(|kind| StorageType::from(ElemType::Float(kind)));
    matrices.ldmatrix.extend(halves);
    if architecture.capability >= 90 {
        matrices.stmatrix.extend(halves);
        properties.features.tma.insert(Tma::Base);
        properties.features.cube_cluster = true;
        properties.register_semantic_type(SemanticType::TensorMap);
        (features.clusters, features.elect_sync) = (true, true);
    }
    properties.features.copy_async = true;
    properties.features.memory_reinterpret = true;
    properties.features.alignment = true;
    for feature in [Plane::Ops, Plane::Sync, Plane::NonUniformControlFlow] {
        properties.features.plane.insert(feature);
    }
    let generation = CudaArchitecture { version: architecture.capability };
    register_wmma_features(CudaWmmaCompiler::supported_wmma_combinations(&generation), &mut properties);
    register_mma_features(CudaWmmaCompiler::supported_mma_combinations(&generation), &mut properties);
    register_scaled_mma_features(CudaWmmaCompiler::supported_scaled_mma_combinations(&generation), &mut properties);
    (properties, CompilationOptions { warp_size: PLANE_SIZE, supports_features: features })
}

fn register_types(properties: &mut DeviceProperties) {
    register_supported_types(properties);
    properties.register_type_usage(ElemType::Float(FloatKind::TF32), TypeUsage::Conversion);
    let add = AtomicUsage::Add | AtomicUsage::LoadStore;
    for kind in [FloatKind::F64, FloatKind::F16] {
        properties.register_atomic_type_usage(Type::new(StorageType::Atomic(ElemType::Float(kind))), add);
    }
    properties.register_semantic_type(SemanticType::Pipeline);
    for level in [BarrierLevel::Unit, BarrierLevel::Cube] {
        properties.register_type_usage(OpaqueType::Barrier(level), TypeUsage::Buffer);
    }
}

/// The device's side of [`OfflineCuda`].
#[derive(Debug)]
pub(crate) struct OfflineServer {
    utilities: Arc<ServerUtilities<Self>>,
    profiler: TimestampProfiler,
}

impl ServerCommunication for OfflineServer {
    const SERVER_COMM_ENABLED: bool = false;
}

impl DeviceService for OfflineServer {
    fn init(id: DeviceId) -> Self {
        let Some(architecture) = ARCHITECTURES.iter().find(|one| one.capability == u32::from(id.index_id)) else {
            unreachable!("devices are made from the table of architectures")
        };
        let (properties, _) = describe(architecture);
        let policy = PitchedMemoryLayoutPolicy::new(ALIGNMENT as usize);
        let utilities =
            ServerUtilities::new(properties, Arc::new(ServerLogger::default()), Launches::default(), policy);
        Self { utilities: Arc::new(utilities), profiler: TimestampProfiler::default() }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl ComputeServer for OfflineServer {
    type Kernel = Box<dyn CubeTask<CudaCompiler>>;
    type Storage = BytesStorage;
    type MemoryLayoutPolicy = PitchedMemoryLayoutPolicy;
    type Info = Launches;

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }
    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    #[allow(unsafe_code, reason = "the trait's signature")]
    // SAFETY: nothing runs, so nothing is read or written out of bounds.
    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        _count: CubeCount,
        _arguments: KernelArguments,
        mode: ExecutionMode,
        _stream: StreamId,
    ) {
        let mut launches = self.utilities.info.0.lock().unwrap_or_else(PoisonError::into_inner);
        launches.push(Launched { kernel, mode });
    }

    fn initialize_memory(&mut self, _memory: ManagedMemoryHandle, _size: u64, _stream: StreamId) {}
    fn write(&mut self, _descriptors: Vec<(CopyDescriptor, Bytes)>, _stream: StreamId) {}
    fn read(&mut self, descriptors: Vec<CopyDescriptor>, _stream: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let zeros = |copy: &CopyDescriptor| Bytes::from_bytes_vec(vec![0; copy.handle.size_in_used() as usize]);
        let bytes = descriptors.iter().map(zeros).collect();
        Box::pin(async move { Ok(bytes) })
    }
    fn get_resource(
        &mut self,
        _binding: Binding,
        _stream: StreamId,
    ) -> Result<ManagedResource<BytesResource>, ServerError> {
        Err(IoError::UnsupportedIoOperation { backtrace: BackTrace::capture() }.into())
    }
    fn sync(&mut self, _stream: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }
    fn flush(&mut self, _stream: StreamId) -> Result<(), ServerError> {
        Ok(())
    }
    fn memory_usage(&mut self, _stream: StreamId) -> Result<MemoryUsage, ServerError> {
        Ok(MemoryUsage { number_allocs: 0, bytes_in_use: 0, bytes_padding: 0, bytes_reserved: 0 })
    }
    fn memory_cleanup(&mut self, _stream: StreamId) {}
    fn allocation_mode(&mut self, _mode: MemoryAllocationMode, _stream: StreamId) {}
    fn start_profile(&mut self, _stream: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.profiler.start())
    }
    fn end_profile(&mut self, _stream: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.profiler.stop(token)
    }
}
