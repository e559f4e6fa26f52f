//! What the devices of this machine are, and what they offer.

use cubecl::{ir::features::Plane, prelude::Runtime};
use unsloth_core::{DType, DeviceInfo, DeviceName, Memory};

use crate::CubeBackend;

/// What only a driver knows of a device.
pub(crate) struct Described {
    pub(crate) name: DeviceName,
    pub(crate) model: String,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) driver: String,
}

impl Described {
    /// With what the opened device offers. One that does not open offers nothing, and says why.
    pub(crate) fn with<R: Runtime>(self, backend: unsloth_core::Result<CubeBackend<R>>) -> DeviceInfo {
        let Self { name, model, memory_bytes, driver } = self;
        let (dtypes, features) = match backend {
            Ok(backend) => {
                let dtypes = DType::FLOATS.into_iter().filter(|&dtype| backend.supports(dtype)).collect();
                (dtypes, backend.features())
            }
            Err(error) => (Vec::new(), vec![format!("does not open: {error}")]),
        };
        DeviceInfo { name, model, memory_bytes, driver: Some(driver), dtypes, features }
    }
}

const MEBIBYTE: u64 = 1 << 20;

impl<R: Runtime> CubeBackend<R> {
    /// What the device offers besides element types, a short phrase each.
    fn features(&self) -> Vec<String> {
        let properties = self.properties();
        let (hardware, features) = (&properties.hardware, &properties.features);
        let mut found = vec![
            format!("buffers up to {} MiB", properties.memory.max_page_size / MEBIBYTE),
            format!("{} units in a cube", hardware.max_units_per_cube),
            format!("{} KiB of shared memory", hardware.max_shared_memory_size / 1024),
            format!("planes of {}", hardware.plane_size_max),
        ];
        if features.plane.contains(Plane::Ops) {
            found.push("plane instructions".to_owned());
        }
        if !features.matmul.cmma.is_empty() || !features.matmul.mma.is_empty() {
            found.push("matrix instructions".to_owned());
        }
        found
    }
}

/// The devices that this build can use, in the order of their names.
pub fn devices() -> Vec<DeviceInfo> {
    let mut devices = Vec::new();
    #[cfg(feature = "wgpu")]
    devices.extend(crate::vulkan::devices());
    #[cfg(feature = "cuda")]
    devices.extend(crate::cuda::devices());
    devices
}
