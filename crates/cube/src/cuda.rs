//! NVIDIA devices.

use cubecl_cuda::{CudaDevice, CudaRuntime};
use unsloth_core::{Device, Result};

use crate::{CubeBackend, CubeOptions};

/// The device `cuda:index`.
///
/// # Errors
/// [`unsloth_core::Error::Launch`] if the driver or the device is missing.
pub fn cuda(index: usize, options: CubeOptions) -> Result<Device> {
    Ok(Device::new(CubeBackend::<CudaRuntime>::new(&CudaDevice::new(index), format!("cuda:{index}"), options)?))
}
