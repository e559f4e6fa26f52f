//! Exponentials, logarithms and their kin, good to a few units in the last place on every device: those of a shading language may be off by
//! as many as their argument is large. Each takes any finite argument without an infinite or subnormal number on the way, which
//! devices may take for anything or for zero.

#![allow(missing_docs, reason = "the cube macro writes modules and functions without documentation")]

use cubecl::prelude::*;

/// From here down the exponential is no f32, subnormal numbers included.
const LEAST: f32 = -104.0;
/// From here up it is none either.
const MOST: f32 = 88.722_83;

/// `2^n` for `n` from -126 to 127.
#[cube]
fn power_of_two(n: i32) -> f32 {
    f32::reinterpret(u32::cast_from(n + 127) << 23u32)
}

/// `factor * e^x`, at most the largest f32 times `factor`, and 0 where `e^x` is none. The result is subnormal only if it is small
/// itself.
///
/// `x = n ln 2 + r` with a polynomial in `r` (Cephes' `expf`), and `2^n` in two factors. NaN passes.
#[cube]
pub fn scaled_exp(x: f32, factor: f32) -> f32 {
    let above = select(x < f32::new(LEAST), f32::new(LEAST), x);
    let bounded = select(above > f32::new(MOST), f32::new(MOST), above);
    let n = f32::floor(bounded * f32::new(std::f32::consts::LOG2_E) + 0.5);
    // ln 2 in two parts; the product with the first is exact.
    let r = bounded - n * 0.693_359_4_f32;
    let r = r + n * 2.121_944_4e-4_f32;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.0e-1;
    let y = p * (r * r) + r + 1.0;
    let n = i32::cast_from(n);
    let half = n / 2;
    let result = factor * (y * power_of_two(half)) * power_of_two(n - half);
    select(x < f32::new(LEAST), 0.0, result)
}

/// `e^x`
#[cube]
pub fn exp(x: f32) -> f32 {
    scaled_exp(x, 1.0)
}

/// `e^x` by the device's own instruction where it has one: two units in the last place near zero, more in proportion to a large argument.
/// For weights of a softmax that are rounded to half precision; NaN passes, and so does what overflows.
#[cube(fast_math = FastMath::ReducedPrecision | FastMath::NotNaN | FastMath::NotInf)]
pub fn quick_exp(x: f32) -> f32 {
    f32::exp(x)
}

/// Natural logarithm of a positive normal number (Cephes' `logf`): of `x = m 2^n`, a polynomial in `m - 1`, and `n ln 2` in two parts,
/// of which the first is exact.
#[cube]
pub fn ln(x: f32) -> f32 {
    let bits = u32::reinterpret(x);
    let exponent = i32::cast_from(bits >> 23u32) - 127;
    let m = f32::reinterpret((bits & 0x007F_FFFFu32) | 0x3F80_0000u32);
    // Between the roots of 1/2 and 2.
    let is_above = m > f32::new(std::f32::consts::SQRT_2);
    let m = select(is_above, m * 0.5, m);
    let n = f32::cast_from(select(is_above, exponent + 1, exponent));
    let z = m - 1.0;
    let mut p = f32::new(7.037_683_6e-2);
    p = p * z - 1.151_461e-1;
    p = p * z + 1.167_699_87e-1;
    p = p * z - 1.242_014_1e-1;
    p = p * z + 1.424_932_3e-1;
    p = p * z - 1.666_805_8e-1;
    p = p * z + 2.000_071_5e-1;
    p = p * z - 2.499_999_4e-1;
    p = p * z + 3.333_333e-1;
    let square = z * z;
    let small = p * z * square - n * 2.121_944_4e-4_f32 - square * 0.5;
    z + small + n * 0.693_359_4_f32
}

/// Hyperbolic tangent: a polynomial near zero (Cephes' `tanhf`), `1 - 2 / (e^2x + 1)` elsewhere.
#[cube]
pub fn tanh(x: f32) -> f32 {
    let size = f32::abs(x);
    let near_x = select(size < 0.625, x, 0.0);
    let z = near_x * near_x;
    let mut p = f32::new(-5.704_988_7e-3);
    p = p * z + 2.063_909e-2;
    p = p * z - 5.373_971_6e-2;
    p = p * z + 1.333_144_2e-1;
    p = p * z - 3.333_328e-1;
    let near = p * z * near_x + near_x;
    // Beyond 20 the result is 1.
    let bounded = select(size > 20.0, 20.0, size);
    let far = 1.0f32 - 2.0f32 / (exp(2.0f32 * bounded) + 1.0f32);
    let far = select(x < 0.0, -far, far);
    select(size < 0.625, near, far)
}

/// The error function: an odd polynomial near zero, `1 - e^p(|x|)` elsewhere.
#[cube]
pub fn erf(x: f32) -> f32 {
    let size = f32::abs(x);
    let near_x = select(size > 0.927_734_4, 0.0, x);
    let z = near_x * near_x;
    let mut p = f32::new(-5.967_617e-4);
    p = p * z + 4.991_194e-3;
    p = p * z - 2.676_813_5e-2;
    p = p * z + 1.128_199_25e-1;
    p = p * z - 3.761_253_4e-1;
    p = p * z + 1.283_791_7e-1;
    let near = p * near_x + near_x;
    // Beyond 4 the result is 1.
    let t = select(size > 4.0, 4.0, size);
    let mut p = f32::new(-1.728_534_7e-5);
    p = p * t + 3.831_971_3e-4;
    p = p * t - 3.883_964_4e-3;
    p = p * t + 2.425_462_2e-2;
    p = p * t - 1.067_778_8e-1;
    p = p * t - 6.348_467e-1;
    p = p * t - 1.287_175_1e-1;
    p = p * t - t;
    let far = 1.0f32 - exp(p);
    let far = select(x < 0.0, -far, far);
    select(size > 0.927_734_4, far, near)
}
