//! Reductions over the units of a cube.
//!
//! Two steps in shared memory: a few units fold the values of all, then every unit folds what those have left. The order is
//! fixed, so the result has the same bits on every run, and no plane size is assumed. (Plane instructions are not reported by every
//! device that has them, and their order differs between devices.) A tree would wait for the whole cube at each of its levels:
//! that costs software devices most of their time, and its loop around a barrier most of their compile time.

#![allow(missing_docs, reason = "the cube macro writes modules and functions without documentation")]

use cubecl::prelude::*;

/// Units that fold in the first step.
const fn folders(units: usize) -> usize {
    units.isqrt().next_power_of_two()
}

/// Bytes of shared memory that one call of [`cube_sum()`] or [`cube_max()`] takes.
pub const fn cube_reduce_bytes(units: usize) -> usize {
    (units + folders(units)) * size_of::<f32>()
}

/// Sum of `value` over all units, the same on every unit. `units` is the cube's size, a power of two. Every unit calls it.
#[cube]
pub fn cube_sum(value: f32, #[comptime] units: usize) -> f32 {
    let folders = comptime!(folders(units));
    let folded = folded_sums(value, units);
    let mut total = folded[0];
    for i in 1..folders {
        total += folded[i];
    }
    total
}

/// [`cube_sum()`] to the same bits, for kernels that hold much meanwhile: a compiler that knows how many sums are left loads all of
/// them at once, at the cost of a register each.
#[cube]
pub fn cube_sum_in_few_registers(value: f32, #[comptime] units: usize) -> f32 {
    let folders = comptime!(folders(units));
    let folded = folded_sums(value, units);
    let mut total = folded[0];
    for i in 1..CUBE_DIM as usize / comptime!(units / folders) {
        total += folded[i];
    }
    total
}

/// The first step: what is left to add.
#[cube]
fn folded_sums(value: f32, #[comptime] units: usize) -> SharedMemory<f32> {
    let folders = comptime!(folders(units));
    let mut values = SharedMemory::<f32>::new(units);
    let mut folded = SharedMemory::<f32>::new(folders);
    let unit = UNIT_POS as usize;
    // No barrier comes before: a unit writes here in a second call only when all have left the first step of the first one,
    // and writes below only when all have left its second step.
    values[unit] = value;
    sync_cube();
    if unit < folders {
        let mut sum = values[unit];
        let mut i = unit + folders;
        while i < units {
            sum += values[i];
            i += folders;
        }
        folded[unit] = sum;
    }
    sync_cube();
    folded
}

/// Maximum of `value` over all units, the same on every unit. `units` is the cube's size, a power of two. Every unit calls it.
#[cube]
pub fn cube_max(value: f32, #[comptime] units: usize) -> f32 {
    let folders = comptime!(folders(units));
    let mut values = SharedMemory::<f32>::new(units);
    let mut folded = SharedMemory::<f32>::new(folders);
    let unit = UNIT_POS as usize;
    values[unit] = value;
    sync_cube();
    if unit < folders {
        let mut most = values[unit];
        let mut i = unit + folders;
        while i < units {
            most = max(most, values[i]);
            i += folders;
        }
        folded[unit] = most;
    }
    sync_cube();
    let mut total = folded[0];
    for i in 1..folders {
        total = max(total, folded[i]);
    }
    total
}

/// Sum over the components of a vector, first to last.
#[cube]
pub fn vector_sum<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..vector.size() {
        sum += vector[i];
    }
    sum
}
