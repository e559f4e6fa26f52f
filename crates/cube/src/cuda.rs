//! NVIDIA devices.

use cubecl_cuda::{CudaDevice, CudaRuntime};
use cudarc::driver::{result, sys};
use unsloth_core::{Device, DeviceInfo, DeviceName, Error, Result};

use crate::{CubeBackend, CubeOptions, info::Described};

/// The device `cuda:index`.
///
/// # Errors
/// [`Error::InvalidSpec`] if the driver, NVRTC or the device is missing; [`Error::Launch`] if the device cannot be opened;
/// [`Error::Unsupported`] for a choice of [`Pools`](crate::Pools).
pub fn cuda(index: usize, options: CubeOptions) -> Result<Device> {
    let name = DeviceName::Cuda(index);
    let missing = |rule| Error::InvalidSpec { op: "device", field: "name", value: name.to_string(), rule };
    if !has_driver() {
        return Err(missing("a device with NVIDIA's driver, and there is no libcuda: install the driver"));
    }
    if !has_compiler() {
        return Err(missing(
            "asked for where kernels can be compiled, and there is no libnvrtc: install the CUDA toolkit and point CUDA_PATH at it",
        ));
    }
    if index >= count() {
        return Err(missing("an NVIDIA device of this machine: `unsloth devices` lists them"));
    }
    let options = match described(index) {
        Some(Described { model, driver, memory_bytes, .. }) => options.on_card(&model, &driver, memory_bytes),
        None => options,
    };
    Ok(Device::new(open(index, options)?))
}

fn open(index: usize, options: CubeOptions) -> Result<CubeBackend<CudaRuntime>> {
    CubeBackend::new(&CudaDevice::new(index), DeviceName::Cuda(index).to_string(), options)
}

#[allow(unsafe_code, reason = "looking for a library is loading it")]
fn has_driver() -> bool {
    // SAFETY: loading the driver runs nothing but its own initialisation, as every CUDA program does.
    unsafe { sys::is_culib_present() }
}

#[allow(unsafe_code, reason = "looking for a library is loading it")]
fn has_compiler() -> bool {
    // SAFETY: as for the driver.
    unsafe { cudarc::nvrtc::sys::is_culib_present() }
}

/// Devices that the driver, which is there, has.
fn count() -> usize {
    let count = result::init().and_then(|()| result::device::get_count());
    count.map_or(0, |count| usize::try_from(count).unwrap_or(0))
}

/// The NVIDIA devices; none without a driver.
pub(crate) fn devices() -> Vec<DeviceInfo> {
    if !has_driver() {
        return Vec::new();
    }
    (0..count()).filter_map(|index| Some(described(index)?.with(open(index, CubeOptions::default())))).collect()
}

#[allow(unsafe_code, reason = "the driver's interface is one of C")]
fn described(index: usize) -> Option<Described> {
    let device = result::device::get(i32::try_from(index).ok()?).ok()?;
    let model = result::device::get_name(device).ok()?;
    // SAFETY: `device` comes from `get`, on a driver that `count` initialised.
    let memory_bytes = unsafe { result::device::total_mem(device) }.ok().map(|bytes| bytes as u64);
    let mut version = 0;
    // SAFETY: the driver writes one integer there and keeps no reference.
    let status = unsafe { sys::cuDriverGetVersion(&mut version) };
    let known = status == sys::CUresult::CUDA_SUCCESS;
    let version = if known { format!("{}.{}", version / 1000, version % 1000 / 10) } else { "unknown".to_owned() };
    Some(Described { name: DeviceName::Cuda(index), model, memory_bytes, driver: format!("CUDA {version}") })
}
