//! Typed slices of tensors.

use unsloth_core::{Buffer, Category, DType, Element, Error, Result, Shape, Tensor};

use crate::backend::CpuBuffer;

/// Runs `$body` with `$T` bound to the Rust type of a float [`DType`].
macro_rules! dispatch_float {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            unsloth_core::DType::F32 => {
                type $T = f32;
                $body
            }
            unsloth_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            unsloth_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => unreachable!("operators check that {other} is a float type before they dispatch"),
        }
    };
}
pub(crate) use dispatch_float;

/// Every tensor that reaches a backend was made by it: operators check devices first.
pub(crate) fn cpu_buffer(buffer: &dyn Buffer) -> &CpuBuffer {
    match buffer.as_any().downcast_ref() {
        Some(buffer) => buffer,
        None => unreachable!("a tensor of another device reached the CPU backend"),
    }
}

pub(crate) fn cpu_buffer_mut(buffer: &mut dyn Buffer) -> &mut CpuBuffer {
    match buffer.as_any_mut().downcast_mut() {
        Some(buffer) => buffer,
        None => unreachable!("a tensor of another device reached the CPU backend"),
    }
}

/// The elements of a tensor.
pub(crate) fn read<T: Element>(tensor: &Tensor) -> &[T] {
    assert_eq!(tensor.dtype(), T::DTYPE, "operators check dtypes before they dispatch");
    &bytemuck::cast_slice(cpu_buffer(tensor.buffer()).bytes())[..tensor.num_elements()]
}

/// The elements of a tensor that nobody shares.
///
/// # Errors
/// [`Error::Shared`] if another tensor shares the buffer, or it is adopted and so read-only.
pub(crate) fn write<'a, T: Element>(
    op: &'static str,
    arg: &'static str,
    tensor: &'a mut Tensor,
) -> Result<&'a mut [T]> {
    assert_eq!(tensor.dtype(), T::DTYPE, "operators check dtypes before they dispatch");
    let num_elements = tensor.num_elements();
    let buffer = tensor.buffer_mut().ok_or(Error::Shared { op, arg })?;
    let bytes = cpu_buffer_mut(buffer).bytes_mut().ok_or(Error::Shared { op, arg })?;
    Ok(&mut bytemuck::cast_slice_mut(bytes)[..num_elements])
}

/// A new tensor on the device of `like`, contents arbitrary.
pub(crate) fn output(like: &Tensor, dtype: DType, shape: impl Into<Shape>, category: Category) -> Result<Tensor> {
    like.device().empty(shape, dtype, category)
}

/// The tensor itself if nobody shares it, else a copy: what an in-place operator works on.
pub(crate) fn take_or_copy(tensor: Tensor) -> Result<Tensor> {
    if tensor.is_unique() && cpu_buffer(tensor.buffer()).is_owned() {
        return Ok(tensor);
    }
    let mut copy = output(&tensor, tensor.dtype(), *tensor.shape(), Category::Activations)?;
    copy_bytes(&tensor, &mut copy)?;
    Ok(copy)
}

/// Copies all elements between tensors of one dtype and size.
pub(crate) fn copy_bytes(from: &Tensor, to: &mut Tensor) -> Result<()> {
    let bytes = from.bytes();
    let buffer = to.buffer_mut().ok_or(Error::Shared { op: "copy", arg: "to" })?;
    let target = cpu_buffer_mut(buffer).bytes_mut().ok_or(Error::Shared { op: "copy", arg: "to" })?;
    target[..bytes].copy_from_slice(&cpu_buffer(from.buffer()).bytes()[..bytes]);
    Ok(())
}
