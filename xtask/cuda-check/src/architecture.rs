//! GPU architectures and how many cubes fit on one of their multiprocessors.

use serde::Serialize;

/// An architecture, with the limits that NVIDIA publishes (CUDA C++ Programming Guide, "Technical Specifications per Compute
/// Capability", and `cuda_occupancy.h`).
#[derive(Debug)]
pub(crate) struct Architecture {
    /// Compute capability, major and minor digit together.
    pub(crate) capability: u32,
    /// What NVRTC is asked for: what CubeCL asks it for on such a device.
    pub(crate) target: &'static str,
    /// Multiprocessors of the usual card: A100, H100 SXM, B200.
    pub(crate) multiprocessors: u32,
    /// Memory of that card.
    pub(crate) memory_bytes: u64,
    /// Shared memory of a multiprocessor.
    shared_bytes: usize,
    /// Shared memory that one cube can ask for.
    pub(crate) shared_bytes_per_cube: usize,
}

/// What [`Architecture`]s of today have in common.
pub(crate) const PLANE_SIZE: u32 = 32;
pub(crate) const MAX_UNITS_PER_CUBE: u32 = 1024;
const PLANES: u32 = 64;
const CUBES: u32 = 32;
const REGISTERS: u32 = 64 * 1024;
/// Registers are given to planes in blocks of this many.
const REGISTER_BLOCK: u32 = 256;
/// Planes that have registers, in groups of one per scheduler.
const SCHEDULERS: u32 = 4;
const SHARED_BLOCK: usize = 128;
/// Kept by the driver, of each cube.
const SHARED_RESERVED: usize = 1024;

pub(crate) static ARCHITECTURES: [Architecture; 3] = [
    Architecture {
        capability: 80,
        target: "sm_80",
        multiprocessors: 108,
        memory_bytes: 80 << 30,
        shared_bytes: 164 * 1024,
        shared_bytes_per_cube: 163 * 1024,
    },
    Architecture {
        capability: 90,
        target: "sm_90a",
        multiprocessors: 132,
        memory_bytes: 80 << 30,
        shared_bytes: 228 * 1024,
        shared_bytes_per_cube: 227 * 1024,
    },
    Architecture {
        capability: 100,
        target: "sm_100a",
        multiprocessors: 148,
        memory_bytes: 180 << 30,
        shared_bytes: 228 * 1024,
        shared_bytes_per_cube: 227 * 1024,
    },
];

/// What a kernel takes of a multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Demand {
    pub(crate) registers: u32,
    pub(crate) shared_bytes: usize,
    pub(crate) units: u32,
}

/// How much of a multiprocessor is in use while a kernel runs with as many cubes as fit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Occupancy {
    /// Resident planes in percent of the most that a multiprocessor holds.
    pub(crate) percent: f32,
    /// What stops the next cube.
    pub(crate) limit: &'static str,
}

impl Architecture {
    pub(crate) fn occupancy(&self, demand: Demand) -> Occupancy {
        let planes = demand.units.div_ceil(PLANE_SIZE).max(1);
        let registers_per_plane = (demand.registers.max(1) * PLANE_SIZE).next_multiple_of(REGISTER_BLOCK);
        let planes_with_registers = REGISTERS / registers_per_plane / SCHEDULERS * SCHEDULERS;
        let shared = (demand.shared_bytes + SHARED_RESERVED).next_multiple_of(SHARED_BLOCK);
        let limits = [
            (PLANES / planes, "units"),
            (planes_with_registers / planes, "registers"),
            ((self.shared_bytes / shared) as u32, "shared memory"),
            (CUBES, "cubes"),
        ];
        // Of equal limits the first: more units than these are never resident, whatever else is saved.
        let (cubes, limit) =
            limits.into_iter().fold((u32::MAX, ""), |least, one| if one.0 < least.0 { one } else { least });
        Occupancy { percent: 100.0 * (cubes * planes) as f32 / PLANES as f32, limit }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn occupancy(capability: u32, registers: u32, shared_bytes: usize, units: u32) -> (f32, &'static str) {
        let architecture = ARCHITECTURES.iter().find(|a| a.capability == capability).unwrap();
        let Occupancy { percent, limit } = architecture.occupancy(Demand { registers, shared_bytes, units });
        (percent, limit)
    }

    /// Worked by hand from the published limits.
    #[test]
    fn occupancy_by_hand() {
        // 8 planes per cube, 32 * 32 = 1024 registers per plane: 64 planes.
        assert_eq!(occupancy(80, 32, 0, 256), (100.0, "units"));
        // 64 * 32 = 2048 registers per plane: 32 planes, 4 cubes.
        assert_eq!(occupancy(80, 64, 0, 256), (50.0, "registers"));
        // 247 * 32 = 7904, in blocks 7936: 8 planes, 4 cubes of 2.
        assert_eq!(occupancy(80, 247, 0, 64), (12.5, "registers"));
        // 65 * 32 = 2080, in blocks 2304: 28 planes, 3 cubes of 8.
        assert_eq!(occupancy(90, 65, 0, 256), (37.5, "registers"));
        // 48 KiB and 1 KiB: 3 cubes of 164 KiB, 4 of 228 KiB.
        assert_eq!(occupancy(80, 32, 48 * 1024, 256), (37.5, "shared memory"));
        assert_eq!(occupancy(90, 32, 48 * 1024, 256), (50.0, "shared memory"));
        // 32 cubes of one plane.
        assert_eq!(occupancy(90, 32, 0, 32), (50.0, "cubes"));
    }
}
