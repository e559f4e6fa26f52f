//! AdamW whose moments are kept in 8 bits, in one pass.            Dettmers et al. 2021, arXiv:2110.02861
//!
//! `moment = map[code] * absmax[block]`; the step is that of [`crate::adamw`] on these, and what it leaves is encoded again:
//! `absmax` is the largest magnitude of a block, the code that of the value in the map which is nearest to `moment / absmax`.
//!
//! Work: one cube per block of [`BLOCK_SIZE`] elements, one unit per word of codes. Both maps lie in shared memory, where a search
//! in eight steps finds a code.
//! Traffic: parameter, codes and magnitudes are read and written once, the gradient is read once.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, cube_max, cube_reduce_bytes, unchecked};

use crate::adamw::{Elements, Factors, Options, rates, stepped};

/// Elements that share a magnitude.
pub const BLOCK_SIZE: usize = 256;
/// Codes in a word, the first in the lowest byte.
pub const CODES: usize = 4;
/// Values of a map, ascending.
pub const MAP_SIZE: usize = 256;

/// Words of a block: units of a cube.
const WORDS: usize = BLOCK_SIZE / CODES;

/// Buffers of one parameter of `len` elements and of the step. Codes are i32 `[blocks * 64]` with four in each, magnitudes f32
/// `[blocks]`, where `blocks` is `len / 256`, rounded up; codes behind the last element are those of 0.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// `[len]` of `E`, updated.
    pub param: &'a Handle,
    /// f32 `[len]`
    pub grad: &'a Handle,
    /// Codes of the first moment, updated.
    pub m_codes: &'a Handle,
    /// Magnitudes of the first moment, updated.
    pub m_absmax: &'a Handle,
    /// Codes of the second moment, updated.
    pub v_codes: &'a Handle,
    /// Magnitudes of the second moment, updated.
    pub v_absmax: &'a Handle,
    /// f32 `[2, 256]`: the map of the first moment and that of the second, both ascending, with a zero in each.
    pub maps: &'a Handle,
    /// f32 `[4]`, as [`crate::adamw::control`] leaves it.
    pub state: &'a Handle,
}

/// Launches one step of one parameter; nothing changes if the state says to skip.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn step<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    options: &Options,
    len: usize,
    args: Step<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "adamw8bit");
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let blocks = len.div_ceil(BLOCK_SIZE);
    let width = launch.vector_width::<f32>(len).min(CODES);
    let dim = CubeDim::new_1d(WORDS as u32);
    launch.cube(dim, 2 * MAP_SIZE * size_of::<f32>() + 2 * cube_reduce_bytes(WORDS))?;
    unchecked!(step_kernel::launch_unchecked::<E, R>(
        client,
        launch.rows(blocks, WORDS).count,
        dim,
        width,
        launch.vectors::<E>("param", args.param, len, width)?,
        launch.vectors::<f32>("grad", args.grad, len, width)?,
        launch.array::<i32>("m_codes", args.m_codes, blocks * WORDS)?,
        launch.array::<f32>("m_absmax", args.m_absmax, blocks)?,
        launch.array::<i32>("v_codes", args.v_codes, blocks * WORDS)?,
        launch.array::<f32>("v_absmax", args.v_absmax, blocks)?,
        launch.array::<f32>("maps", args.maps, 2 * MAP_SIZE)?,
        launch.array::<f32>("state", args.state, 4)?,
        options.factors(),
        (len / width) as u32,
        blocks as u32,
    ));
    Ok(())
}

