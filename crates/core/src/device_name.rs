//! How devices are named and described.

use std::{fmt, str::FromStr};

use crate::{DType, Error};

/// A device as the command line spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceName {
    /// `cpu`: this processor.
    Cpu,
    /// `vulkan:N`: the Vulkan device of this index; `vulkan` is `vulkan:0`.
    Vulkan(usize),
    /// `wgpu`: the device that the system's own graphics interface prefers.
    Wgpu,
    /// `cuda:N`: the NVIDIA device of this index; `cuda` is `cuda:0`.
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let (kind, index) = match name.split_once(':') {
            Some((kind, index)) => (kind, index.parse().ok()),
            None => (name, Some(0)),
        };
        match (kind, index) {
            ("vulkan", Some(index)) => Ok(Self::Vulkan(index)),
            ("cuda", Some(index)) => Ok(Self::Cuda(index)),
            _ if name == "cpu" => Ok(Self::Cpu),
            _ if name == "wgpu" => Ok(Self::Wgpu),
            _ => Err(Error::InvalidSpec {
                op: "device",
                field: "name",
                value: name.to_owned(),
                rule: "cpu, vulkan:N, wgpu or cuda:N, with N counting from 0",
            }),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Vulkan(index) => write!(f, "vulkan:{index}"),
            Self::Wgpu => f.write_str("wgpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// A device of this machine, for a list that people read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// How to ask for it.
    pub name: DeviceName,
    /// What its driver or system calls it.
    pub model: String,
    /// Bytes of its own memory (that of the machine for the processor); `None` where its driver does not say.
    pub memory_bytes: Option<u64>,
    /// Driver and version; `None` for the processor, which needs none.
    pub driver: Option<String>,
    /// Float types that it stores and computes with, widest first.
    pub dtypes: Vec<DType>,
    /// Half-precision types that its tensor cores multiply for the kernels of this library.
    pub tensor_cores: Vec<DType>,
    /// What else it offers, a short phrase each.
    pub features: Vec<String>,
    /// What other devices of its kind offer and the library makes use of, but this one does not have, a short phrase each.
    pub lacks: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::DeviceName;

    #[test]
    fn names_round_trip() {
        for (name, device) in [
            ("cpu", DeviceName::Cpu),
            ("vulkan:0", DeviceName::Vulkan(0)),
            ("vulkan:12", DeviceName::Vulkan(12)),
            ("wgpu", DeviceName::Wgpu),
            ("cuda:3", DeviceName::Cuda(3)),
        ] {
            assert_eq!(name.parse::<DeviceName>().unwrap(), device);
            assert_eq!(device.to_string(), name);
        }
        assert_eq!("cuda".parse::<DeviceName>().unwrap(), DeviceName::Cuda(0));
    }

    #[test]
    fn other_names_are_refused_with_the_ones_there_are() {
        for name in ["", "gpu", "cpu:0", "wgpu:1", "vulkan:", "vulkan:-1", "vulkan:x", "cuda:1:2", "CPU"] {
            let error = name.parse::<DeviceName>().unwrap_err().to_string();
            assert!(error.contains("cpu, vulkan:N, wgpu or cuda:N"), "{name}: {error}");
        }
    }
}
