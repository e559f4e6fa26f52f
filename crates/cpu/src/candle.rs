//! The bridge for users of candle. Elements are copied once each way: candle lends its storage only under a lock.

use std::sync::Arc;

use candle_core as candle;
use unsloth_core::{Category, DType, Device, Element, HostBytes, Result, Tensor};

/// Why a tensor could not cross the bridge.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BridgeError {
    /// candle refused.
    #[error("candle refused the tensor")]
    Candle(#[from] candle::Error),
    /// This side refused.
    #[error(transparent)]
    Core(#[from] unsloth_core::Error),
    /// The tensor's element type has no counterpart here.
    #[error("candle dtype {0:?} has no counterpart")]
    DType(candle::DType),
    /// The tensor has more than four dimensions.
    #[error("candle tensor has {0} dimensions, at most 4 are supported")]
    Rank(usize),
}

/// candle's flat vector of a tensor's elements, in the order of its shape.
struct Flat<T>(Vec<T>);

impl<T: Element> AsRef<[u8]> for Flat<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Takes a candle tensor of f32, f16, bf16 or i32 elements. Gradients do not cross the bridge.
///
/// # Errors
/// [`BridgeError`] for another element type, more than four dimensions, or no memory.
pub fn from_candle(
    tensor: &candle::Tensor,
    device: &Device,
    category: Category,
) -> std::result::Result<Tensor, BridgeError> {
    fn adopt<T: Element + candle::WithDType>(
        tensor: &candle::Tensor,
        device: &Device,
        category: Category,
    ) -> std::result::Result<Tensor, BridgeError> {
        let shape = unsloth_core::Shape::try_from(tensor.dims()).map_err(|_| BridgeError::Rank(tensor.rank()))?;
        let source: HostBytes = Arc::new(Flat(tensor.flatten_all()?.to_vec1::<T>()?));
        let bytes = 0..(*source).as_ref().len();
        Ok(device.adopt(source, bytes, shape, <T as Element>::DTYPE, category)?)
    }
    match tensor.dtype() {
        candle::DType::F32 => adopt::<f32>(tensor, device, category),
        candle::DType::F16 => adopt::<half::f16>(tensor, device, category),
        candle::DType::BF16 => adopt::<half::bf16>(tensor, device, category),
        candle::DType::I32 => adopt::<i32>(tensor, device, category),
        other => Err(BridgeError::DType(other)),
    }
}

/// A candle CPU tensor with the same elements.
///
/// # Errors
/// [`BridgeError`] if candle refuses or pending work on the device failed.
pub fn to_candle(tensor: &Tensor) -> std::result::Result<candle::Tensor, BridgeError> {
    fn copy<T: Element + candle::WithDType>(tensor: &Tensor) -> std::result::Result<candle::Tensor, BridgeError> {
        let data: Result<Vec<T>> = tensor.to_vec();
        Ok(candle::Tensor::from_vec(data?, &**tensor.shape(), &candle::Device::Cpu)?)
    }
    match tensor.dtype() {
        DType::F32 => copy::<f32>(tensor),
        DType::F16 => copy::<half::f16>(tensor),
        DType::BF16 => copy::<half::bf16>(tensor),
        DType::I32 => copy::<i32>(tensor),
        other => unreachable!("{other} has a counterpart in candle"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let device = crate::device();
        let there = candle::Tensor::arange(0f32, 6.0, &candle::Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        // A transposed view: the elements arrive in the order of its shape.
        let ours = from_candle(&there.t().unwrap(), &device, Category::Activations).unwrap();
        assert_eq!(ours.shape()[..], [3, 2]);
        assert_eq!(ours.to_vec::<f32>().unwrap(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        let back = to_candle(&ours).unwrap();
        assert_eq!(back.to_vec2::<f32>().unwrap(), there.t().unwrap().to_vec2::<f32>().unwrap());
    }

    #[test]
    fn refuses_types_without_a_counterpart() {
        let there = candle::Tensor::zeros(2, candle::DType::F64, &candle::Device::Cpu).unwrap();
        let error = from_candle(&there, &crate::device(), Category::Activations).unwrap_err();
        assert_eq!(error.to_string(), "candle dtype F64 has no counterpart");
    }
}
