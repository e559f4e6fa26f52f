//! Stochastic rounding: 16 random bits are added below the last bit that is kept, and what is below is cut off.

use half::bf16;
use unsloth_core::{
    Result, Tensor,
    ops::stochastic_rounding::{GROUP, Spec, StochasticRounding},
};

use crate::{
    CpuBackend,
    access::{read, write},
};

/// Blocks of random words that are computed side by side.
const SIDE: usize = 8;

fn rounded(value: f32, draw: u32) -> bf16 {
    if !value.is_finite() {
        return bf16::from_f32(value);
    }
    // A carry goes into the exponent where it should: the next number in bf16 is the next pattern of bits.
    bf16::from_bits((value.to_bits().wrapping_add(draw) >> 16) as u16)
}

/// Rounds elements from `start` on, which is a multiple of [`GROUP`].
fn block(spec: &Spec, start: usize, x: &[f32], out: &mut [bf16]) {
    const SPAN: usize = SIDE * GROUP;
    for (i, (x, out)) in x.chunks(SPAN).zip(out.chunks_mut(SPAN)).enumerate() {
        let first = ((start + i * SPAN) / GROUP) as u64;
        let words = spec.stream.blocks::<SIDE>([spec.step, spec.tensor, (first >> 32) as u32], first as u32);
        for (j, (x, out)) in x.iter().zip(out).enumerate() {
            let word = words[j % GROUP / 2][j / GROUP];
            *out = rounded(*x, if j.is_multiple_of(2) { word & 0xFFFF } else { word >> 16 });
        }
    }
}

impl StochasticRounding for CpuBackend {
    fn round_stochastically(&self, spec: &Spec, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let x = read::<f32>(x);
        let out = write::<bf16>("stochastic_rounding", "out", out)?;
        self.for_each_block(out, |start, out, []| block(spec, start, &x[start..start + out.len()], out));
        Ok(())
    }
}
