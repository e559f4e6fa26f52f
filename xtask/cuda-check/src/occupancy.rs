//! Kernels that may leave more than half of a multiprocessor's planes empty, and why.

use crate::{
    architecture::Occupancy,
    compile::{Compiled, Kernel},
};

/// In percent: below this a kernel has to be in [`LISTED`].
pub(crate) const LOW: f32 = 50.0;

/// A kernel of low occupancy.
pub(crate) struct Listed {
    /// As `attention::forward::forward_kernel`.
    pub(crate) kernel: &'static str,
    /// Units of the cubes that it is listed for; `None`: of any.
    pub(crate) units: Option<u32>,
    /// In percent: less than this fails all the same.
    pub(crate) least: f32,
    /// What the kernel keeps instead of more planes.
    pub(crate) reason: &'static str,
}

/// Every kernel that is below [`LOW`] in some instantiation on some architecture.
pub(crate) static LISTED: [Listed; 14] = [
    Listed { kernel: "attention::forward::forward_kernel", units: None, least: 12.5, reason: FORWARD },
    Listed { kernel: "attention::forward::cached_kernel", units: None, least: 12.5, reason: FORWARD },
    Listed { kernel: "attention::decode::planes::part_kernel", units: None, least: 25.0, reason: PART },
    Listed { kernel: "attention::backward::keys_kernel", units: None, least: 12.5, reason: BACKWARD },
    Listed { kernel: "attention::backward::queries_kernel", units: None, least: 12.5, reason: BACKWARD },
    Listed { kernel: "attention::tensor::forward::forward_kernel", units: None, least: 25.0, reason: TENSOR_FORWARD },
    Listed { kernel: "attention::tensor::forward::cached_kernel", units: None, least: 25.0, reason: TENSOR_FORWARD },
    Listed { kernel: "attention::tensor::backward::keys_kernel", units: None, least: 12.5, reason: TENSOR_KEYS },
    Listed { kernel: "attention::tensor::backward::queries_kernel", units: None, least: 12.5, reason: TENSOR_QUERIES },
    Listed { kernel: "linear::product::tiled_kernel", units: Some(128), least: 43.0, reason: PRODUCT },
    Listed { kernel: "linear::product::tiled_kernel", units: Some(256), least: 25.0, reason: LARGE_PRODUCT },
    Listed { kernel: "linear::product::tiled_kernel", units: Some(32), least: 39.0, reason: SMALL_PRODUCT },
    Listed { kernel: CUBEK, units: Some(512), least: 25.0, reason: CUBEK_PRODUCT },
    Listed { kernel: "linear::tensor::tensor_kernel", units: None, least: 12.5, reason: TENSOR_PRODUCT },
];

const FORWARD: &str = "a tile of queries and one of keys in shared memory, four rows of a unit, up to 32 products and 32 sums of it in \
    registers: each number that is loaded is used for four or eight products, which is faster than more planes with two rows each";
const PART: &str = "several keys and values on their way to a unit's registers, beside the sums of up to four heads: bytes under way are what a pass over a cache \
    needs, and more of them per unit take the place of more units";
const BACKWARD: &str = "two tiles of queries and two of keys in shared memory, four rows of a unit, up to 32 products and 64 sums of it in \
    registers: each number that is loaded is used for four or eight products, which is faster than more planes with two rows each";

const TENSOR_FORWARD: &str = "the output of 16 rows and their scores in the registers of a plane, where tensor cores need them: nothing of a row goes \
    through memory";
const TENSOR_KEYS: &str = "the gradients of 16 keys and 16 values in the registers of a plane, 128 of a unit's for heads of 128 channels, beside the \
    products that they are summed from";
const TENSOR_QUERIES: &str = "the gradient of 16 rows and two blocks of products in the registers of a plane, two tiles of queries and two of keys in \
    shared memory";
const PRODUCT: &str = "32 sums of a unit in registers, each number that is loaded used for four or eight products; on sm_100a the assembler takes a \
    few registers more than half of a multiprocessor's planes leave";
const LARGE_PRODUCT: &str =
    "64 sums of a unit in registers, and half as many loads: launched only where it is the fastest as measured";
const SMALL_PRODUCT: &str = "one plane to a cube, of which a multiprocessor's shared memory takes so many: launched only where it is the fastest as measured";
const CUBEK: &str = "cubek_matmul::components::batch::partitioned_matmul::matmul::matmul_entry";
const CUBEK_PRODUCT: &str =
    "a library's: sums of its tiles in registers; launched only where it is the fastest as measured";
const TENSOR_PRODUCT: &str = "64 sums of a unit in registers: with a block of 64 by 32 per plane an operand that is loaded serves four or eight products, and \
    the next tile's numbers are on their way beside them";

impl Listed {
    fn covers(&self, kernel: &Kernel) -> bool {
        self.kernel == kernel.name && self.units.is_none_or(|units| units == kernel.units)
    }
}

/// What is wrong with the occupancy of `kernel` on one architecture.
pub(crate) fn problem(kernel: &Kernel, occupancy: Occupancy) -> Option<String> {
    let Occupancy { percent, limit } = occupancy;
    match LISTED.iter().find(|listed| listed.covers(kernel)) {
        _ if percent >= LOW => None,
        None => Some(format!("occupancy {percent:.1}% (limit: {limit}), and no reason in cuda-check's occupancy.rs")),
        Some(listed) if percent < listed.least => {
            Some(format!("occupancy {percent:.1}% (limit: {limit}), less than the {}% listed", listed.least))
        }
        Some(_) => None,
    }
}

/// Entries of [`LISTED`] that nothing needs.
pub(crate) fn unneeded(kernels: &[Kernel]) -> Vec<String> {
    let low = |kernel: &Kernel| {
        kernel.on.values().any(|on| matches!(on, Compiled::Uses(uses) if uses.occupancy.percent < LOW))
    };
    let is_needed = |listed: &&Listed| kernels.iter().any(|kernel| listed.covers(kernel) && low(kernel));
    let unneeded = LISTED.iter().filter(|listed| !is_needed(listed));
    unneeded
        .map(|listed| format!("{}: listed in cuda-check's occupancy.rs, but not below {LOW}%", listed.kernel))
        .collect()
}
