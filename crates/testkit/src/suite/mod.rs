//! What each operator has to show on a device, the same for every backend.
//!
//! A suite is `run(device)`, which panics, on top of `check(device)`, which returns the failure; [`crate::mutant`] holds the
//! latter to failing on wrong backends.

pub mod adafactor;
pub mod adamw;
pub mod adamw8bit;
pub mod attention;
pub mod cross_entropy;
pub mod dora;
pub mod elementwise;
pub mod embedding;
pub mod glu;
pub mod layer_norm;
pub mod linear;
pub mod linear_cross_entropy;
pub mod lion;
pub mod lora_dropout;
pub mod lora_linear;
pub mod muon;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod rope_table;
pub mod sgd;
pub mod stochastic_rounding;
mod update;

use unsloth_core::{DType, Device};

use crate::report::Checked;

/// `(rows, width)` that break vectors, tiles and blocks: none, one, primes, one off a power of two, odd tails.
pub const AWKWARD_ROWS: [(usize, usize); 10] =
    [(0, 8), (1, 1), (1, 7), (2, 63), (3, 64), (5, 65), (7, 97), (33, 130), (3, 1031), (130, 33)];

/// Rows of which each unit of a device has several vectors, some units one fewer than others: such that fit in its registers, and such that
/// do not, whose gradients of parameters are summed in a block of sixteen rows and one of three.
const LONG_ROWS: [(usize, usize); 2] = [(2, 2052), (19, 4100)];

/// Lengths that break vectors, tiles and blocks.
pub const AWKWARD_LENGTHS: [usize; 10] = [0, 1, 2, 7, 31, 63, 64, 65, 1031, 4099];

/// Storage types of activations with the storage types that weights have beside them: the same, or f32.
pub fn mixed_dtypes(device: &Device) -> Vec<(DType, DType)> {
    let mixed =
        |dtype| if dtype == DType::F32 { vec![(dtype, dtype)] } else { vec![(dtype, dtype), (dtype, DType::F32)] };
    device.float_dtypes().into_iter().flat_map(mixed).collect()
}

/// bf16, or f32 on a device without it: the types whose range goes beyond that of f16.
pub fn wide_dtype(device: &Device) -> DType {
    if device.supports(DType::BF16) { DType::BF16 } else { DType::F32 }
}

/// A suite that returns its failure.
pub type Suite = fn(&Device) -> Checked;
