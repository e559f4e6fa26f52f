//! Kernels of which some variant may spill, and why.

use crate::compile::Kernel;

/// A kernel that spills.
struct Listed {
    /// As `attention::forward::forward_kernel`.
    kernel: &'static str,
    /// What the calls that it is listed for have in their names; of any, if empty.
    calls: &'static str,
    /// More bytes than this, stores and loads counted in the code of a unit, fail all the same.
    most: u32,
    reason: &'static str,
}

/// Every kernel that spills in some instantiation on some architecture, or did in another run: of another order of the same declarations, which
/// CubeCL keeps in hash maps, the assembler makes other registers.
static LISTED: [Listed; 7] = [
    Listed { kernel: "attention::forward::forward_kernel", calls: "head_dim 256", most: 128, reason: ONE_MORE_CUBE },
    Listed { kernel: "attention::forward::forward_kernel", calls: "head_dim 33", most: 32, reason: ONE_MORE_CUBE },
    Listed { kernel: "attention::forward::cached_kernel", calls: "head_dim 256", most: 128, reason: ONE_MORE_CUBE },
    Listed { kernel: "attention::backward::queries_kernel", calls: "head_dim 256", most: 128, reason: ONE_MORE_CUBE },
    Listed { kernel: "attention::decode::planes::part_kernel", calls: "", most: 96, reason: ONE_MORE_CUBE },
    Listed { kernel: "linear::tensor::tensor_kernel", calls: "", most: 16, reason: ONE_MORE_CUBE },
    Listed { kernel: "norm::backward::walking_kernel", calls: "", most: 32, reason: ONE_MORE_CUBE },
];

const ONE_MORE_CUBE: &str = "where a few registers less make room for one more cube on a multiprocessor, the assembler spills those few: which variants, on \
    which architecture, changes with every line of the kernel";

/// What is wrong with so many spilled bytes of `kernel`.
pub(crate) fn problem(kernel: &Kernel, bytes: u32) -> Option<String> {
    match LISTED.iter().find(|listed| listed.kernel == kernel.name && kernel.call.contains(listed.calls)) {
        _ if bytes == 0 => None,
        None => Some(format!("spills {bytes} bytes, and no reason in cuda-check's spills.rs")),
        Some(listed) if bytes > listed.most => {
            Some(format!("spills {bytes} bytes, more than the {} listed", listed.most))
        }
        Some(_) => None,
    }
}

/// Why the listed kernels may, for the document: their names, the calls that they are listed for, the bytes and the reason.
pub(crate) fn reasons() -> impl Iterator<Item = (&'static str, &'static str, u32, &'static str)> {
    LISTED.iter().map(|listed| (listed.kernel, listed.calls, listed.most, listed.reason))
}
