//! The backend itself: options, threads, buffers.

use std::{any::Any, ops::Range, sync::Arc};

use unsloth_core::{
    AllocationCounts, Buffer, Category, ClassUsage, DType, Error, HostBytes, Init, Memory, Place, PoolUsage, Result,
    TensorStore, Usage,
};
use unsloth_memory::{Charge, HostBlock, HostPool, Ledger};

use crate::{
    matmul::Isa,
    team::{self, Team},
};

/// How a CPU backend is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that operators use; `None` means one per core.
    pub num_threads: Option<usize>,
    /// Most bytes that may be held at once, adopted (memory-mapped) weights included; `None` means no limit.
    pub budget_bytes: Option<u64>,
    /// Instructions that attention and the products of linear layers and the loss are made of; `None` means the fastest that the
    /// processor has.
    pub isa: Option<Isa>,
    /// Fills buffers of arbitrary contents with NaN, so that a test sees an element that nobody wrote.
    pub fill_arbitrary_with_nan: bool,
}

/// The processor that runs this program. The default device: no feature, driver or library is needed.
pub struct CpuBackend {
    pool: Arc<HostPool>,
    team: Team,
    isa: Isa,
    fill_arbitrary_with_nan: bool,
}

impl CpuBackend {
    /// # Errors
    /// [`Error::InvalidSpec`] for zero threads or an instruction set that the processor lacks; [`Error::Launch`] if the system
    /// refuses to start the threads.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let num_threads = options.num_threads.unwrap_or_else(team::available);
        if num_threads == 0 {
            let (value, rule) = ("0".to_owned(), "at least 1");
            return Err(Error::InvalidSpec { op: "cpu", field: "num_threads", value, rule });
        }
        let isa = Isa::choose(options.isa)?;
        let team = Team::new(num_threads).map_err(|source| Error::Launch {
            op: "start threads",
            device: "cpu".into(),
            source: Box::new(source),
        })?;
        let pool = HostPool::new(Ledger::new("cpu", options.budget_bytes));
        Ok(Self { pool, team, isa, fill_arbitrary_with_nan: options.fill_arbitrary_with_nan })
    }

    /// All cores, or the caller's thread alone where the system starts no others; no budget.
    pub(crate) fn with_defaults() -> Self {
        let pool = HostPool::new(Ledger::new("cpu", None));
        let team = Team::new(team::available()).unwrap_or_else(|_| Team::alone());
        Self { pool, team, isa: Isa::fastest(), fill_arbitrary_with_nan: false }
    }

    /// Threads that operators use.
    pub(crate) fn num_threads(&self) -> usize {
        self.team.num_threads()
    }

    /// Those threads.
    pub(crate) fn team(&self) -> &Team {
        &self.team
    }

    /// Instructions that attention and the products of linear layers and the loss are made of.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Scratch for one operator call: `len` f32 of arbitrary contents, counted in the ledger, returned to the pool on drop.
    pub(crate) fn workspace(&self, len: usize) -> Result<Workspace> {
        let bytes = len.saturating_mul(size_of::<f32>());
        let mut workspace = Workspace(self.pool.allocate(bytes, Category::Workspace, Init::Arbitrary)?);
        if self.fill_arbitrary_with_nan {
            workspace.fill(f32::NAN);
        }
        Ok(workspace)
    }
}

/// Pooled f32 scratch.
pub(crate) struct Workspace(HostBlock);

impl std::ops::Deref for Workspace {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(self.0.as_slice())
    }
}

impl std::ops::DerefMut for Workspace {
    fn deref_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(self.0.as_mut_slice())
    }
}

enum Storage {
    Owned(HostBlock),
    /// Somebody else's memory, usually a mapped file: read-only.
    Adopted {
        source: HostBytes,
        bytes: Range<usize>,
        charge: Charge,
    },
}

/// Buffer of a CPU tensor.
pub(crate) struct CpuBuffer(Storage);

