//! Counter-based random numbers inside a kernel.    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10)

#![allow(missing_docs, reason = "the cube macro writes modules and functions without documentation")]

use cubecl::prelude::*;

const ROUNDS: u32 = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What a round adds to the key.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The four random words of a counter under a key: the same ones on every device, and nothing but these six numbers counts.
#[cube]
pub fn philox(counter: (u32, u32, u32, u32), key: (u32, u32)) -> (u32, u32, u32, u32) {
    // Not `let (mut a, ..)`: the cube macro takes such names for constants.
    let mut c0 = counter.0;
    let mut c1 = counter.1;
    let mut c2 = counter.2;
    let mut c3 = counter.3;
    let mut k0 = key.0;
    let mut k1 = key.1;
    for _ in 0..ROUNDS {
        let high0 = u32::mul_hi(c0, u32::new(MULTIPLIERS[0] as i64));
        let low0 = c0 * MULTIPLIERS[0];
        let high1 = u32::mul_hi(c2, u32::new(MULTIPLIERS[1] as i64));
        let low1 = c2 * MULTIPLIERS[1];
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += WEYL[0];
        k1 += WEYL[1];
    }
    (c0, c1, c2, c3)
}
