//! Buffers of f64 values.

use std::{any::Any, ops::Range, sync::Arc};

use unsloth_core::{
    AllocationCounts, Buffer, Category, DType, Error, HostBytes, Init, Memory, Place, PoolUsage, Result, Shape, Tensor,
    TensorStore, Usage,
};
use unsloth_memory::{Charge, Ledger};

/// The device `exact`. Its ledger counts what the same tensors would take in f32.
pub struct ExactBackend {
    ledger: Arc<Ledger>,
}

impl ExactBackend {
    /// A device with nothing on it.
    pub fn new() -> Self {
        Self { ledger: Ledger::new("exact", None) }
    }
}

impl Default for ExactBackend {
    fn default() -> Self {
        Self::new()
    }
}

enum Contents {
    /// As the host wrote them: ids, or floats of f32.
    Bytes(Vec<u8>),
    /// As an operator computed them.
    Values(Vec<f64>),
}

struct ExactBuffer {
    charge: Charge,
    contents: Contents,
}

impl Buffer for ExactBuffer {
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

fn contents(buffer: &dyn Buffer) -> Result<&Contents> {
    let found = buffer.as_any().downcast_ref::<ExactBuffer>().map(|buffer| &buffer.contents);
    found.ok_or_else(|| foreign("buffer"))
}

fn contents_mut(buffer: &mut dyn Buffer) -> Result<&mut Contents> {
    let found = buffer.as_any_mut().downcast_mut::<ExactBuffer>().map(|buffer| &mut buffer.contents);
    found.ok_or_else(|| foreign("buffer"))
}

fn foreign(arg: &'static str) -> Error {
    Error::Device { op: "exact", arg, expected: "exact".to_owned(), actual: "another device".to_owned() }
}

/// The elements of an f32 tensor of this device, as they were computed.
///
/// # Errors
/// [`Error::Device`] for a tensor of another device; [`Error::DType`] for integers.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    if tensor.dtype() != DType::F32 {
        let (expected, actual) = (DType::F32.to_string(), tensor.dtype());
        return Err(Error::DType { op: "values", arg: "tensor", expected, actual });
    }
    let mut values = match contents(tensor.buffer())? {
        Contents::Values(values) => values.clone(),
        Contents::Bytes(bytes) => {
            let floats = bytes.chunks_exact(4).map(|bytes| [bytes[0], bytes[1], bytes[2], bytes[3]]);
            floats.map(|bytes| f64::from(f32::from_ne_bytes(bytes))).collect()
        }
    };
    values.truncate(tensor.num_elements());
    Ok(values)
}

/// Overwrites all elements of an f32 tensor of this device.
///
/// # Errors
/// As [`values`]; [`Error::Length`]; [`Error::Shared`] if another tensor shares the buffer.
pub fn set_values(tensor: &mut Tensor, values: &[f64]) -> Result<()> {
    let (expected, actual) = (tensor.num_elements(), values.len());
    if expected != actual {
        return Err(Error::Length { op: "set_values", arg: "values", expected, actual });
    }
    overwrite(("set_values", "tensor"), tensor, values)
}

/// As [`set_values`], of an argument of an operator.
pub(crate) fn overwrite((op, arg): (&'static str, &'static str), tensor: &mut Tensor, values: &[f64]) -> Result<()> {
    let buffer = tensor.buffer_mut().ok_or(Error::Shared { op, arg })?;
    *contents_mut(buffer)? = Contents::Values(values.to_vec());
    Ok(())
}

/// A new f32 tensor on the device of `like`.
pub(crate) fn tensor(like: &Tensor, shape: impl Into<Shape>, values: Vec<f64>) -> Result<Tensor> {
    let mut tensor = like.device().empty(shape, DType::F32, Category::Activations)?;
    set_values(&mut tensor, &values)?;
    Ok(tensor)
}

/// The elements of an i32 tensor.
pub(crate) fn integers(tensor: &Tensor) -> Result<Vec<i32>> {
    tensor.to_vec::<i32>()
}

impl Memory for ExactBackend {
    fn name(&self) -> String {
        "exact".into()
    }

    fn supports(&self, dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::I32)
    }

    fn allocate(&self, bytes: usize, category: Category, _init: Init) -> Result<Arc<dyn Buffer>> {
        let charge = self.ledger.charge(bytes, category)?;
        Ok(Arc::new(ExactBuffer { charge, contents: Contents::Bytes(vec![0; bytes]) }))
    }

    fn adopt(
        &self,
        source: HostBytes,
        bytes: Range<usize>,
        _align: usize,
        category: Category,
    ) -> Result<Arc<dyn Buffer>> {
        let charge = self.ledger.charge(bytes.len(), category)?;
        Ok(Arc::new(ExactBuffer { charge, contents: Contents::Bytes((*source).as_ref()[bytes].to_vec()) }))
    }

    fn write(&self, buffer: &mut dyn Buffer, bytes: &[u8]) -> Result<()> {
        let (expected, actual) = (bytes.len(), buffer.accounted_bytes() as usize);
        if expected > actual {
            return Err(Error::Length { op: "write", arg: "buffer", expected, actual });
        }
        *contents_mut(buffer)? = Contents::Bytes(bytes.to_vec());
        Ok(())
    }

    /// Rounds what was computed to f32.
    fn read(&self, buffer: &dyn Buffer, bytes: &mut [u8]) -> Result<()> {
        let narrow: Vec<f32>;
        let stored = match contents(buffer)? {
            Contents::Bytes(stored) => &stored[..],
            Contents::Values(values) => {
                narrow = values.iter().map(|&value| value as f32).collect();
                bytemuck::cast_slice(&narrow)
            }
        };
        let (expected, actual) = (bytes.len(), stored.len());
        let stored = stored.get(..expected).ok_or(Error::Length { op: "read", arg: "buffer", expected, actual })?;
        bytes.copy_from_slice(stored);
        Ok(())
    }

    fn set_budget(&self, bytes: Option<u64>) -> Option<u64> {
        self.ledger.set_budget(bytes)
    }

    fn host_threads(&self) -> Option<usize> {
        Some(rayon::current_num_threads())
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

    /// What is there is taken as it is needed.
    fn pool_usage(&self) -> Result<PoolUsage> {
        Ok(PoolUsage { reserved_bytes: self.ledger.usage().total_live_bytes(), idle_bytes: 0 })
    }

    fn trim(&self) -> Result<()> {
        Ok(())
    }

    fn store(&self, _place: &Place) -> Result<Arc<dyn TensorStore>> {
        Err(Error::Unsupported { op: "store", what: "tensors that wait elsewhere", device: self.name() })
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
