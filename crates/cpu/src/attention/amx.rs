//! Products of tiles of pairs by AMX.
//!
//! Factors are copied to where tiles of AMX are read fastest, and filled up with zeros. Results are scaled on the way to their place.

use std::{arch::x86_64::*, mem::MaybeUninit};

use super::tile::Product;
use crate::{
    amx::{BLOCK, Products, SIDE, TILE, Tiles},
    avx512::transposed,
    matmul::Into,
};

/// Steps of the dimension summed over, of sixteen pairs each, that are packed at once: heads of 128 channels, or the keys of a tile.
const STEPS: usize = 4;
/// Rows or columns that are packed at once.
const LINES: usize = 128;
/// Elements of a packed factor.
const PACKED: usize = LINES * SIDE * STEPS;

#[repr(align(64))]
struct Packed<const N: usize>(MaybeUninit<[u32; N]>);

impl<const N: usize> Packed<N> {
    fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    fn start(&mut self) -> *mut u32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Computes a product of pairs.
///
/// # Safety
/// The processor has AMX, and AVX-512 with bf16; the matrices lie in their slices.
#[allow(unsafe_code, reason = "intrinsics on pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn run(product: Product<'_>) {
    let Product { size: (m, n, depth), alpha, a, b, c, into } = product;
    let (mut left, mut right) = (Packed::<PACKED>::new(), Packed::<PACKED>::new());
    let (left, right) = (left.start(), right.start());
    // SAFETY: the caller's promise.
    let tiles = unsafe { Tiles::configure() };
    for k in (0..depth).step_by(STEPS * SIDE) {
        let pairs = (depth - k).min(STEPS * SIDE);
        let steps = pairs.div_ceil(SIDE);
        let into = if k == 0 { into } else { Into::Add };
        for j in (0..n).step_by(LINES) {
            let cols = (n - j).min(LINES);
            // SAFETY: `pairs` rows of `cols` columns lie in `b`, as the caller promises.
            unsafe { pack_right((b.0.as_ptr().wrapping_add(k * b.1 + j), b.1), (pairs, cols), right) };
            for i in (0..m).step_by(LINES) {
                let rows = (m - i).min(LINES);
                // SAFETY: as above, of `a`.
                unsafe {
                    let from = a.data.as_ptr().wrapping_add(i * a.row + k * a.col);
                    pack_left(from, [a.row, a.col], (rows, pairs), left);
                }
                let to = c.0.as_mut_ptr().wrapping_add(i * c.1 + j);
                // SAFETY: the factors are packed, and `rows` of `cols` lie in `c`.
                unsafe { multiply(&tiles, [left, right], (rows, cols, steps), alpha, (to, c.1), into) };
            }
        }
    }
}

/// `c = alpha * a b` or `c += alpha * a b` of packed factors.
///
/// # Safety
/// The processor has AVX-512; `left` and `right` are packed for `rows` and `cols` and `steps`, of which there is one or more; `c` can be
/// read and written.
#[allow(unsafe_code, reason = "intrinsics on pointers")]
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn multiply(
    tiles: &Tiles,
    [left, right]: [*mut u32; 2],
    (rows, cols, steps): (usize, usize, usize),
    alpha: f32,
    (c, c_row): (*mut f32, usize),
    into: Into,
) {
    let mut sums = Packed::<{ BLOCK * BLOCK }>::new();
    let sums = sums.start().cast::<f32>();
    let products = [1, 2].map(|across| [1, 2].map(|others| Products::new([1, 1], [across, others])));
    for row in (0..rows).step_by(BLOCK) {
        let here = (rows - row).min(BLOCK);
        let across = here.div_ceil(SIDE);
        for col in (0..cols).step_by(BLOCK) {
            let others = (cols - col).min(BLOCK) / SIDE;
            let (products, sides) = (&products[across - 1][others - 1], [across, others]);
            let a = left.wrapping_add(row * SIDE * steps).cast_const();
            let b = right.wrapping_add(col * SIDE * steps).cast_const();
            let to = c.wrapping_add(row * c_row + col);
            let is_direct = alpha == 1.0 && here == across * SIDE;
            let target = if is_direct { (to, 4 * c_row) } else { (sums, 4 * BLOCK) };
            let add = is_direct && into == Into::Add;
            // SAFETY: the caller's promises; `sums` has room for four tiles.
            unsafe {
                tiles.multiply((products, sides), ([a, b, b], steps), target, add);
                if !is_direct {
                    store(sums, (here, others), alpha, (to, c_row), into);
                }
            }
        }
    }
}

/// Rows of pairs as blocks of two tiles across, step after step.
///
/// # Safety
/// The processor has AVX-512; `pairs` rows of `cols` can be read, and `to` holds whole tiles for them.
#[allow(unsafe_code, reason = "intrinsics on pointers")]
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn pack_right((from, row): (*const u32, usize), (pairs, cols): (usize, usize), to: *mut u32) {
    let steps = pairs.div_ceil(SIDE);
    for col in (0..cols).step_by(SIDE) {
        let block = col / BLOCK * BLOCK;
        let across = (cols - block).min(BLOCK) / SIDE;
        for k in 0..steps * SIDE {
            let at = block * SIDE * steps + (k / SIDE * across + (col - block) / SIDE) * TILE + k % SIDE * SIDE;
            let from = from.wrapping_add(k * row + col);
            // SAFETY: the caller's promise; rows that fill the last step up are not read.
            unsafe {
                let pairs = if k < pairs { _mm512_loadu_si512(from.cast()) } else { _mm512_setzero_si512() };
                _mm512_storeu_si512(to.wrapping_add(at).cast(), pairs);
            }
        }
    }
}

