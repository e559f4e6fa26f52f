//! AdamW with moments in 8 bits: a block's moments are decoded, changed as in [`crate::adamw`] and encoded again while they are in
//! the first-level cache.

use unsloth_core::{
    FloatElement, Result, Tensor,
    ops::{
        adamw::{Spec, StepState},
        adamw8bit::{AdamW8bit, BLOCK_SIZE, Buffers, CODES, signed_map, unsigned_map},
    },
};

use crate::{
    CpuBackend,
    access::{dispatch_float, read, write},
    adamw::Factors,
    simd::{TASK, update, vectorised},
};

/// Packed codes of a block.
const WORDS: usize = BLOCK_SIZE / CODES;
/// Blocks of a parallel task.
const BLOCKS: usize = TASK / BLOCK_SIZE;

/// The values of a map, and the borders between those that are nearest.
struct Codebook {
    values: [f32; 256],
    borders: [f32; 255],
    zero: u8,
}

impl Codebook {
    fn new(values: [f32; 256]) -> Self {
        let border = |i: usize| ((f64::from(values[i]) + f64::from(values[i + 1])) / 2.0) as f32;
        let zero = values.iter().position(|value| *value == 0.0).unwrap_or(0);
        Self { values, borders: std::array::from_fn(border), zero: zero as u8 }
    }

    fn decode(&self, codes: &[i32], absmax: f32, out: &mut [f32]) {
        for (chunk, word) in out.chunks_mut(CODES).zip(codes) {
            for (value, code) in chunk.iter_mut().zip(word.to_le_bytes()) {
                *value = self.values[usize::from(code)] * absmax;
            }
        }
    }

    /// Encodes a block, and returns its magnitude.
    fn encode(&self, values: &[f32], codes: &mut [i32]) -> f32 {
        let absmax = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        for (i, word) in codes.iter_mut().enumerate() {
            let code = |k: usize| match values.get(CODES * i + k) {
                Some(value) if absmax > 0.0 => self.nearest(value / absmax),
                _ => self.zero,
            };
            *word = i32::from_le_bytes(std::array::from_fn(code));
        }
        absmax
    }

    fn nearest(&self, value: f32) -> u8 {
        // At most 255 borders are below a value.
        self.borders.partition_point(|border| *border < value) as u8
    }
}

/// State of some blocks.
struct State<'a> {
    codes: &'a mut [i32],
    absmax: &'a mut [f32],
}

/// Changes one block after the other.
fn blocks<T: FloatElement>(
    factors: Factors,
    (param, grad): (&mut [T], &[f32]),
    (m, v): (State<'_>, State<'_>),
    (signed, unsigned): (&Codebook, &Codebook),
) {
    let (mut m_values, mut v_values) = ([0.0; BLOCK_SIZE], [0.0; BLOCK_SIZE]);
    let m_blocks = m.codes.chunks_mut(WORDS).zip(m.absmax);
    let v_blocks = v.codes.chunks_mut(WORDS).zip(v.absmax);
    let params = param.chunks_mut(BLOCK_SIZE).zip(grad.chunks(BLOCK_SIZE));
    for (((param, grad), (m_codes, m_absmax)), (v_codes, v_absmax)) in params.zip(m_blocks).zip(v_blocks) {
        let (m, v) = (&mut m_values[..grad.len()], &mut v_values[..grad.len()]);
        signed.decode(m_codes, *m_absmax, m);
        unsigned.decode(v_codes, *v_absmax, v);
        update(param, &mut [0.0; BLOCK_SIZE], |param| {
            vectorised(
                #[inline(always)]
                || factors.apply(param, grad, (m, v)),
            )
        });
        *m_absmax = signed.encode(m, m_codes);
        *v_absmax = unsigned.encode(v, v_codes);
    }
}

impl CpuBackend {
    fn adamw8bit_elements<T: FloatElement>(&self, factors: Factors, buffers: Buffers<'_>) -> Result<()> {
        const OP: &str = "adamw8bit";
        let param = write::<T>(OP, "param", buffers.param)?;
        let grad = read::<f32>(buffers.grad);
        let m_codes = write::<i32>(OP, "m_codes", buffers.m_codes)?;
        let m_absmax = write::<f32>(OP, "m_absmax", buffers.m_absmax)?;
        let v_codes = write::<i32>(OP, "v_codes", buffers.v_codes)?;
        let v_absmax = write::<f32>(OP, "v_absmax", buffers.v_absmax)?;
        let maps = (&Codebook::new(signed_map()), &Codebook::new(unsigned_map()));
        let params = param.chunks_mut(TASK).zip(grad.chunks(TASK));
        let m = m_codes.chunks_mut(BLOCKS * WORDS).zip(m_absmax.chunks_mut(BLOCKS));
        let v = v_codes.chunks_mut(BLOCKS * WORDS).zip(v_absmax.chunks_mut(BLOCKS));
        self.for_each_part(params.zip(m).zip(v), |((part, m), v)| {
            let state = |(codes, absmax)| State { codes, absmax };
            blocks(factors, part, (state(m), state(v)), maps);
        });
        Ok(())
    }
}

impl AdamW8bit for CpuBackend {
    fn adamw8bit(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()> {
        let state = read::<f32>(state);
        if state[StepState::SKIP] != 0.0 {
            return Ok(());
        }
        let factors = Factors::new(spec, state[StepState::GRADIENT_SCALE], state[StepState::STEPS]);
        dispatch_float!(buffers.param.dtype(), T => self.adamw8bit_elements::<T>(factors, buffers))
    }
}
