//! Conversions between storage types and f32, by blocks that stay in the first-level cache. Buffers are the caller's: clearing
//! one for each block would cost as much as a conversion.

use half::slice::HalfFloatSliceExt;
use unsloth_core::{DType, FloatElement};

use super::vectorised;

/// `to[i] = from[i]`, exactly.
pub(crate) fn widen<T: FloatElement>(from: &[T], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "widen: lengths differ");
    match T::DTYPE {
        DType::F32 => to.copy_from_slice(bytemuck::cast_slice(from)),
        // The conversion instruction exists, but not where the compiler would find it from one element.
        DType::F16 => bytemuck::cast_slice::<T, half::f16>(from).convert_to_f32_slice(to),
        _ => vectorised(
            #[inline(always)]
            || {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from.to_f32();
                }
            },
        ),
    }
}

/// `to[i] = from[i]`, rounded to nearest even.
pub(crate) fn narrow<T: FloatElement>(from: &[f32], to: &mut [T]) {
    assert_eq!(from.len(), to.len(), "narrow: lengths differ");
    match T::DTYPE {
        DType::F32 => bytemuck::cast_slice_mut::<T, f32>(to).copy_from_slice(from),
        DType::F16 => bytemuck::cast_slice_mut::<T, half::f16>(to).convert_from_f32_slice(from),
        _ => {
            let to = bytemuck::cast_slice_mut::<T, half::bf16>(to);
            vectorised(
                #[inline(always)]
                || to.iter_mut().zip(from).for_each(|(to, from)| *to = to_bf16(*from)),
            );
        }
    }
}

/// As `bf16::from_f32`, whose branches the compiler does not vectorise.
#[inline(always)]
fn to_bf16(x: f32) -> half::bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    let is_nan = bits & 0x7FFF_FFFF > 0x7F80_0000;
    half::bf16::from_bits(if is_nan { quiet_nan } else { rounded } as u16)
}

/// A buffer for `len` elements of a type at a time; none where they are f32 already.
pub(crate) fn buffer<T: FloatElement>(len: usize) -> Vec<f32> {
    vec![0.0; if T::DTYPE == DType::F32 { 0 } else { len }]
}

/// The values in f32: the slice itself where it is f32 already, else widened into `buffer`.
#[inline(always)]
pub(crate) fn widened<'a, T: FloatElement>(values: &'a [T], buffer: &'a mut [f32]) -> &'a [f32] {
    if T::DTYPE == DType::F32 {
        return bytemuck::cast_slice(values);
    }
    let buffer = &mut buffer[..values.len()];
    widen(values, buffer);
    buffer
}

/// Rounds what `work` writes into `out`, at most as long as the buffer. `work` finds arbitrary values there.
#[inline(always)]
pub(crate) fn produce<T: FloatElement>(out: &mut [T], buffer: &mut [f32], work: impl FnOnce(&mut [f32])) {
    if T::DTYPE == DType::F32 {
        return work(bytemuck::cast_slice_mut(out));
    }
    let buffer = &mut buffer[..out.len()];
    work(buffer);
    narrow(buffer, out);
}

/// Lets `work` change `values`, at most as many as the buffer holds, in f32.
#[inline(always)]
pub(crate) fn update<T: FloatElement>(values: &mut [T], buffer: &mut [f32], work: impl FnOnce(&mut [f32])) {
    if T::DTYPE == DType::F32 {
        return work(bytemuck::cast_slice_mut(values));
    }
    let buffer = &mut buffer[..values.len()];
    widen(values, buffer);
    work(buffer);
    narrow(buffer, values);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_equals_the_half_crate() {
        for bits in (0..=u32::MAX).step_by(4093).chain((0..1 << 16).map(|low| 0x3F80_0000 | low)) {
            let x = f32::from_bits(bits);
            assert_eq!(to_bf16(x).to_bits(), half::bf16::from_f32(x).to_bits(), "{bits:x}");
        }
    }

    #[test]
    fn half_types_round_to_nearest_even() {
        let values = [1.0, -0.0, 1.000_488_3, 1.001_464_8, 65_504.0, 1e-7, f32::INFINITY, 3.389e38];
        let (mut f16s, mut bf16s) = ([half::f16::ZERO; 8], [half::bf16::ZERO; 8]);
        narrow(&values, &mut f16s);
        narrow(&values, &mut bf16s);
        for (i, &value) in values.iter().enumerate() {
            assert_eq!((f16s[i], bf16s[i]), (half::f16::from_f32(value), half::bf16::from_f32(value)));
        }
        let (mut back, mut buffer) = ([0.0; 8], [0.0; 8]);
        widen(&bf16s, &mut back);
        assert_eq!(widened(&bf16s, &mut buffer), back);
        assert_eq!(back[0], 1.0);
        update(&mut f16s, &mut buffer, |x| x.iter_mut().for_each(|x| *x *= 2.0));
        assert_eq!(f16s[0].to_f32(), 2.0);
        produce(&mut bf16s[..1], &mut buffer, |x| x[0] = 3.0);
        assert_eq!(bf16s[..2].iter().map(|x| x.to_f32()).collect::<Vec<_>>(), [3.0, -0.0]);
    }
}