/// Rows as blocks of two tiles across, step after step; element `(i, k)` is at `i * strides[0] + k * strides[1]`, and one of these is 1.
///
/// # Safety
/// The processor has AVX-512; `rows` of `pairs` can be read, and `to` holds whole tiles for them.
#[allow(unsafe_code, reason = "intrinsics on pointers")]
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn pack_left(from: *const u32, strides: [usize; 2], (rows, pairs): (usize, usize), to: *mut u32) {
    let steps = pairs.div_ceil(SIDE);
    // A vector is sixteen pairs of a row, or a pair of sixteen rows.
    let by_rows = strides[1] == 1;
    let line = if by_rows { strides[0] } else { strides[1] };
    for first in (0..rows).step_by(SIDE) {
        let block = first / BLOCK * BLOCK;
        let across = (rows - block).min(BLOCK).div_ceil(SIDE);
        for step in 0..steps {
            let k = step * SIDE;
            let there = [(rows - first).min(SIDE), (pairs - k).min(SIDE)];
            let [lines, len] = if by_rows { there } else { [there[1], there[0]] };
            let mask = u16::MAX >> (SIDE - len);
            let start = from.wrapping_add(first * strides[0] + k * strides[1]);
            let mut vectors = [_mm512_setzero_si512(); SIDE];
            for (i, vector) in vectors.iter_mut().enumerate() {
                if i < lines {
                    // SAFETY: the mask is of pairs that can be read, as the caller promises.
                    *vector = unsafe { _mm512_maskz_loadu_epi32(mask, start.wrapping_add(i * line).cast()) };
                }
            }
            let vectors = if by_rows { vectors } else { transposed(vectors) };
            let at = block * SIDE * steps + (step * across + (first - block) / SIDE) * TILE;
            for (i, vector) in vectors.into_iter().enumerate() {
                // SAFETY: there are whole tiles for all rows and steps.
                unsafe { _mm512_storeu_si512(to.wrapping_add(at + i * SIDE).cast(), vector) };
            }
        }
    }
}

/// `to = alpha * sums` or `to += alpha * sums`, of rows of up to two vectors.
///
/// # Safety
/// The processor has AVX-512; `sums` holds rows of 32, and `to` can be read and written.
#[allow(unsafe_code, reason = "intrinsics on pointers")]
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store(
    sums: *const f32,
    (rows, vectors): (usize, usize),
    alpha: f32,
    (to, row): (*mut f32, usize),
    into: Into,
) {
    let alpha = _mm512_set1_ps(alpha);
    for i in 0..rows {
        for v in 0..vectors {
            let to = to.wrapping_add(i * row + v * SIDE);
            // SAFETY: the caller's promise.
            unsafe {
                let sum = _mm512_loadu_ps(sums.wrapping_add(i * BLOCK + v * SIDE));
                let value = match into {
                    Into::Overwrite => _mm512_mul_ps(alpha, sum),
                    Into::Add => _mm512_fmadd_ps(alpha, sum, _mm512_loadu_ps(to)),
                };
                _mm512_storeu_ps(to, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::{
        Isa,
        attention::tile::{Left, Path},
    };

    /// Pairs of small integers, whose sums are exact in every order.
    fn pairs(len: usize, modulus: usize) -> Vec<u32> {
        let half = |i: usize| u32::from(bf16::from_f32((i % modulus) as f32 - 3.0).to_bits());
        (0..len).map(|i| half(2 * i) | half(2 * i + 1) << 16).collect()
    }

    /// Products that are packed in several pieces, in each direction, and those that fill one up.
    #[test]
    fn products_of_several_pieces_equal_plain_loops() {
        if !Isa::available().any(|isa| isa == Isa::Amx) {
            return;
        }
        let path = Path::new::<bf16>(Isa::Amx, 2);
        for (m, n, k) in [(1, 16, 1), (64, 64, 60), (120, 64, 64), (33, 144, 65), (130, 256, 128), (64, 48, 200)] {
            let (a, b) = (pairs(m * k, 7), pairs(k * n, 5));
            let products = |a: u32, b: u32| {
                let halves = |x: u32| [x << 16, x & 0xFFFF_0000].map(f32::from_bits);
                halves(a)[0] * halves(b)[0] + halves(a)[1] * halves(b)[1]
            };
            for is_transposed in [false, true] {
                let left = if is_transposed { Left::new(&a, m).t() } else { Left::new(&a, k) };
                for (alpha, into, before) in
                    [(2.0, Into::Overwrite, f32::NAN), (1.0, Into::Add, 5.0), (2.0, Into::Add, 5.0)]
                {
                    let mut c = vec![before; m * n];
                    Product { size: (m, n, k), alpha, a: left, b: (&b, n), c: (&mut c, n), into }.run(path);
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        let sum: f32 = (0..k).map(|p| products(a[i * left.row + p * left.col], b[p * n + j])).sum();
                        let old = if into == Into::Add { before } else { 0.0 };
                        assert_eq!(c[i * n + j], old + alpha * sum, "{m} {n} {k} {is_transposed} {alpha} {i} {j}");
                    }
                }
            }
        }
    }
}
