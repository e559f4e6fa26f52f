//! Buffers: handed through.

use std::{ops::Range, sync::Arc};

use unsloth_core::{
    AllocationCounts, Backend, Buffer, Category, ClassUsage, DType, HostBytes, Init, Memory, Place, PoolUsage, Result,
    TensorStore, Usage,
};

use super::MutantBackend;

impl<B: Backend> Memory for MutantBackend<B> {
    fn name(&self) -> String {
        match self.mutation {
            Some(mutation) => format!("{} with {mutation:?}", self.inner.name()),
            None => self.inner.name(),
        }
    }

    fn supports(&self, dtype: DType) -> bool {
        self.inner.supports(dtype)
    }

    fn allocate(&self, bytes: usize, category: Category, init: Init) -> Result<Arc<dyn Buffer>> {
        self.inner.allocate(bytes, category, init)
    }

    fn adopt(
        &self,
        source: HostBytes,
        bytes: Range<usize>,
        align: usize,
        category: Category,
    ) -> Result<Arc<dyn Buffer>> {
        self.inner.adopt(source, bytes, align, category)
    }

    fn write(&self, buffer: &mut dyn Buffer, bytes: &[u8]) -> Result<()> {
        self.inner.write(buffer, bytes)
    }

    fn read(&self, buffer: &dyn Buffer, bytes: &mut [u8]) -> Result<()> {
        self.inner.read(buffer, bytes)?;
        self.reads.add(bytes);
        Ok(())
    }

    fn set_budget(&self, bytes: Option<u64>) -> Option<u64> {
        self.inner.set_budget(bytes)
    }

    fn memory_bytes(&self) -> Option<u64> {
        self.inner.memory_bytes()
    }

    fn host_threads(&self) -> Option<usize> {
        self.inner.host_threads()
    }

    fn usage(&self) -> Usage {
        self.inner.usage()
    }

    fn reset_peak(&self) {
        self.inner.reset_peak();
    }

    fn num_reads(&self) -> u64 {
        self.inner.num_reads()
    }

    fn allocation_counts(&self) -> AllocationCounts {
        self.inner.allocation_counts()
    }

    fn pool_usage(&self) -> Result<PoolUsage> {
        self.inner.pool_usage()
    }

    fn pool_classes(&self) -> Vec<ClassUsage> {
        self.inner.pool_classes()
    }

    fn trim(&self) -> Result<()> {
        self.inner.trim()
    }

    fn store(&self, place: &Place) -> Result<Arc<dyn TensorStore>> {
        self.inner.store(place)
    }

    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }
}
