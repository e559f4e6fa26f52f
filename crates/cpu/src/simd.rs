//! Arithmetic that the compiler vectorises: blocks of f32, reductions in a fixed order, and exp, tanh, sigmoid and erf as
//! polynomials.
//!
//! The build targets the oldest processor of its architecture; [`vectorised`] compiles a closure again for AVX2 and newer
//! and picks at run time. Nothing here uses a fused multiply-add, so the same input gives the same bits whichever copy runs.
//!
//! Errors in units in the last place, against f64, over all finite inputs (measured by the tests below): `exp` and `erf` 2,
//! `tanh` 3, `sigmoid` 4 where the result is a normal number. All give NaN for NaN and their limits for the infinities.

use half::slice::HalfFloatSliceExt;
use unsloth_core::{DType, FloatElement};

/// Elements that a kernel holds in f32 at a time: 4 KiB, so that a handful of blocks stays in the first-level cache.
pub(crate) const BLOCK: usize = 1024;

/// Elements of one parallel task; smaller tensors are not worth waking a thread for. Results do not depend on it.
pub(crate) const TASK: usize = 16 * BLOCK;

/// Independent partial results of a reduction. Eight AVX2 or four AVX-512 additions in flight hide their latency.
const LANES: usize = 64;

/// Runs `work` compiled for the widest vectors of this processor. Write the closure as `#[inline(always)] || ..`: what is
/// not inlined is not compiled again.
#[inline(always)]
pub(crate) fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if crate::avx512::is_available() {
        #[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
        // SAFETY: the processor has been asked.
        return unsafe { crate::avx512::vectorised(work) };
    }
    pulp::Arch::new().dispatch(work)
}

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

/// Rounds what `work` writes into `out`, at most [`BLOCK`] elements. `work` finds arbitrary values there.
#[inline(always)]
pub(crate) fn produce<T: FloatElement>(out: &mut [T], work: impl FnOnce(&mut [f32])) {
    if T::DTYPE == DType::F32 {
        return work(bytemuck::cast_slice_mut(out));
    }
    let mut buffer = [0.0; BLOCK];
    let buffer = &mut buffer[..out.len()];
    work(buffer);
    narrow(buffer, out);
}

/// Lets `work` change `values`, at most [`BLOCK`] elements, in f32.
#[inline(always)]
pub(crate) fn update<T: FloatElement>(values: &mut [T], work: impl FnOnce(&mut [f32])) {
    update_up_to::<BLOCK, T>(values, work);
}

/// [`update`] of at most `N` elements: clearing a whole block would cost more than a short row.
#[inline(always)]
pub(crate) fn update_up_to<const N: usize, T: FloatElement>(values: &mut [T], work: impl FnOnce(&mut [f32])) {
    if T::DTYPE == DType::F32 {
        return work(bytemuck::cast_slice_mut(values));
    }
    let mut buffer = [0.0; N];
    let buffer = &mut buffer[..values.len()];
    widen(values, buffer);
    work(buffer);
    narrow(buffer, values);
}

/// Folds [`LANES`] interleaved partial results and combines them pairwise. A `step` with `padding` must not change a partial
/// result. One that ignores an argument costs nothing for it. There is no array of arguments: what maps over one is not inlined, and then
/// nothing here is vectorised.
#[inline(always)]
fn fold(
    (a, b, c): (&[f32], &[f32], &[f32]),
    (start, padding): (f32, f32),
    step: impl Fn(f32, f32, f32, f32) -> f32,
    combine_two: impl Fn(f32, f32) -> f32,
) -> f32 {
    let ((a, a_tail), (b, b_tail), (c, c_tail)) =
        (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    let mut partial = [start; LANES];
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for lane in 0..LANES {
            partial[lane] = step(partial[lane], a[lane], b[lane], c[lane]);
        }
    }
    // The tail is padded rather than indexed, so that the partial results stay in registers.
    if !a_tail.is_empty() {
        let mut tails = [[padding; LANES]; 3];
        tails[0][..a_tail.len()].copy_from_slice(a_tail);
        tails[1][..b_tail.len()].copy_from_slice(b_tail);
        tails[2][..c_tail.len()].copy_from_slice(c_tail);
        for lane in 0..LANES {
            partial[lane] = step(partial[lane], tails[0][lane], tails[1][lane], tails[2][lane]);
        }
    }
    combine(partial, combine_two)
}

/// Partial results, pairwise.
#[inline(always)]
fn combine(mut partial: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            partial[lane] = combine(partial[lane], partial[lane + width]);
        }
        width /= 2;
    }
    partial[0]
}

/// Sum in a fixed order.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    fold((x, x, x), (0.0, 0.0), |sum, x, _, _| sum + x, |a, b| a + b)
}

