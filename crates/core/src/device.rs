//! A processor that tensors live on.

use std::sync::Arc;

use crate::{
    Backend, Buffer, Category, ClassUsage, DType, Element, Error, HostBytes, Init, Place, PoolUsage, Result, Shape,
    Tensor, TensorStore, Usage, Weight,
};

/// A handle on a backend; cheap to clone. Two handles are equal when they share one backend.
#[derive(Clone)]
pub struct Device(Arc<dyn Backend>);

impl Device {
    /// Wraps a backend.
    pub fn new(backend: impl Backend) -> Self {
        Self(Arc::new(backend))
    }

    /// The backend, for calling an operator's trait method directly. [`crate::ops`] checks arguments first: prefer it.
    pub fn backend(&self) -> &dyn Backend {
        &*self.0
    }

    /// Name as the command line spells it, such as `cpu` or `cuda:0`.
    pub fn name(&self) -> String {
        self.0.name()
    }

    /// Whether tensors of this type can be stored and computed with.
    pub fn supports(&self, dtype: DType) -> bool {
        self.0.supports(dtype)
    }

    /// The float types this device supports, widest first.
    pub fn float_dtypes(&self) -> Vec<DType> {
        DType::FLOATS.into_iter().filter(|&dtype| self.supports(dtype)).collect()
    }

    fn allocate(&self, shape: Shape, dtype: DType, category: Category, init: Init) -> Result<Tensor> {
        if !self.supports(dtype) {
            return Err(Error::UnsupportedDType { op: "allocate", dtype, device: self.name() });
        }
        let bytes = shape.num_elements().saturating_mul(dtype.size_bytes());
        let buffer = self.0.allocate(bytes, category, init)?;
        Ok(Tensor::from_buffer(self.clone(), dtype, shape, buffer))
    }

    /// A tensor whose contents are arbitrary: the caller writes every element before anyone reads one.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] before anything is allocated; [`Error::UnsupportedDType`].
    pub fn empty(&self, shape: impl Into<Shape>, dtype: DType, category: Category) -> Result<Tensor> {
        self.allocate(shape.into(), dtype, category, Init::Arbitrary)
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// As [`Device::empty`].
    pub fn zeros(&self, shape: impl Into<Shape>, dtype: DType, category: Category) -> Result<Tensor> {
        self.allocate(shape.into(), dtype, category, Init::Zero)
    }

    /// Copies a host slice to the device.
    ///
    /// # Errors
    /// [`Error::Length`] if the slice does not fill the shape; otherwise as [`Device::empty`].
    pub fn from_slice<T: Element>(&self, data: &[T], shape: impl Into<Shape>, category: Category) -> Result<Tensor> {
        let shape = shape.into();
        if data.len() != shape.num_elements() {
            let (expected, actual) = (shape.num_elements(), data.len());
            return Err(Error::Length { op: "from_slice", arg: "data", expected, actual });
        }
        let mut tensor = self.empty(shape, T::DTYPE, category)?;
        tensor.write(data)?;
        Ok(tensor)
    }

    /// Takes `bytes` of `source` as a tensor. The CPU keeps a reference (a memory-mapped file stays mapped, nothing is
    /// copied) where the data is aligned for its type; other devices copy.
    ///
    /// # Errors
    /// [`Error::Length`] if the range lies outside the source or has another size than shape and dtype need; otherwise as
    /// [`Device::empty`].
    pub fn adopt(
        &self,
        source: HostBytes,
        bytes: std::ops::Range<usize>,
        shape: impl Into<Shape>,
        dtype: DType,
        category: Category,
    ) -> Result<Tensor> {
        let shape = shape.into();
        if !self.supports(dtype) {
            return Err(Error::UnsupportedDType { op: "adopt", dtype, device: self.name() });
        }
        let expected = shape.num_elements().saturating_mul(dtype.size_bytes());
        let available = (*source).as_ref().len();
        if bytes.len() != expected || bytes.end > available {
            let actual = bytes.end.min(available).saturating_sub(bytes.start);
            return Err(Error::Length { op: "adopt", arg: "bytes", expected, actual });
        }
        let buffer: Arc<dyn Buffer> = self.0.adopt(source, bytes, dtype.size_bytes(), category)?;
        Ok(Tensor::from_buffer(self.clone(), dtype, shape, buffer))
    }

    /// Makes a frozen or trainable matrix ready for [`crate::ops::linear`]. `dense` is `[out_features, in_features]` and stays
    /// the one resident copy.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `dense` has two dimensions.
    pub fn prepare_weight(&self, dense: Tensor) -> Result<Weight> {
        Weight::dense(dense)
    }

    /// Most bytes that may be held from now on; `None` means what the device gives. Gives what it was before. What is held
    /// already stays.
    pub fn set_budget(&self, bytes: Option<u64>) -> Option<u64> {
        self.0.set_budget(bytes)
    }

    /// Bytes of memory that the device has of its own; `None` where it has none, or nothing tells.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.0.memory_bytes()
    }

    /// Threads of this process that operators run on, each with scratch of its own; `None` where something else computes.
    pub fn host_threads(&self) -> Option<usize> {
        self.0.host_threads()
    }

    /// Memory held, by category.
    pub fn usage(&self) -> Usage {
        self.0.usage()
    }

    /// What has been taken from the system or driver; waits for what was launched.
    ///
    /// # Errors
    /// [`Error::Launch`] if pending work failed.
    pub fn pool_usage(&self) -> Result<PoolUsage> {
        self.0.pool_usage()
    }

    /// Every size of block that the device's pool has ever lent, the smallest first, and how often: on the CPU. CubeCL does not tell, and
    /// there it is none.
    pub fn pool_classes(&self) -> Vec<ClassUsage> {
        self.0.pool_classes()
    }

    /// Gives back to the system or driver what no buffer has.
    ///
    /// # Errors
    /// [`Error::Launch`] if pending work failed.
    pub fn trim(&self) -> Result<()> {
        self.0.trim()
    }

    /// Somewhere else to keep tensors of this device.
    ///
    /// # Errors
    /// [`Error::Storage`] if no file can be made in the folder; [`Error::Launch`] if the system has no thread for the copies.
    pub fn store(&self, place: &Place) -> Result<Arc<dyn TensorStore>> {
        self.0.store(place)
    }

    /// Waits until everything launched so far has finished.
    ///
    /// # Errors
    /// [`Error::Launch`] if a kernel failed since the last call.
    pub fn synchronize(&self) -> Result<()> {
        self.0.synchronize()
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Device {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({})", self.name())
    }
}
