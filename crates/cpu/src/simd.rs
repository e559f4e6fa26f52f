//! Arithmetic that the compiler vectorises: blocks of f32, reductions in a fixed order, and exp, tanh, sigmoid and erf as
//! polynomials.
//!
//! The build targets the oldest processor of its architecture; [`vectorised`] compiles a closure again for AVX2 and newer
//! and picks at run time. Sums and products use no fused multiply-add, so the same input gives them the same bits whichever
//! copy runs; polynomials use it where the processor has it, see [`Fused`].
//!
//! Errors in units in the last place, against f64, over all finite inputs (measured by the tests below): `exp` and `erf` 2,
//! `tanh` 3, `sigmoid` 4 where the result is a normal number. `exp` gives 0 for results below 2^-125.5. All give NaN for NaN and
//! their limits for the infinities.

mod convert;

pub(crate) use convert::{buffer, narrow, produce, update, widen, widened};

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

/// Whether a product and a sum are one instruction: a constant in each copy of a closure. Where they are not, computing as if
/// they were would take a call of the C library for each element.
#[derive(Clone, Copy)]
pub(crate) struct Fused(bool);

impl Fused {
    /// `a * b + c`
    #[inline(always)]
    pub(crate) fn mul_add(self, a: f32, b: f32, c: f32) -> f32 {
        if self.0 { a.mul_add(b, c) } else { a * b + c }
    }

    /// The polynomial with these coefficients, highest power first.
    #[inline(always)]
    fn polynomial<const N: usize>(self, x: f32, coefficients: [f32; N]) -> f32 {
        let mut value = coefficients[0];
        for coefficient in &coefficients[1..] {
            value = self.mul_add(value, x, *coefficient);
        }
        value
    }
}

/// [`vectorised`] for work with polynomials.
#[inline(always)]
pub(crate) fn vectorised_fused<R>(work: impl FnOnce(Fused) -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        if crate::avx512::is_available() {
            #[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
            // SAFETY: the processor has been asked.
            return unsafe {
                crate::avx512::vectorised(
                    #[inline(always)]
                    || work(Fused(true)),
                )
            };
        }
        match pulp::x86::V3::try_new() {
            Some(v3) => v3.vectorize(
                #[inline(always)]
                || work(Fused(true)),
            ),
            None => work(Fused(false)),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || work(Fused(cfg!(target_arch = "aarch64"))),
    )
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
    sum_of_squares_about(x, 0.0)
}

/// `sum((x - mean)^2)` in a fixed order.
#[inline(always)]
pub(crate) fn sum_of_squares_about(x: &[f32], mean: f32) -> f32 {
    fold((x, x, x), (0.0, mean), |sum, x, _, _| sum + (x - mean) * (x - mean), |a, b| a + b)
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

/// `sum(a * b * (c - mean))` in a fixed order.
#[inline(always)]
pub(crate) fn dot3_about(a: &[f32], b: &[f32], c: &[f32], mean: f32) -> f32 {
    fold((a, b, c), (0.0, 0.0), |sum, a, b, c| sum + a * b * (c - mean), |a, b| a + b)
}

/// Largest value; -inf for an empty slice. A NaN is passed over.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    fold((x, x, x), (f32::NEG_INFINITY, f32::NEG_INFINITY), |max, x, _, _| larger(max, x), larger)
}