/// `sum(x^2)` in a fixed order.
#[inline(always)]
pub(crate) fn sum_of_squares(x: &[f32]) -> f32 {
    fold((x, x, x), (0.0, 0.0), |sum, x, _, _| sum + x * x, |a, b| a + b)
}

/// `sum(a * b)` in a fixed order.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    fold((a, b, b), (0.0, 0.0), |sum, a, b, _| sum + a * b, |a, b| a + b)
}

/// [`dot`] with the second factor widened on the way: the same bits.
#[inline(always)]
pub(crate) fn dot_bf16(a: &[f32], b: &[half::bf16]) -> f32 {
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut partial = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            partial[lane] += a[lane] * b[lane].to_f32();
        }
    }
    for ((partial, a), b) in partial.iter_mut().zip(a_tail).zip(b_tail) {
        *partial += a * b.to_f32();
    }
    combine(partial, |a, b| a + b)
}

/// `sum(a * b * c)` in a fixed order.
#[inline(always)]
pub(crate) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    fold((a, b, c), (0.0, 0.0), |sum, a, b, c| sum + a * b * c, |a, b| a + b)
}

/// Largest value; -inf for an empty slice. A NaN is passed over.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    fold((x, x, x), (f32::NEG_INFINITY, f32::NEG_INFINITY), |max, x, _, _| larger(max, x), larger)
}

/// Replaces each `x` by `exp(x - shift)` and gives the sum of the results.
#[inline(always)]
pub(crate) fn exp_and_sum(x: &mut [f32], shift: f32) -> f32 {
    for x in x.iter_mut() {
        *x = exp(*x - shift);
    }
    sum(x)
}

/// Sum of `exp(x - shift)` in a fixed order, for a finite `shift`.
#[inline(always)]
pub(crate) fn sum_of_exp(x: &[f32], shift: f32) -> f32 {
    fold((x, x, x), (0.0, f32::NEG_INFINITY), |sum, x, _, _| sum + exp(x - shift), |a, b| a + b)
}

/// `to += factor * x`.
#[inline(always)]
pub(crate) fn add_scaled(to: &mut [f32], factor: f32, x: &[f32]) {
    for (to, x) in to.iter_mut().zip(x) {
        *to += factor * x;
    }
}

/// `x *= factor`.
#[inline(always)]
pub(crate) fn scale(x: &mut [f32], factor: f32) {
    for x in x {
        *x *= factor;
    }
}

/// `e^x`: `x = n ln 2 + r`, a polynomial in `r` (Cephes' `expf`), and `2^n` in two factors so that the smallest results are
/// subnormal numbers rather than zero.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // Selections, not `clamp`: they let NaN pass.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts; the product with the first is exact.
    let r = x - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.0e-1;
    let y = p * (r * r) + r + 1.0;
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent: a polynomial near zero (Cephes' `tanhf`), `1 - 2 / (e^2x + 1)` elsewhere.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let size = x.abs();
    let z = x * x;
    let mut p = -5.704_988_7e-3;
    p = p * z + 2.063_909e-2;
    p = p * z - 5.373_971_6e-2;
    p = p * z + 1.333_144_2e-1;
    p = p * z - 3.333_328e-1;
    let near = p * z * x + x;
    let far = (1.0 - 2.0 / (exp(2.0 * size) + 1.0)).copysign(x);
    if size < 0.625 { near } else { far }
}

