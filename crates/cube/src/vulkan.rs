//! Vulkan devices through wgpu.

use cubecl_wgpu::{WgpuDevice, WgpuRuntime};
use unsloth_core::{Device, Error, Result};

use crate::{CubeBackend, CubeOptions};

/// A Vulkan device of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// Position in the list: the `N` of `vulkan:N`.
    pub index: usize,
    /// Name that the driver gives.
    pub name: String,
    /// Driver and its version.
    pub driver: String,
    /// Whether the device is the processor itself (a software driver such as lavapipe).
    pub is_cpu: bool,
    device: WgpuDevice,
}

/// The Vulkan devices of this machine, in the driver's order.
pub fn adapters() -> Vec<Adapter> {
    let descriptor = wgpu::InstanceDescriptor {
        backends: wgpu::Backends::VULKAN,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    };
    let instance = wgpu::Instance::new(descriptor);
    let found = cubecl::future::block_on(instance.enumerate_adapters(wgpu::Backends::VULKAN));
    // CubeCL counts devices of each kind on their own.
    let mut counts = [0usize; 3];
    let mut next = |kind: usize| {
        counts[kind] += 1;
        counts[kind] - 1
    };
    let adapter = |(index, adapter): (usize, wgpu::Adapter)| {
        let info = adapter.get_info();
        let device = match info.device_type {
            wgpu::DeviceType::DiscreteGpu => WgpuDevice::DiscreteGpu(next(0)),
            wgpu::DeviceType::IntegratedGpu => WgpuDevice::IntegratedGpu(next(1)),
            wgpu::DeviceType::VirtualGpu => WgpuDevice::VirtualGpu(next(2)),
            wgpu::DeviceType::Cpu => WgpuDevice::Cpu,
            wgpu::DeviceType::Other => WgpuDevice::DefaultDevice,
        };
        let driver = format!("{} {}", info.driver, info.driver_info).trim().to_owned();
        let is_cpu = info.device_type == wgpu::DeviceType::Cpu;
        Adapter { index, name: info.name, driver, is_cpu, device }
    };
    found.into_iter().enumerate().map(adapter).collect()
}

/// The device `vulkan:index`.
///
/// # Errors
/// [`Error::InvalidSpec`] if this machine has no such device; [`Error::Launch`] if it cannot be opened.
pub fn vulkan(index: usize, options: CubeOptions) -> Result<Device> {
    let Some(adapter) = adapters().into_iter().nth(index) else {
        let (value, rule) =
            (index.to_string(), "the index of a Vulkan device of this machine (is a driver installed?)");
        return Err(Error::InvalidSpec { op: "device", field: "vulkan", value, rule });
    };
    Ok(Device::new(CubeBackend::<WgpuRuntime>::new(&adapter.device, format!("vulkan:{index}"), options)?))
}