impl CpuBuffer {
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.0 {
            Storage::Owned(block) => block.as_slice(),
            Storage::Adopted { source, bytes, .. } => &(**source).as_ref()[bytes.clone()],
        }
    }

    /// `None` for adopted memory, which is read-only.
    pub(crate) fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.0 {
            Storage::Owned(block) => Some(block.as_mut_slice()),
            Storage::Adopted { .. } => None,
        }
    }

    pub(crate) fn is_owned(&self) -> bool {
        matches!(self.0, Storage::Owned(_))
    }

    fn charge(&self) -> &Charge {
        match &self.0 {
            Storage::Owned(block) => block.charge(),
            Storage::Adopted { charge, .. } => charge,
        }
    }
}

impl Buffer for CpuBuffer {
    fn accounted_bytes(&self) -> u64 {
        self.charge().bytes()
    }
    fn category(&self) -> Category {
        self.charge().category()
    }
    fn retag(&self, category: Category) {
        self.charge().retag(category);
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl Memory for CpuBackend {
    fn name(&self) -> String {
        "cpu".into()
    }

    fn supports(&self, dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::I32)
    }

    fn allocate(&self, bytes: usize, category: Category, init: Init) -> Result<Arc<dyn Buffer>> {
        let mut block = self.pool.allocate(bytes, category, init)?;
        if self.fill_arbitrary_with_nan && init == Init::Arbitrary {
            // All bits set is a NaN in every float type.
            block.as_mut_slice().fill(0xFF);
        }
        Ok(Arc::new(CpuBuffer(Storage::Owned(block))))
    }

    fn adopt(
        &self,
        source: HostBytes,
        bytes: Range<usize>,
        align: usize,
        category: Category,
    ) -> Result<Arc<dyn Buffer>> {
        let data = &(*source).as_ref()[bytes.clone()];
        if (data.as_ptr() as usize).is_multiple_of(align) {
            let charge = self.pool.ledger().charge(bytes.len(), category)?;
            return Ok(Arc::new(CpuBuffer(Storage::Adopted { source, bytes, charge })));
        }
        let mut block = self.pool.allocate(bytes.len(), category, Init::Arbitrary)?;
        block.as_mut_slice().copy_from_slice(data);
        Ok(Arc::new(CpuBuffer(Storage::Owned(block))))
    }

    fn write(&self, buffer: &mut dyn Buffer, bytes: &[u8]) -> Result<()> {
        let target = crate::access::cpu_buffer_mut(buffer).bytes_mut();
        let target = target.ok_or(Error::Shared { op: "write", arg: "buffer" })?;
        let (expected, actual) = (bytes.len(), target.len());
        let target =
            target.get_mut(..expected).ok_or(Error::Length { op: "write", arg: "buffer", expected, actual })?;
        target.copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, buffer: &dyn Buffer, bytes: &mut [u8]) -> Result<()> {
        let source = crate::access::cpu_buffer(buffer).bytes();
        let (expected, actual) = (bytes.len(), source.len());
        let source = source.get(..expected).ok_or(Error::Length { op: "read", arg: "buffer", expected, actual })?;
        bytes.copy_from_slice(source);
        Ok(())
    }

    fn set_budget(&self, bytes: Option<u64>) -> Option<u64> {
        self.pool.ledger().set_budget(bytes)
    }

    fn host_threads(&self) -> Option<usize> {
        Some(self.num_threads())
    }

    fn usage(&self) -> Usage {
        self.pool.ledger().usage()
    }

    fn reset_peak(&self) {
        self.pool.ledger().reset_peak();
    }

    fn allocation_counts(&self) -> AllocationCounts {
        self.pool.counts()
    }

    fn pool_usage(&self) -> Result<PoolUsage> {
        Ok(self.pool.usage())
    }

    fn pool_classes(&self) -> Vec<ClassUsage> {
        self.pool.classes()
    }

    fn trim(&self) -> Result<()> {
        self.pool.trim();
        Ok(())
    }

    fn store(&self, place: &Place) -> Result<Arc<dyn TensorStore>> {
        unsloth_memory::open_store(place)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
