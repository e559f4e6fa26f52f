//! How the memory of a device is divided.

#[cfg(feature = "wgpu")]
use cubecl::MemoryConfiguration;
use unsloth_core::{Error, Result};

/// How CubeCL's pool divides the memory that it takes from the driver. A pool belongs to a device and lives as long as the process: the
/// first to open the device decides.
///
/// `vulkan` and `wgpu` take a choice. On CUDA there is none: CubeCL's server for it can only be made
/// with the division that CubeCL takes by default, slices, and anything else is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pools {
    /// As CubeCL does by default, or as the device was opened before.
    #[default]
    Runtime,
    /// Buffers are slices of pages in a few sizes, up to the largest buffer: few allocations, and a page stays as long as one slice of it is
    /// used.
    Slices,
    /// Each buffer has a page of its own: [`trim`](unsloth_core::Device::trim) gives back all that is idle, and a buffer of a new size is an
    /// allocation more.
    Pages,
}

impl Pools {
    /// What CubeCL calls it; `None` where that is left to it.
    #[cfg(feature = "wgpu")]
    pub(crate) fn configuration(self) -> Option<MemoryConfiguration> {
        match self {
            Pools::Runtime => None,
            Pools::Slices => Some(MemoryConfiguration::SubSlices),
            Pools::Pages => Some(MemoryConfiguration::ExclusivePages),
        }
    }

    /// For devices whose pools cannot be chosen.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if they were.
    pub(crate) fn refuse(self, device: &str) -> Result<()> {
        match self {
            Pools::Runtime => Ok(()),
            _ => Err(Error::Unsupported { op: "open device", what: "a choice of pools", device: device.to_owned() }),
        }
    }
}
