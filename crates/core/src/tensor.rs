//! A contiguous, row-major array on a device.

use std::sync::Arc;

use crate::{Buffer, BufferId, Category, DType, Device, Element, Error, FloatElement, Result, Shape};

/// A contiguous, row-major array on a [`Device`]. Cloning shares the buffer.
///
/// An operator that may reuse an input takes the `Tensor` by value: the buffer is reused when nobody else holds it, else a
/// new one is made. The result has the same bits either way.
#[derive(Clone)]
pub struct Tensor {
    device: Device,
    dtype: DType,
    shape: Shape,
    buffer: Arc<dyn Buffer>,
}

impl Tensor {
    /// Wraps a buffer that holds at least `shape.num_elements()` elements. For backends.
    pub fn from_buffer(device: Device, dtype: DType, shape: impl Into<Shape>, buffer: Arc<dyn Buffer>) -> Self {
        Self { device, dtype, shape: shape.into(), buffer }
    }

    /// The device that holds the data.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Storage type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, row-major.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.num_elements()
    }

    /// Bytes of the elements, without rounding.
    pub fn bytes(&self) -> usize {
        self.num_elements() * self.dtype.size_bytes()
    }

    /// The storage. For backends.
    pub fn buffer(&self) -> &dyn Buffer {
        &*self.buffer
    }

    /// Which storage it is.
    pub fn buffer_id(&self) -> BufferId {
        BufferId::of(&*self.buffer)
    }

    /// The storage for writing, if no other tensor shares it. For backends.
    pub fn buffer_mut(&mut self) -> Option<&mut dyn Buffer> {
        Arc::get_mut(&mut self.buffer)
    }

    /// True if no other tensor shares the buffer.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.buffer) == 1
    }

    /// Moves the buffer's bytes to another category in the ledger.
    pub fn retag(&self, category: Category) {
        self.buffer.retag(category);
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs.
    pub fn reshape(mut self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if shape.num_elements() != self.num_elements() {
            let expected = format!("{} elements for {shape}", shape.num_elements());
            return Err(Error::Shape { op: "reshape", arg: "tensor", expected, actual: self.shape });
        }
        self.shape = shape;
        Ok(self)
    }

    /// Overwrites all elements from a host slice.
    ///
    /// # Errors
    /// [`Error::DType`], [`Error::Length`]; [`Error::Shared`] if another tensor shares the buffer.
    pub fn write<T: Element>(&mut self, data: &[T]) -> Result<()> {
        if T::DTYPE != self.dtype {
            let expected = T::DTYPE.to_string();
            return Err(Error::DType { op: "write", arg: "tensor", expected, actual: self.dtype });
        }
        if data.len() != self.num_elements() {
            let (expected, actual) = (self.num_elements(), data.len());
            return Err(Error::Length { op: "write", arg: "data", expected, actual });
        }
        let device = self.device.clone();
        let buffer = self.buffer_mut().ok_or(Error::Shared { op: "write", arg: "tensor" })?;
        device.backend().write(buffer, bytemuck::cast_slice(data))
    }

    /// Copies all elements to the host. Waits for the device.
    ///
    /// # Errors
    /// [`Error::DType`] if `T` is not the tensor's type; [`Error::Launch`] if pending work failed.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        if T::DTYPE != self.dtype {
            let expected = T::DTYPE.to_string();
            return Err(Error::DType { op: "to_vec", arg: "tensor", expected, actual: self.dtype });
        }
        let mut data = vec![T::zeroed(); self.num_elements()];
        self.device.backend().read(self.buffer(), bytemuck::cast_slice_mut(&mut data))?;
        Ok(data)
    }

    /// Copies all elements to the host as the bytes they are stored in. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Launch`] if pending work failed.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.bytes()];
        self.device.backend().read(self.buffer(), &mut bytes)?;
        Ok(bytes)
    }

    /// Copies all elements of a float tensor to the host, widened to f32.
    ///
    /// # Errors
    /// [`Error::DType`] for an integer tensor; [`Error::Launch`] if pending work failed.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        fn widen<T: FloatElement>(tensor: &Tensor) -> Result<Vec<f32>> {
            Ok(tensor.to_vec::<T>()?.into_iter().map(T::to_f32).collect())
        }
        match self.dtype {
            DType::F32 => self.to_vec(),
            DType::F16 => widen::<half::f16>(self),
            DType::BF16 => widen::<half::bf16>(self),
            actual @ DType::I32 => {
                Err(Error::DType { op: "to_f32_vec", arg: "tensor", expected: "a float type".into(), actual })
            }
        }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({} {} on {})", self.dtype, self.shape, self.device.name())
    }
}
