//! Vulkan devices, and the device that wgpu prefers.

use std::{
    mem::discriminant,
    sync::{Mutex, PoisonError},
};

use cubecl_wgpu::{AutoGraphicsApi, GraphicsApi, RuntimeOptions, WgpuDevice, WgpuRuntime};
use unsloth_core::{Device, DeviceInfo, DeviceName, Error, Result};

use crate::{CubeBackend, CubeOptions, Pools, info::Described, poison};

/// A Vulkan device of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// Position in the list: the `N` of `vulkan:N`.
    pub index: usize,
    /// Name that the driver gives.
    pub name: String,
    /// Driver and its version.
    pub driver: String,
    /// Bytes of the device's own memory; `None` where the driver does not say.
    pub memory_bytes: Option<u64>,
    /// Whether the device is the processor itself (a software driver such as lavapipe).
    pub is_cpu: bool,
    device: WgpuDevice,
}

/// The Vulkan devices of this machine, in the driver's order.
pub fn adapters() -> Vec<Adapter> {
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
        let is_cpu = info.device_type == wgpu::DeviceType::Cpu;
        let (memory_bytes, driver) = (memory_bytes(&adapter), driver(&info));
        Adapter { index, name: info.name, driver, memory_bytes, is_cpu, device }
    };
    enumerate(wgpu::Backend::Vulkan).into_iter().enumerate().map(adapter).collect()
}

fn enumerate(backend: wgpu::Backend) -> Vec<wgpu::Adapter> {
    let backends = wgpu::Backends::from(backend);
    let descriptor = wgpu::InstanceDescriptor { backends, ..wgpu::InstanceDescriptor::new_without_display_handle() };
    cubecl::future::block_on(wgpu::Instance::new(descriptor).enumerate_adapters(backends))
}

fn driver(info: &wgpu::AdapterInfo) -> String {
    format!("{} {}", info.driver, info.driver_info).trim().to_owned()
}

/// Memory that Vulkan calls local to the device.
#[allow(unsafe_code, reason = "wgpu does not pass on how much memory a device has")]
fn memory_bytes(adapter: &wgpu::Adapter) -> Option<u64> {
    // SAFETY: the handle is used for a query below and not kept, and `adapter` outlives it.
    let vulkan = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = vulkan.shared_instance().raw_instance();
    // SAFETY: the physical device is one of this instance: both come from one adapter.
    let properties = unsafe { instance.get_physical_device_memory_properties(vulkan.raw_physical_device()) };
    /// `VK_MEMORY_HEAP_DEVICE_LOCAL_BIT`
    const DEVICE_LOCAL: u32 = 1;
    let heaps = properties.memory_heaps_as_slice().iter();
    Some(heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).sum())
}

fn open(device: &WgpuDevice, name: DeviceName, options: CubeOptions) -> Result<CubeBackend<WgpuRuntime>> {
    let name = name.to_string();
    divide(device, &name, options.pools)?;
    CubeBackend::new(device, name, CubeOptions { pools: Pools::Runtime, ..options })
}

/// Sees to it that the memory of a device is divided in this way. CubeCL opens a device once in a process.
fn divide(device: &WgpuDevice, name: &str, pools: Pools) -> Result<()> {
    static OPENED: Mutex<Vec<(WgpuDevice, Pools)>> = Mutex::new(Vec::new());
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&(_, before)) = opened.iter().find(|(known, _)| known == device) {
        let kind = |pools: Pools| discriminant(&pools.configuration().unwrap_or_default());
        if pools == Pools::Runtime || kind(pools) == kind(before) {
            return Ok(());
        }
        let (value, rule) = (format!("{pools:?}"), "as this process has opened the device first");
        return Err(Error::InvalidSpec { op: "open device", field: "pools", value, rule });
    }
    if let Some(memory_config) = pools.configuration() {
        let options = RuntimeOptions { memory_config, ..RuntimeOptions::default() };
        poison::caught("open device", name, || cubecl_wgpu::init_setup::<AutoGraphicsApi>(device, options))?;
    }
    opened.push((device.clone(), pools));
    Ok(())
}

/// The device `vulkan:index`.
///
/// # Errors
/// [`Error::InvalidSpec`] if this machine has no such device, or this process has opened it with other [`Pools`]; [`Error::Launch`] if it
/// cannot be opened.
pub fn vulkan(index: usize, options: CubeOptions) -> Result<Device> {
    let name = DeviceName::Vulkan(index);
    let adapters = adapters();
    let Some(adapter) = adapters.get(index) else {
        let rule = if adapters.is_empty() {
            "a device with a Vulkan driver, and none is installed (Debian and Ubuntu: apt-get install mesa-vulkan-drivers)"
        } else {
            "a Vulkan device of this machine: `unsloth devices` lists them"
        };
        return Err(Error::InvalidSpec { op: "device", field: "name", value: name.to_string(), rule });
    };
    let Adapter { name: model, driver, memory_bytes, is_cpu, .. } = adapter;
    let options = if *is_cpu { options } else { options.on_card(model, driver, *memory_bytes) };
    Ok(Device::new(open(&adapter.device, name, options)?))
}

/// The device that wgpu prefers on this system: through Metal on a Mac, through Vulkan on Linux.
///
/// # Errors
/// [`Error::InvalidSpec`] if there is none, or this process has opened it with other [`Pools`]; [`Error::Launch`] if it cannot be
/// opened.
pub fn wgpu(options: CubeOptions) -> Result<Device> {
    let adapters = enumerate(AutoGraphicsApi::backend());
    if adapters.is_empty() {
        let (value, rule) = (
            "wgpu".to_owned(),
            "asked for where there is a graphics driver (Debian and Ubuntu: apt-get install mesa-vulkan-drivers)",
        );
        return Err(Error::InvalidSpec { op: "device", field: "name", value, rule });
    }
    // Which one of several it is, wgpu does not say.
    let options = match adapters.as_slice() {
        [only] if only.get_info().device_type != wgpu::DeviceType::Cpu => {
            let info = only.get_info();
            options.on_card(&info.name, &driver(&info), memory_bytes(only))
        }
        _ => options,
    };
    Ok(Device::new(open(&WgpuDevice::DefaultDevice, DeviceName::Wgpu, options)?))
}

/// The Vulkan devices, and the one called `wgpu` where that is none of them.
pub(crate) fn devices() -> Vec<DeviceInfo> {
    let options = CubeOptions::default;
    let vulkan = adapters().into_iter().map(|adapter| {
        let Adapter { index, name: model, driver, memory_bytes, device, .. } = adapter;
        let name = DeviceName::Vulkan(index);
        Described { name, model, memory_bytes, driver }.with(open(&device, name, options()))
    });
    let preferred = AutoGraphicsApi::backend();
    let other = if preferred == wgpu::Backend::Vulkan { None } else { enumerate(preferred).into_iter().next() };
    let other = other.map(|adapter| {
        let info = adapter.get_info();
        let described =
            Described { name: DeviceName::Wgpu, driver: driver(&info), model: info.name, memory_bytes: None };
        described.with(open(&WgpuDevice::DefaultDevice, DeviceName::Wgpu, options()))
    });
    vulkan.chain(other).collect()
}
