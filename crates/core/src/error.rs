//! The one error type below the training loop.

use std::path::PathBuf;

use crate::{Category, DType, Shape, Usage};

/// Result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong below the training loop.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor has another shape than the operator needs.
    #[error("{op}: `{arg}` has shape {actual}, expected {expected}")]
    Shape {
        /// Operator that refused the call.
        op: &'static str,
        /// Argument at fault.
        arg: &'static str,
        /// What the operator needs.
        expected: String,
        /// What it was given.
        actual: Shape,
    },
    /// A slice or buffer has another length than its shape says.
    #[error("{op}: `{arg}` has {actual} elements, expected {expected}")]
    Length {
        /// Operator that refused the call.
        op: &'static str,
        /// Argument at fault.
        arg: &'static str,
        /// Number of elements needed.
        expected: usize,
        /// Number of elements given.
        actual: usize,
    },
    /// A tensor has another element type than the operator needs; nothing is promoted silently.
    #[error("{op}: `{arg}` has dtype {actual}, expected {expected}")]
    DType {
        /// Operator that refused the call.
        op: &'static str,
        /// Argument at fault.
        arg: &'static str,
        /// Element type needed.
        expected: String,
        /// Element type given.
        actual: DType,
    },
    /// The device cannot store or compute this element type.
    #[error("{op}: dtype {dtype} is not supported on {device}")]
    UnsupportedDType {
        /// Operator that refused the call.
        op: &'static str,
        /// Element type asked for.
        dtype: DType,
        /// Name of the device.
        device: String,
    },
    /// Tensors of one call live on different devices.
    #[error("{op}: `{arg}` is on {actual}, expected {expected}")]
    Device {
        /// Operator that refused the call.
        op: &'static str,
        /// Argument at fault.
        arg: &'static str,
        /// Device of the first argument.
        expected: String,
        /// Device of this argument.
        actual: String,
    },
    /// A number that defines the operation is out of its range.
    #[error("{op}: {field} = {value}, must be {rule}")]
    InvalidSpec {
        /// Operator that refused the call.
        op: &'static str,
        /// Name of the field.
        field: &'static str,
        /// Value given.
        value: String,
        /// Rule that the value breaks.
        rule: &'static str,
    },
    /// A buffer to be written in place is shared with another tensor.
    #[error("{op}: `{arg}` is shared with another tensor and cannot be written in place")]
    Shared {
        /// Operator that refused the call.
        op: &'static str,
        /// Argument at fault.
        arg: &'static str,
    },
    /// The allocation would exceed the device's budget, or the device refused it.
    #[error(
        "out of memory on {device}: {requested_bytes} bytes for {category} do not fit the budget of {budget_bytes} bytes; in use: {breakdown}"
    )]
    OutOfMemory {
        /// Name of the device.
        device: String,
        /// Size of the refused allocation.
        requested_bytes: u64,
        /// What it was for.
        category: Category,
        /// The limit.
        budget_bytes: u64,
        /// What is held, by category.
        breakdown: Box<Usage>,
    },
    /// One tensor is larger than what a kernel of this device can be given, however much memory there is.
    #[error(
        "{op}: {requested_bytes} bytes of {category} in one tensor, and {device} binds at most {limit_bytes} bytes to a kernel"
    )]
    BufferTooLarge {
        /// Operator that needed the tensor, or `allocate` or `adopt`.
        op: &'static str,
        /// Name of the device.
        device: String,
        /// Size of the tensor.
        requested_bytes: u64,
        /// What it is for.
        category: Category,
        /// The device's limit.
        limit_bytes: u64,
    },
    /// The operator exists but this device does not implement this form of it.
    #[error("{op}: {what} is not supported on {device}")]
    Unsupported {
        /// Operator that refused the call.
        op: &'static str,
        /// The form that is missing.
        what: &'static str,
        /// Name of the device.
        device: String,
    },
    /// A file of tensors that wait outside their device could not be made, written or read.
    #[error("cannot {action} a temporary file in `{}`", folder.display())]
    Storage {
        /// What was tried.
        action: &'static str,
        /// The folder.
        folder: PathBuf,
        /// What the system reported.
        #[source]
        source: std::io::Error,
    },
    /// A tensor that waited outside its device did not come back as it went.
    #[error("a temporary file in `{}` is damaged: checksum {actual:08x}, expected {expected:08x}", folder.display())]
    Damaged {
        /// The folder of the file.
        folder: PathBuf,
        /// Checksum of what was written.
        expected: u32,
        /// Checksum of what was read.
        actual: u32,
    },
    /// A kernel could not be launched or failed.
    #[error("{op}: launch failed on {device}")]
    Launch {
        /// Operator whose kernel failed.
        op: &'static str,
        /// Name of the device.
        device: String,
        /// What the runtime reported.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
