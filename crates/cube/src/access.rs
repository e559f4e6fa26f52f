//! Handles of tensors.

use cubecl::server::Handle;
use unsloth_core::{Buffer, Category, DType, Error, Result, Shape, Tensor};

use crate::backend::CubeBuffer;

/// Runs `$body` with `$T` bound to the Rust type of a float dtype.
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
pub(crate) fn cube_buffer(buffer: &dyn Buffer) -> &CubeBuffer {
    match buffer.as_any().downcast_ref() {
        Some(buffer) => buffer,
        None => unreachable!("a tensor of another device reached a CubeCL backend"),
    }
}

pub(crate) fn cube_buffer_mut(buffer: &mut dyn Buffer) -> &mut CubeBuffer {
    match buffer.as_any_mut().downcast_mut() {
        Some(buffer) => buffer,
        None => unreachable!("a tensor of another device reached a CubeCL backend"),
    }
}

/// The handle of a tensor that a kernel reads.
pub(crate) fn handle(tensor: &Tensor) -> &Handle {
    cube_buffer(tensor.buffer()).handle()
}

/// The handle of a tensor that a kernel writes.
///
/// # Errors
/// [`Error::Shared`] if another tensor shares the buffer.
pub(crate) fn handle_mut<'a>(op: &'static str, arg: &'static str, tensor: &'a mut Tensor) -> Result<&'a Handle> {
    let buffer = tensor.buffer_mut().ok_or(Error::Shared { op, arg })?;
    Ok(cube_buffer_mut(buffer).handle())
}

/// A new activation on the device of `like`, contents arbitrary.
///
/// # Errors
/// Those of [`unsloth_core::Device::empty`]; one that the device cannot bind is refused in the name of `op`.
pub(crate) fn output(op: &'static str, like: &Tensor, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
    allocate(op, like, dtype, (shape.into(), Category::Activations))
}

/// The same for scratch of one call.
pub(crate) fn workspace(op: &'static str, like: &Tensor, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
    allocate(op, like, dtype, (shape.into(), Category::Workspace))
}

/// The same for memory of any category.
pub(crate) fn allocate(
    op: &'static str,
    like: &Tensor,
    dtype: DType,
    (shape, category): (Shape, Category),
) -> Result<Tensor> {
    like.device().empty(shape, dtype, category).map_err(|error| match error {
        Error::BufferTooLarge { device, requested_bytes, category, limit_bytes, .. } => {
            Error::BufferTooLarge { op, device, requested_bytes, category, limit_bytes }
        }
        other => other,
    })
}
