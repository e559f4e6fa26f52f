//! Reductions over the units of a cube.
//!
//! A tree in shared memory: the order is fixed, so the result has the same bits on every run, and no plane size is assumed.
//! (Plane instructions are not reported by every device that has them, and their order differs between devices.)

#![allow(missing_docs, reason = "the cube macro writes modules and functions without documentation")]

use cubecl::prelude::*;

/// Sum of `value` over all units, the same on every unit. `units` is the cube's size, a power of two. Every unit calls it.
#[cube]
pub fn cube_sum(value: f32, #[comptime] units: usize) -> f32 {
    let mut shared = SharedMemory::<f32>::new(units);
    let unit = UNIT_POS as usize;
    // A second call in one kernel reuses the memory: nobody may still read the first result.
    sync_cube();
    shared[unit] = value;
    sync_cube();
    let mut stride = comptime!(units / 2).runtime();
    while stride > 0 {
        if unit < stride {
            let other = shared[unit + stride];
            shared[unit] += other;
        }
        sync_cube();
        stride /= 2;
    }
    shared[0]
}

/// Maximum of `value` over all units, the same on every unit. `units` is the cube's size, a power of two.
#[cube]
pub fn cube_max(value: f32, #[comptime] units: usize) -> f32 {
    let mut shared = SharedMemory::<f32>::new(units);
    let unit = UNIT_POS as usize;
    sync_cube();
    shared[unit] = value;
    sync_cube();
    let mut stride = comptime!(units / 2).runtime();
    while stride > 0 {
        if unit < stride {
            shared[unit] = max(shared[unit], shared[unit + stride]);
        }
        sync_cube();
        stride /= 2;
    }
    shared[0]
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
