//! Transposition of squares in the registers of AVX2, between lines in memory and panels.

use std::arch::x86_64::*;

use super::pack::{LINES, Wide, prefetch};

/// Writes element `(line, k)` to `to[k * width + line]`, for a `depth` that is a multiple of eight, and zeros for the lines
/// that are missing to a multiple of eight.
///
/// # Safety
/// The processor has AVX2 and F16C; all `lines` hold `depth` elements, `to` holds `depth` rows, and `width` is at least
/// the lines rounded up to a multiple of eight.
#[allow(unsafe_code, reason = "intrinsics on pointers")]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn transpose<T: Wide>(
    from: *const T,
    line_stride: usize,
    to: *mut f32,
    width: usize,
    (lines, depth): (usize, usize),
) {
    for line in (0..lines).step_by(LINES) {
        for k in (0..depth).step_by(LINES) {
            let first = from.wrapping_add(line * line_stride + k);
            let mut square = [_mm256_setzero_ps(); LINES];
            ask_for_next(first, line_stride);
            for (i, row) in square.iter_mut().take(lines - line).enumerate() {
                // SAFETY: `line + i < lines` and `k + 8 <= depth`: the caller's promise.
                *row = unsafe { T::load8(first.wrapping_add(i * line_stride)) };
            }
            for (i, row) in transposed(square).into_iter().enumerate() {
                // SAFETY: `k + i < depth` and `line + 8 <= width`: the caller's promise.
                unsafe { _mm256_storeu_ps(to.wrapping_add((k + i) * width + line), row) };
            }
        }
    }
}

/// As [`transpose`], of pairs.
///
/// # Safety
/// As for [`transpose`]: `lines` of `depth` pairs; `line_stride` counts halves of pairs.
#[allow(unsafe_code, reason = "intrinsics on pointers")]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn transpose_pairs(
    from: *const u16,
    line_stride: usize,
    to: *mut f32,
    width: usize,
    (lines, depth): (usize, usize),
) {
    for line in (0..lines).step_by(LINES) {
        for k in (0..depth).step_by(LINES) {
            let first = from.wrapping_add(line * line_stride + 2 * k);
            let mut square = [_mm256_setzero_ps(); LINES];
            ask_for_next(first, line_stride);
            for (i, row) in square.iter_mut().take(lines - line).enumerate() {
                // SAFETY: `line + i < lines` and `k + 8 <= depth`: the caller's promise.
                *row = unsafe { _mm256_loadu_ps(first.wrapping_add(i * line_stride).cast()) };
            }
            for (i, row) in transposed(square).into_iter().enumerate() {
                // SAFETY: as in `transpose`.
                unsafe { _mm256_storeu_ps(to.wrapping_add((k + i) * width + line), row) };
            }
        }
    }
}

/// Asks for the lines below a square: each begins a page that no processor foresees.
#[inline(always)]
fn ask_for_next<T>(first: *const T, line_stride: usize) {
    (LINES..2 * LINES).for_each(|i| prefetch(first.wrapping_add(i * line_stride)));
}

/// The transpose of a square in registers.
#[target_feature(enable = "avx2")]
#[inline]
fn transposed(r: [__m256; LINES]) -> [__m256; LINES] {
    let mut t = [_mm256_setzero_ps(); LINES];
    for i in 0..4 {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let mut s = [_mm256_setzero_ps(); LINES];
    for half in [0, 4] {
        for i in 0..2 {
            let (a, b) = (t[half + i], t[half + i + 2]);
            s[half + 2 * i] = _mm256_shuffle_ps::<0x44>(a, b);
            s[half + 2 * i + 1] = _mm256_shuffle_ps::<0xEE>(a, b);
        }
    }
    let mut out = [_mm256_setzero_ps(); LINES];
    for i in 0..4 {
        out[i] = _mm256_permute2f128_ps::<0x20>(s[i], s[i + 4]);
        out[i + 4] = _mm256_permute2f128_ps::<0x31>(s[i], s[i + 4]);
    }
    out
}