/// Sum of `exp(x - shift)` in a fixed order, for a finite `shift`.
#[inline(always)]
pub(crate) fn sum_of_exp(m: Fused, x: &[f32], shift: f32) -> f32 {
    fold((x, x, x), (0.0, f32::NEG_INFINITY), |sum, x, _, _| sum + exp(m, x - shift), |a, b| a + b)
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

/// `e^x`: `x = n ln 2 + r`, a polynomial in `r` (Cephes' `expf`), and `2^n`.
#[inline(always)]
pub(crate) fn exp(m: Fused, x: f32) -> f32 {
    // 1.5 * 2^23: adding it leaves the nearest integer in the low bits. With 126 more they are the exponent of 2^(n - 1), which
    // covers the largest results, and is 0 where n is -126.
    const ROUND: f32 = 12_582_912.0 + 126.0;
    // Selections, not `clamp`: they let NaN pass.
    let x = if x < -87.6 { -87.6 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = m.mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts; the product with the first is exact.
    let r = m.mul_add(n, -0.693_359_4, x);
    let r = m.mul_add(n, 2.121_944_4e-4, r);
    let p = m.polynomial(r, [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1]);
    let twice = m.mul_add(m.mul_add(p, r * r, r), 2.0, 2.0);
    twice * f32::from_bits(shifted.to_bits() << 23)
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub(crate) fn sigmoid(m: Fused, x: f32) -> f32 {
    1.0 / (1.0 + exp(m, -x))
}

/// Hyperbolic tangent: a polynomial near zero (Cephes' `tanhf`), `1 - 2 / (e^2x + 1)` elsewhere.
#[inline(always)]
pub(crate) fn tanh(m: Fused, x: f32) -> f32 {
    let size = x.abs();
    let z = x * x;
    let p = m.polynomial(z, [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1]);
    let near = m.mul_add(p * z, x, x);
    let far = (1.0 - 2.0 / (exp(m, 2.0 * size) + 1.0)).copysign(x);
    if size < 0.625 { near } else { far }
}

/// The error function: an odd polynomial near zero, `1 - e^p(|x|)` elsewhere.
#[inline(always)]
pub(crate) fn erf(m: Fused, x: f32) -> f32 {
    let size = x.abs();
    let p = m.polynomial(
        x * x,
        [-5.967_617e-4, 4.991_194e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1],
    );
    let near = m.mul_add(p, x, x);
    // Beyond 4 the result is 1; the bound keeps powers of large arguments finite, and NaN passes.
    let t = if size > 4.0 { 4.0 } else { size };
    let p = m.polynomial(
        t,
        [
            -1.728_534_7e-5,
            3.831_971_3e-4,
            -3.883_964_4e-3,
            2.425_462_2e-2,
            -1.067_778_8e-1,
            -6.348_467e-1,
            -1.287_175_1e-1,
        ],
    );
    let far = (1.0 - exp(m, m.mul_add(p, t, -t))).copysign(x);
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

    type Function = fn(Fused, f32) -> f32;

    /// With fused instructions and without.
    const BOTH: [Fused; 2] = [Fused(false), Fused(true)];

    fn worst(approximation: Function, exact: impl Fn(f64) -> f64, wanted: impl Fn(f64) -> bool) -> f64 {
        let mut worst = 0.0;
        for (m, x) in BOTH.into_iter().flat_map(|m| arguments().map(move |x| (m, x))) {
            let exact = exact(f64::from(x));
            if wanted(exact) {
                let error = ulps(approximation(m, x), exact);
                assert!(error < 100.0, "{x}: {} against {exact}", approximation(m, x));
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
        let smallest = 2f64.powf(-125.5);
        let error = worst(exp, f64::exp, |y| y >= 1.0001 * smallest);
        assert!(error <= 2.0, "{error}");
        for x in arguments().filter(|&x| f64::from(x).exp() < 0.9999 * smallest) {
            BOTH.into_iter().for_each(|m| assert_eq!(exp(m, x), 0.0, "{x}"));
        }
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
        for m in BOTH {
            for (function, at_minus_inf, at_inf) in
                [(exp as Function, 0.0, inf), (sigmoid, 0.0, 1.0), (tanh, -1.0, 1.0), (erf, -1.0, 1.0)]
            {
                assert_eq!((function(m, -inf), function(m, inf)), (at_minus_inf, at_inf));
                assert!(function(m, f32::NAN).is_nan());
            }
            assert_eq!([exp(m, 0.0), sigmoid(m, 0.0), tanh(m, 0.0), erf(m, 0.0)], [1.0, 0.5, 0.0, 0.0]);
        }
    }

    #[test]
    fn vectors_and_scalars_agree_bitwise() {
        let x: Vec<f32> = arguments().step_by(101).chain([f32::INFINITY, f32::NEG_INFINITY]).collect();
        for function in [exp as Function, sigmoid, tanh, erf] {
            let mut together = x.clone();
            let m = vectorised_fused(
                #[inline(always)]
                |m| {
                    together.iter_mut().for_each(|x| *x = function(m, *x));
                    m
                },
            );
            let alone: Vec<f32> = x.iter().map(|&x| function(m, std::hint::black_box(x))).collect();
            assert_eq!(together, alone);
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
            let about: Vec<f32> = x.iter().map(|x| x - 2.0).collect();
            assert_eq!(sum_of_squares_about(&x, 2.0), dot(&about, &about));
            let narrow: Vec<half::bf16> = y.iter().map(|&y| half::bf16::from_f32(y)).collect();
            assert_eq!(dot_bf16(&x, &narrow), dot(&x, &y));
            assert_eq!(dot3_about(&x, &y, &x, 2.0), x.iter().zip(&y).map(|(x, y)| x * y * (x - 2.0)).sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let exact: f64 = x.iter().map(|&x| f64::from(x - 3.0).exp()).sum();
            for m in BOTH {
                assert!((f64::from(sum_of_exp(m, &x, 3.0)) - exact).abs() <= 1e-6 * exact);
            }
        }
    }
}