/// The error function: an odd polynomial near zero, `1 - e^p(|x|)` elsewhere.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let size = x.abs();
    let z = x * x;
    let mut p = -5.967_617e-4;
    p = p * z + 4.991_194e-3;
    p = p * z - 2.676_813_5e-2;
    p = p * z + 1.128_199_25e-1;
    p = p * z - 3.761_253_4e-1;
    p = p * z + 1.283_791_7e-1;
    let near = p * x + x;
    // Beyond 4 the result is 1; the bound keeps powers of large arguments finite, and NaN passes.
    let t = if size > 4.0 { 4.0 } else { size };
    let mut p = -1.728_534_7e-5;
    p = p * t + 3.831_971_3e-4;
    p = p * t - 3.883_964_4e-3;
    p = p * t + 2.425_462_2e-2;
    p = p * t - 1.067_778_8e-1;
    p = p * t - 6.348_467e-1;
    p = p * t - 1.287_175_1e-1;
    p = p * t - t;
    let far = (1.0 - exp(p)).copysign(x);
    if size > 0.927_734_4 { far } else { near }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 2039th f32 of either sign, and the values next to the ends of the ranges.
    fn arguments() -> impl Iterator<Item = f32> {
        let grid = (0..0x7F80_0000u32).step_by(2039).map(f32::from_bits);
        let edges = [0.0, f32::MIN_POSITIVE, 0.625, 0.927_734_4, 4.0, 87.3, 88.722_84, 89.0, 103.9, 104.0, f32::MAX];
        grid.chain(edges).flat_map(|x| [x, -x])
    }

    /// Distance in units in the last place of `exact`; subnormal results count in units of the smallest number.
    fn ulps(actual: f32, exact: f64) -> f64 {
        let rounded = exact as f32;
        if rounded.is_infinite() || actual.is_infinite() {
            return if actual == rounded { 0.0 } else { f64::INFINITY };
        }
        let exponent = (rounded.abs().to_bits() >> 23).max(1) as i32;
        (f64::from(actual) - exact).abs() / 2f64.powi(exponent - 127 - 23)
    }

    fn worst(approximation: fn(f32) -> f32, exact: impl Fn(f64) -> f64, wanted: impl Fn(f64) -> bool) -> f64 {
        let mut worst = 0.0;
        for x in arguments() {
            let exact = exact(f64::from(x));
            if wanted(exact) {
                let error = ulps(approximation(x), exact);
                assert!(error < 100.0, "{x}: {} against {exact}", approximation(x));
                worst = f64::max(worst, error);
            }
        }
        worst
    }

    /// Series of positive terms: `2 / sqrt(pi) e^(-x^2) sum 2^n x^(2n+1) / (1 3 .. (2n+1))`.
    fn exact_erf(x: f64) -> f64 {
        if x.abs() > 6.0 {
            return x.signum();
        }
        let (mut term, mut sum, mut n) = (x, x, 1.0);
        while term.abs() > 1e-18 * sum.abs() {
            term *= 2.0 * x * x / (2.0 * n + 1.0);
            sum += term;
            n += 1.0;
        }
        std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
    }

    #[test]
    fn exp_error_bound() {
        let error = worst(exp, f64::exp, |_| true);
        assert!(error <= 2.0, "{error}");
    }

    #[test]
    fn tanh_error_bound() {
        let error = worst(tanh, f64::tanh, |_| true);
        assert!(error <= 3.0, "{error}");
    }

    #[test]
    fn sigmoid_error_bound() {
        let error = worst(sigmoid, |x| 1.0 / (1.0 + (-x).exp()), |y| y >= f64::from(f32::MIN_POSITIVE));
        assert!(error <= 4.0, "{error}");
    }

    #[test]
    fn erf_error_bound() {
        let error = worst(erf, exact_erf, |_| true);
        assert!(error <= 2.0, "{error}");
    }

    #[test]
    fn limits_and_nan() {
        let inf = f32::INFINITY;
        for (function, at_minus_inf, at_inf) in
            [(exp as fn(f32) -> f32, 0.0, inf), (sigmoid, 0.0, 1.0), (tanh, -1.0, 1.0), (erf, -1.0, 1.0)]
        {
            assert_eq!((function(-inf), function(inf)), (at_minus_inf, at_inf));
            assert!(function(f32::NAN).is_nan());
        }
        assert_eq!([exp(0.0), sigmoid(0.0), tanh(0.0), erf(0.0)], [1.0, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn vectors_and_scalars_agree_bitwise() {
        let x: Vec<f32> = arguments().step_by(101).chain([f32::INFINITY, f32::NEG_INFINITY]).collect();
        for function in [exp as fn(f32) -> f32, sigmoid, tanh, erf] {
            let alone: Vec<f32> = x.iter().map(|&x| function(std::hint::black_box(x))).collect();
            let mut together = x.clone();
            let before = together.len();
            vectorised(
                #[inline(always)]
                || together.iter_mut().for_each(|x| *x = function(*x)),
            );
            assert_eq!((together.len(), together), (before, alone));
        }
    }

    #[test]
    fn reductions_of_every_tail_length() {
        for len in (0..3 * LANES).chain([1000]) {
            let x: Vec<f32> = (0..len).map(|i| (i % 7) as f32 - 3.0).collect();
            let y: Vec<f32> = (0..len).map(|i| (i % 5) as f32).collect();
            // Small integers: every order of summation is exact.
            assert_eq!(sum(&x), x.iter().sum::<f32>());
            assert_eq!(dot(&x, &y), x.iter().zip(&y).map(|(x, y)| x * y).sum::<f32>());
            assert_eq!(sum_of_squares(&x), dot(&x, &x));
            let narrow: Vec<half::bf16> = y.iter().map(|&y| half::bf16::from_f32(y)).collect();
            assert_eq!(dot_bf16(&x, &narrow), dot(&x, &y));
            assert_eq!(dot3(&x, &y, &y), x.iter().zip(&y).map(|(x, y)| x * y * y).sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let exact: f64 = x.iter().map(|&x| f64::from(x - 3.0).exp()).sum();
            let mut written = x.clone();
            assert!((f64::from(exp_and_sum(&mut written, 3.0)) - exact).abs() <= 1e-6 * exact);
        }
    }

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
        update(&mut f16s, |x| scale(x, 2.0));
        assert_eq!(f16s[0].to_f32(), 2.0);
    }
}
