//! What the devices of this machine are, and what they offer.

use cubecl::{
    ir::features::{Plane, Tma},
    prelude::*,
};
use unsloth_common::mma;
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
        let driver = Some(driver);
        match backend {
            Ok(backend) => {
                let dtypes: Vec<_> = DType::FLOATS.into_iter().filter(|&dtype| backend.supports(dtype)).collect();
                let (tensor_cores, features) = (backend.tensor_cores(), backend.features());
                let lacks = backend.lacks(&dtypes, &tensor_cores);
                DeviceInfo { name, model, memory_bytes, driver, dtypes, tensor_cores, features, lacks }
            }
            Err(error) => {
                let features = vec![format!("does not open: {error}")];
                let (dtypes, tensor_cores, lacks) = (Vec::new(), Vec::new(), Vec::new());
                DeviceInfo { name, model, memory_bytes, driver, dtypes, tensor_cores, features, lacks }
            }
        }
    }
}

const MEBIBYTE: u64 = 1 << 20;

impl<R: Runtime> CubeBackend<R> {
    /// Types that are multiplied on tensor cores, in sizes that allow it.
    fn tensor_cores(&self) -> Vec<DType> {
        let elements = [
            (DType::F16, half::f16::as_type_native_unchecked()),
            (DType::BF16, half::bf16::as_type_native_unchecked()),
        ];
        let multiplied =
            elements.into_iter().filter(|(_, element)| mma::is_supported(self.client(), element.storage_type()));
        multiplied.map(|(dtype, _)| dtype).collect()
    }

    /// What kernels of this library would use if it were there.
    fn lacks(&self, dtypes: &[DType], tensor_cores: &[DType]) -> Vec<String> {
        let missing = DType::FLOATS.into_iter().filter(|dtype| !dtypes.contains(dtype));
        let mut lacks: Vec<String> = missing.map(|dtype| dtype.to_string()).collect();
        if tensor_cores.is_empty() {
            lacks.push("tensor cores".to_owned());
        }
        if !self.properties().features.tma.contains(Tma::Base) {
            lacks.push("copy engine".to_owned());
        }
        lacks
    }

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
