//! Memory of a device: who holds how much ([`Ledger`]), how much may be held (its budget), host buffers that are reused from step
//! to step ([`HostPool`]), copies between devices and the host ([`Staging`]), and places where tensors wait outside their device
//! ([`open_store`], and [`DoubleBuffer`] for devices that compute while they copy).

mod block;
mod ledger;
mod pool;
mod staging;
mod store;

pub use ledger::{Charge, Ledger};
pub use pool::{HostBlock, HostPool};
pub use staging::{Layout, Staging};
pub use store::{Copies, DoubleBuffer, open_store};

/// Buffer sizes are counted in multiples of this many bytes.
pub const GRANULARITY_BYTES: usize = 256;

/// `bytes` rounded up to [`GRANULARITY_BYTES`]; saturates instead of wrapping.
pub const fn round_up(bytes: usize) -> usize {
    match bytes.checked_add(GRANULARITY_BYTES - 1) {
        Some(padded) => padded / GRANULARITY_BYTES * GRANULARITY_BYTES,
        None => usize::MAX / GRANULARITY_BYTES * GRANULARITY_BYTES,
    }
}
