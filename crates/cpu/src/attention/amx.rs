//! Products of factors that are in the order of AMX.

use std::{arch::x86_64::*, mem::MaybeUninit};

use super::tile::Product;
use crate::{
    amx::{BLOCK, Products, SIDE, Tiles},
    matmul::Into,
};

/// Sums of a block whose rows go beyond the result.
#[repr(align(64))]
struct Sums(MaybeUninit<[f32; BLOCK * BLOCK]>);

/// Computes a product of two packed factors, of so many parts each.
pub(super) fn run(product: Product<'_>, parts: usize) {
    let Product { size: (m, n, pairs), a, b, c, into } = product;
    let steps = pairs.div_ceil(SIDE);
    assert!(steps > 0, "a product sums over something");
    let len = |lines: usize| lines.next_multiple_of(SIDE) * SIDE * steps * parts;
    assert!(a.data.len() >= len(m) && b.0.len() >= len(n), "factors are whole");
    let (a, b, (c, c_row)) = (a.data.as_ptr(), b.0.as_ptr(), (c.0.as_mut_ptr(), c.1));
    let mut sums = Sums(MaybeUninit::uninit());
    let sums = sums.0.as_mut_ptr().cast::<f32>();
    #[allow(unsafe_code, reason = "instructions that not every processor has")]
    // SAFETY: the path of AMX is only for processors that have it (`Isa::choose`).
    let tiles = unsafe { Tiles::configure() };
    let of_whole_blocks = Products::new([parts; 2], [2, 2]);
    for row in (0..m).step_by(BLOCK) {
        let rows = (m - row).min(BLOCK);
        let across = rows.div_ceil(SIDE);
        for col in (0..n).step_by(BLOCK) {
            let others = (n - col).min(BLOCK) / SIDE;
            let sides = [across, others];
            let products = if sides == [2, 2] { of_whole_blocks } else { Products::new([parts; 2], sides) };
            let (a, b) = (a.wrapping_add(len(row)), b.wrapping_add(len(col)));
            let to = c.wrapping_add(row * c_row + col);
            let is_whole = rows == across * SIDE;
            let target = if is_whole { (to, 4 * c_row) } else { (sums, 4 * BLOCK) };
            #[allow(unsafe_code, reason = "assembly and intrinsics on pointers")]
            // SAFETY: the factors are whole, as was asserted; `Product::run` has checked that `m` rows of `n` columns lie in `c`; `sums`
            // has room for four tiles, and the processor has AVX-512.
            unsafe {
                tiles.multiply((&products, sides), ([a, b, b], steps), target, is_whole && into == Into::Add);
                if !is_whole {
                    store(sums, (rows, others), (to, c_row), into);
                }
            }
        }
    }
}

/// `to = sums` or `to += sums`, of rows of up to two vectors.
///
/// # Safety
/// The processor has AVX-512; `sums` holds rows of 32, and `to` can be read and written.
#[allow(unsafe_code, reason = "intrinsics on pointers")]
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store(sums: *const f32, (rows, vectors): (usize, usize), (to, row): (*mut f32, usize), into: Into) {
    for i in 0..rows {
        for v in 0..vectors {
            let to = to.wrapping_add(i * row + v * SIDE);
            // SAFETY: the caller's promise.
            unsafe {
                let sum = _mm512_loadu_ps(sums.wrapping_add(i * BLOCK + v * SIDE));
                let value = match into {
                    Into::Overwrite => sum,
                    Into::Add => _mm512_add_ps(_mm512_loadu_ps(to), sum),
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
        attention::factor::{Left, Path},
        matmul::{Elements, Mat, Parts, Side},
    };

    /// Small integers, whose sums are exact in every order; with several parts, that need two of them.
    fn values(len: usize, modulus: usize, parts: usize) -> Vec<f32> {
        (0..len).map(|i| (i % modulus) as f32 - 3.0 + if parts > 1 { 256.0 } else { 0.0 }).collect()
    }

    /// The lines of a factor whose lines or columns lie one after another.
    fn packed(
        (parts, side): (usize, Side),
        data: &[f32],
        (lines, depth): (usize, usize),
        is_transposed: bool,
    ) -> Vec<u32> {
        let mat = |rows, cols| Mat::new(Elements::F32(data), rows, cols, cols);
        let mat = if is_transposed { mat(depth, lines).t() } else { mat(lines, depth) };
        let len = lines.next_multiple_of(SIDE) * depth.div_ceil(2).next_multiple_of(SIDE);
        let mut tiles = vec![f32::NAN; parts * len];
        Parts::first(parts, side).pack_all(&mat, &mut tiles);
        bytemuck::cast_slice(&tiles).to_vec()
    }

    /// Products of whole blocks and of what is left over in each direction.
    #[test]
    fn products_of_every_remainder_equal_plain_loops() {
        if !Isa::available().any(|isa| isa == Isa::Amx) {
            return;
        }
        let paths = [(1, Path::new::<bf16>(Isa::Amx, 2, 1)), (3, Path::new::<f32>(Isa::Amx, 2, 1000))];
        let sizes = [(1, 16, 1), (64, 64, 120), (120, 64, 128), (33, 144, 65), (130, 256, 240), (64, 48, 200)];
        for ((parts, path), (m, n, k)) in paths.into_iter().flat_map(|path| sizes.map(|size| (path, size))) {
            let (a, b) = (values(m * k, 7, parts), values(n * k, 5, parts));
            for is_transposed in [false, true] {
                let at = |data: &[f32], (line, lines): (usize, usize), p: usize| {
                    data[if is_transposed { p * lines + line } else { line * k + p }]
                };
                let left = packed((parts, Side::Left), &a, (m, k), is_transposed);
                let right = packed((parts, Side::Right), &b, (n, k), is_transposed);
                for (into, before) in [(Into::Overwrite, f32::NAN), (Into::Add, 5.0)] {
                    let mut c = vec![before; m * n];
                    let (size, a_tiles) = ((m, n, path.depth(k)), Left::packed(&left));
                    Product { size, a: a_tiles, b: (&right, 0), c: (&mut c, n), into }.run(path);
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        let sum: f32 = (0..k).map(|p| at(&a, (i, m), p) * at(&b, (j, n), p)).sum();
                        let old = if into == Into::Add { before } else { 0.0 };
                        assert_eq!(c[i * n + j], old + sum, "{parts} {m} {n} {k} {is_transposed} {i} {j}");
                    }
                }
            }
        }
    }
}
