//! Memory of a device: who holds how much ([`Ledger`]), how much may be held (its budget), and host buffers that are reused
//! from step to step ([`HostPool`]).

mod ledger;
mod pool;

pub use ledger::{Charge, Ledger};
pub use pool::{HostBlock, HostPool, PoolUsage};

/// Buffer sizes are counted in multiples of this many bytes.
pub const GRANULARITY_BYTES: usize = 256;

/// `bytes` rounded up to [`GRANULARITY_BYTES`]; saturates instead of wrapping.
pub const fn round_up(bytes: usize) -> usize {
    match bytes.checked_add(GRANULARITY_BYTES - 1) {
        Some(padded) => padded / GRANULARITY_BYTES * GRANULARITY_BYTES,
        None => usize::MAX / GRANULARITY_BYTES * GRANULARITY_BYTES,
    }
}