/// Grid: cube = block, unit = word of its codes.
#[cube(launch_unchecked)]
fn step_kernel<E: Float, N: Size>(
    param: &mut Array<Vector<E, N>>,
    grad: &Array<Vector<f32, N>>,
    m_codes: &mut Array<i32>,
    m_absmax: &mut Array<f32>,
    v_codes: &mut Array<i32>,
    v_absmax: &mut Array<f32>,
    maps: &Array<f32>,
    state: &Array<f32>,
    factors: &Factors,
    items: u32,
    blocks: u32,
) {
    let width = N::value();
    let block = CUBE_POS;
    if block < blocks as usize && state[2] == 0.0 {
        let unit = UNIT_POS as usize;
        let word = block * WORDS + unit;
        let mut values = SharedMemory::<f32>::new(comptime!(2 * MAP_SIZE));
        let mut i = unit;
        while i < comptime!(2 * MAP_SIZE).runtime() {
            values[i] = maps[i];
            i += WORDS;
        }
        sync_cube();
        let rates = rates(factors, state);
        let (m_word, v_word) = (u32::reinterpret(m_codes[word]), u32::reinterpret(v_codes[word]));
        let (m_scale, v_scale) = (m_absmax[block], v_absmax[block]);
        let mut ms = Array::<f32>::new(CODES);
        let mut vs = Array::<f32>::new(CODES);
        #[unroll]
        for part in 0..comptime!(CODES / width) {
            let at = word * comptime!(CODES / width) + part;
            let mut before = Elements::<N> { param: Vector::new(0.0), m: Vector::new(0.0), v: Vector::new(0.0) };
            let mut g = Vector::<f32, N>::new(0.0);
            if at < items as usize {
                before.param = Vector::cast_from(param[at]);
                g = grad[at];
            }
            #[unroll]
            for k in 0..width {
                before.m[k] = decode(&values, m_word, comptime!(part * width + k), 0usize) * m_scale;
                before.v[k] = decode(&values, v_word, comptime!(part * width + k), MAP_SIZE) * v_scale;
            }
            let after = stepped::<N>(before, g, factors, &rates);
            if at < items as usize {
                param[at] = Vector::cast_from(after.param);
            }
            #[unroll]
            for k in 0..width {
                ms[comptime!(part * width + k)] = after.m[k];
                vs[comptime!(part * width + k)] = after.v[k];
            }
        }
        let (m_largest, v_largest) = (largest(&ms), largest(&vs));
        m_codes[word] = encode(&values, &ms, m_largest, 0usize);
        v_codes[word] = encode(&values, &vs, v_largest, MAP_SIZE);
        if unit == 0 {
            m_absmax[block] = m_largest;
            v_absmax[block] = v_largest;
        }
    }
}

/// Value of one code of a word, from the map that begins at `start`.
#[cube]
fn decode(values: &SharedMemory<f32>, word: u32, #[comptime] k: usize, #[comptime] start: usize) -> f32 {
    let code = (word >> comptime!(8 * k as u32)) & 0xFFu32;
    values[code as usize + start]
}

/// Largest magnitude of the block.
#[cube]
fn largest(moments: &Array<f32>) -> f32 {
    let mut most = 0.0f32;
    #[unroll]
    for k in 0..CODES {
        most = max(most, f32::abs(moments[k]));
    }
    cube_max(most, WORDS)
}

/// The word of the codes of four moments, whose block has this magnitude.
#[cube]
fn encode(values: &SharedMemory<f32>, moments: &Array<f32>, absmax: f32, #[comptime] start: usize) -> i32 {
    // A block of zeros has the code of 0 throughout.
    let divisor = select(absmax > 0.0, absmax, 1.0f32);
    let mut word = 0u32;
    #[unroll]
    for k in 0..CODES {
        let code = nearest(values, moments[k] / divisor, start);
        word |= code << comptime!(8 * k as u32);
    }
    i32::reinterpret(word)
}

/// How many of the 255 borders between neighbouring values are below `value`: of two values that are equally near, the smaller.
#[cube]
fn nearest(values: &SharedMemory<f32>, value: f32, #[comptime] start: usize) -> u32 {
    let mut code = 0u32;
    let mut step = comptime!(MAP_SIZE as u32 / 2).runtime();
    while step > 0u32 {
        let next = code + step;
        let at = next as usize + start;
        if (values[at - 1] + values[at]) * 0.5 < value {
            code = next;
        }
        step >>= 1u32;
    }
    code
}
