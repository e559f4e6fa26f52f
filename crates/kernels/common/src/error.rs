//! Why a kernel was not launched.

/// A launch refused before it could fail silently on the device.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The device lacks something that the kernel needs.
    #[error("{kernel}: {what} is not supported by {device}")]
    Unsupported {
        /// Kernel that was not launched.
        kernel: &'static str,
        /// Missing feature, such as an element type.
        what: String,
        /// Name of the runtime.
        device: String,
    },
    /// The launch would exceed a limit of the device.
    #[error("{kernel}: {what} = {value} exceeds the device's limit of {limit}")]
    Limit {
        /// Kernel that was not launched.
        kernel: &'static str,
        /// What is limited, such as units per cube.
        what: &'static str,
        /// What the launch needs.
        value: u64,
        /// What the device offers.
        limit: u64,
    },
    /// A buffer is smaller than its documented shape.
    #[error("{kernel}: `{arg}` holds {actual} bytes, its shape needs {expected}")]
    Length {
        /// Kernel that was not launched.
        kernel: &'static str,
        /// Argument at fault.
        arg: &'static str,
        /// Bytes that the shape needs.
        expected: u64,
        /// Bytes that the buffer holds.
        actual: u64,
    },
    /// A number that defines the launch is out of its range.
    #[error("{kernel}: {field} = {value}, must be {rule}")]
    Invalid {
        /// Kernel that was not launched.
        kernel: &'static str,
        /// Name of the field.
        field: &'static str,
        /// Value given.
        value: u64,
        /// Rule that the value breaks.
        rule: &'static str,
    },
    /// Before this launch another one has failed, which a wait for the device brought to light.
    #[error("{kernel}: what was launched before has failed: {message}")]
    Earlier {
        /// Kernel that was not launched.
        kernel: &'static str,
        /// What the device reports.
        message: String,
    },
}
