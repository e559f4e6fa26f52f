//! AdamW whose moments are kept in 8 bits.         Dettmers et al. 2021, arXiv:2110.02861; map and blocks as in bitsandbytes
//!
//! A moment is a code of 8 bits for each element and one f32, `absmax`, for each [`BLOCK_SIZE`] elements:
//! `moment = map[code] * absmax`. A step computes on moments in f32, as [`super::adamw`] does, changes the parameter by them, and
//! then keeps the nearest codes, with the largest magnitude of a block as its new `absmax`; of two that are equally near the smaller
//! one. The first moment has the map [`signed_map`], the second [`unsigned_map`].
//!
//! Codes are packed four to an i32, the first in the lowest byte. The last block may be a short one; codes behind the last
//! element are those of 0.

use super::{
    adamw::{Spec, StepState},
    check,
    cost::Cost,
};
use crate::{Category, DType, Device, Result, Tensor};

/// Elements that share an `absmax`.
pub const BLOCK_SIZE: usize = 256;
/// Codes in an i32.
pub const CODES: usize = 4;

/// Values of the 256 codes of a number with a sign, ascending, from -0.993 to 1.
pub fn signed_map() -> [f32; 256] {
    map(true)
}

/// Values of the 256 codes of a number without a sign, ascending, from 0 to 1.
pub fn unsigned_map() -> [f32; 256] {
    map(false)
}

/// A decade for each of seven exponents, from 1e-7 to 1, each cut into twice as many equal parts as the one below it; the middle
/// of each part is a value. With 0 and 1 these are 256, where every value but those has a negative too if `signed`.
fn map(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for exponent in 0..7u32 {
        let parts = 1 << (if signed { exponent } else { exponent + 1 });
        let decade = 10f64.powi(exponent as i32 - 6);
        for part in 0..parts {
            let middle = 0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts);
            values.push((decade * middle) as f32);
            if signed {
                values.push(-(decade * middle) as f32);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    let mut map = [0.0; 256];
    map.copy_from_slice(&values);
    map
}

/// Lengths of [`Moment::codes`] and [`Moment::absmax`] for a parameter of `len` elements.
pub const fn lengths(len: usize) -> (usize, usize) {
    let blocks = len.div_ceil(BLOCK_SIZE);
    (blocks * (BLOCK_SIZE / CODES), blocks)
}

/// A moment of one parameter.
#[derive(Debug)]
pub struct Moment {
    /// Packed codes, i32 `[blocks * BLOCK_SIZE / CODES]`.
    pub codes: Tensor,
    /// Largest magnitude of each block, f32 `[blocks]`.
    pub absmax: Tensor,
}

impl Moment {
    /// A moment of `len` elements that are all 0. Whatever the codes stand for, an `absmax` of 0 makes it 0.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn zeros(device: &Device, len: usize) -> Result<Self> {
        let (codes, blocks) = lengths(len);
        let zeros = |len: usize, dtype| device.zeros([len], dtype, Category::Optimiser);
        Ok(Self { codes: zeros(codes, DType::I32)?, absmax: zeros(blocks, DType::F32)? })
    }
}

/// Buffers of one parameter.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// The parameter, any float type.
    pub param: &'a mut Tensor,
    /// Its gradient, f32.
    pub grad: &'a Tensor,
    /// Codes of the first moment.
    pub m_codes: &'a mut Tensor,
    /// Magnitudes of the first moment.
    pub m_absmax: &'a mut Tensor,
    /// Codes of the second moment.
    pub v_codes: &'a mut Tensor,
    /// Magnitudes of the second moment.
    pub v_absmax: &'a mut Tensor,
}

impl Buffers<'_> {
    /// Cost of a step: the gradient in; parameter and moments in and out.
    pub fn cost(&self) -> Cost {
        let state = [&*self.m_codes, &*self.m_absmax, &*self.v_codes, &*self.v_absmax];
        Cost::of(&[self.grad, self.param], &[self.param]) + Cost::of(&state, &state)
    }
}

/// AdamW with 8-bit moments of a backend.
pub trait AdamW8bit {
    /// One step of one parameter.
    fn adamw8bit(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()>;
}

/// One AdamW step of one parameter, steered by `state`.
///
/// # Errors
/// Shape, dtype or device mismatch; a field out of its range; [`crate::Error::Shared`] if a buffer to write is shared.
pub fn step(spec: &Spec, buffers: Buffers<'_>, state: &StepState) -> Result<()> {
    const OP: &str = "adamw8bit";
    spec.validate(OP)?;
    check::update(OP, (buffers.param, buffers.grad), state)?;
    let device = buffers.grad.device().clone();
    let (codes, blocks) = lengths(buffers.grad.num_elements());
    let codes = (&[codes][..], DType::I32, &device);
    let absmax = (&[blocks][..], DType::F32, &device);
    check::tensor(OP, "m_codes", buffers.m_codes, codes)?;
    check::tensor(OP, "m_absmax", buffers.m_absmax, absmax)?;
    check::tensor(OP, "v_codes", buffers.v_codes, codes)?;
    check::tensor(OP, "v_absmax", buffers.v_absmax, absmax)?;
    device.backend().adamw8bit(spec, buffers, state.tensor())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of bitsandbytes' `create_dynamic_map`, and how many there are of each kind.
    #[test]
    fn maps_are_those_of_bitsandbytes() {
        let (signed, unsigned) = (signed_map(), unsigned_map());
        for map in [&signed, &unsigned] {
            assert!(map.windows(2).all(|pair| pair[0] < pair[1]), "ascending and distinct");
            assert_eq!(map[255], 1.0);
        }
        assert_eq!((signed.iter().filter(|v| **v < 0.0).count(), signed[127]), (127, 0.0));
        assert_eq!((unsigned[0], signed.iter().filter(|v| **v > 0.0).count()), (0.0, 128));
        // The middle of 0.1 ..= 1 in 64 and 128 parts, and of the lowest decade in one and two.
        let near =
            |value: f32, expected: f64| assert!((f64::from(value) - expected).abs() <= 1e-7 * expected, "{value}");
        near(-signed[0], 1.0 - 0.45 / 64.0);
        near(signed[128], 0.55e-6);
        near(unsigned[254], 1.0 - 0.45 / 128.0);
        near(unsigned[1], 0.325e-6);
        near(unsigned[2], 0.775e-6);
    }
}
