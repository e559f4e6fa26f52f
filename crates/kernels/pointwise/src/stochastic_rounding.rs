//! Rounding to bf16 up or down at random.                             Gupta et al. 2015, arXiv:1502.02551
//!
//! 16 random bits are added below the last bit of a number that is kept, and what is below is cut off; what is infinite or NaN stays
//! so. The random bits of element `i` are half of word `i % 8 / 2` of Philox under `key`, with the counter (step, tensor, 0, `i / 8`),
//! the lower half for an even `i`.
//!
//! All of it is arithmetic of integers, so the result has the same bits on every device, those that cannot compute in bf16 included.
//! Work: one unit per eight elements, which share a counter. Traffic: each element once in, once out.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, philox, unchecked};

/// Elements of one counter.
const GROUP: usize = 8;
/// Words of their results: two in each, the first in the lower half.
const WORDS: usize = GROUP / 2;

/// Which random bits a call draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Key of the run's random numbers.
    pub key: [u32; 2],
    /// Optimiser step.
    pub step: u32,
    /// Number of the tensor in the model.
    pub tensor: u32,
}

/// Launches `out = round(x)` for `len` elements; `x`: f32 `[len]`; `out`: bf16 `[len]`, overwritten, with space for a last whole word.
///
/// # Errors
/// [`LaunchError`] for a buffer that is too small, or a limit exceeded.
pub fn round<R: Runtime>(
    client: &ComputeClient<R>,
    draw: Draw,
    len: usize,
    (x, out): (&Handle, &Handle),
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "stochastic_rounding");
    if len == 0 {
        return Ok(());
    }
    let (groups, words) = (len.div_ceil(GROUP), len.div_ceil(2));
    let (width, out_width) = (launch.vector_width::<u32>(len), launch.vector_width::<u32>(words).min(WORDS));
    let grid = launch.flat(groups);
    launch.cube(grid.dim, 0)?;
    unchecked!(round_kernel::launch_unchecked::<R>(
        client,
        grid.count,
        grid.dim,
        width,
        out_width,
        launch.vectors::<u32>("x", x, len, width)?,
        launch.vectors::<u32>("out", out, words, out_width)?,
        draw.key[0],
        draw.key[1],
        draw.step,
        draw.tensor,
        groups as u32,
        (len / width) as u32,
        (words / out_width) as u32,
    ));
    Ok(())
}

/// The bits of a number in bf16, whose bits in f32 are these.
#[cube]
fn rounded(bits: u32, draw: u32) -> u32 {
    // A carry goes into the exponent where it should: the next number in bf16 is the next pattern of bits.
    let mut result = (bits + draw) >> 16u32;
    if bits & 0x7F80_0000u32 == 0x7F80_0000u32 {
        result = bits >> 16u32;
        if bits & 0x007F_FFFFu32 != 0u32 {
            // A NaN stays one even if what made it so is cut off.
            result |= 0x40u32;
        }
    }
    result
}

/// Grid: unit = group of elements, walking on by the number of units.
#[cube(launch_unchecked)]
fn round_kernel<N: Size, M: Size>(
    x: &Array<Vector<u32, N>>,
    out: &mut Array<Vector<u32, M>>,
    key0: u32,
    key1: u32,
    step: u32,
    tensor: u32,
    groups: u32,
    items: u32,
    out_items: u32,
) {
    let (width, out_width) = (N::value(), M::value());
    let mut group = ABSOLUTE_POS;
    while group < groups as usize {
        let words = philox((step, tensor, 0u32, group as u32), (key0, key1));
        let mut draws = Array::<u32>::new(WORDS);
        draws[0] = words.0;
        draws[1] = words.1;
        draws[2] = words.2;
        draws[3] = words.3;
        let mut results = Array::<u32>::new(GROUP);
        #[unroll]
        for vector in 0..comptime!(GROUP / width) {
            let at = group * comptime!(GROUP / width) + vector;
            let mut bits = Vector::<u32, N>::new(0u32);
            if at < items as usize {
                bits = x[at];
            }
            #[unroll]
            for component in 0..width {
                let element = comptime!(vector * width + component);
                let draw = draws[comptime!(element / 2)] >> comptime!(16 * (element as u32 % 2));
                results[element] = rounded(bits[component], draw & 0xFFFFu32);
            }
        }
        #[unroll]
        for vector in 0..comptime!(WORDS / out_width) {
            let at = group * comptime!(WORDS / out_width) + vector;
            if at < out_items as usize {
                let mut pairs = Vector::<u32, M>::new(0u32);
                #[unroll]
                for component in 0..out_width {
                    let element = comptime!(2 * (vector * out_width + component));
                    pairs[component] = results[element] | (results[comptime!(element + 1)] << 16u32);
                }
                out[at] = pairs;
            }
        }
        group += CUBE_COUNT * CUBE_DIM as usize;
    }
}
