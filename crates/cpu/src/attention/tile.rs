//! Tiles and their products, on one thread.
//!
//! Tiles are small and used once, so nothing is packed that is not in its place anyway, where a general matrix product does that
//! at every call: the right factor and the result are rows of whole vectors, and the left factor is read one element at a time,
//! in rows or in columns.

use pulp::{Simd, WithSimd};

#[cfg(target_arch = "x86_64")]
use super::factor::Form;
use super::factor::{Left, Path};
use crate::matmul::Into;
#[cfg(target_arch = "x86_64")]
use crate::{avx512, matmul::Isa};

/// Every vector width divides it.
pub(super) const PAD: usize = 16;

/// Columns of a row filled up to whole vectors.
pub(super) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(PAD)
}

/// Distance of the rows of a tile. Without the extra vector, rows of 64 or 128 channels would share a few sets of the cache.
pub(super) fn stride(cols: usize) -> usize {
    padded(cols) + PAD
}

/// `c = a b`, or `c += a b`.
pub(super) struct Product<'a> {
    /// Rows of `c`, columns of `c`, and the dimension summed over. Columns count what fills the rows up.
    pub(super) size: (usize, usize, usize),
    pub(super) a: Left<'a>,
    /// Right factor and the distance of its rows.
    pub(super) b: (&'a [u32], usize),
    /// Result and the distance of its rows.
    pub(super) c: (&'a mut [f32], usize),
    pub(super) into: Into,
}

impl Product<'_> {
    pub(super) fn run(self, path: Path) {
        let (m, n, k) = self.size;
        if m == 0 || n == 0 {
            return;
        }
        let last = |count: usize, stride: usize| count.saturating_sub(1) * stride;
        assert!(n.is_multiple_of(PAD), "rows are whole vectors");
        assert!(k == 0 || last(m, self.a.row) + last(k, self.a.col) < self.a.data.len(), "a lies in its slice");
        assert!(k == 0 || last(k, self.b.1) + n <= self.b.0.len(), "b lies in its slice");
        assert!(last(m, self.c.1) + n <= self.c.0.len(), "c lies in its slice");
        match (path.isa, path.form) {
            #[cfg(target_arch = "x86_64")]
            (_, Form::Tiles(parts)) => super::amx::run(self, parts),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx, form) => self.tiles(form == Form::Pairs),
            (isa, _) => isa.vectorize(self),
        }
    }

    /// All tiles, with AVX-512.
    #[cfg(target_arch = "x86_64")]
    fn tiles(self, pairs: bool) {
        use avx512::{LANES, Operands, ROWS, VECTORS, tile};

        let (m, n, depth) = self.size;
        let Left { row: a_row, col: a_col, .. } = self.a;
        let (b_row, c_row) = (self.b.1, self.c.1);
        let (a, b, c) = (self.a.data.as_ptr(), self.b.0.as_ptr(), self.c.0.as_mut_ptr());
        let add = self.into == Into::Add;
        for j in (0..n).step_by(VECTORS * LANES) {
            for i in (0..m).step_by(ROWS) {
                let size = ((m - i).min(ROWS), ((n - j) / LANES).min(VECTORS));
                let (a, b, c) = (a.wrapping_add(i * a_row), b.wrapping_add(j), c.wrapping_add(i * c_row + j));
                let operands = Operands { depth, a, a_row, a_col, b, b_row, c, c_row, add, ahead: 0 };
                #[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
                // SAFETY: `Isa::choose` and `Path::new` give only what the processor has; `run` has checked all elements of the
                // three matrices, of which this is a part.
                unsafe {
                    tile(size, pairs, operands);
                }
            }
        }
    }

    /// Rows `i .. i + R` and vectors `V` from column `j` on, held in registers.
    #[inline(always)]
    fn micro<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, i: usize, j: usize) {
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        let (a_row, a_col, b_row) = (self.a.row, self.a.col, self.b.1);
        let mut a = self.a.data.as_ptr().cast::<f32>().wrapping_add(i * a_row);
        let mut b = self.b.0.as_ptr().cast::<f32>().wrapping_add(j);
        for _ in 0..self.size.2 {
            let mut vectors = [simd.splat_f32s(0.0); V];
            for (v, vector) in vectors.iter_mut().enumerate() {
                #[allow(unsafe_code, reason = "bounds checks would double the instructions of this loop")]
                // SAFETY: `run` has checked that all `k` rows of `b` hold `n` columns; `j` plus `V` vectors stay below `n`.
                // The read is unaligned, and every bit pattern is a vector of f32.
                unsafe {
                    *vector = b.wrapping_add(v * S::F32_LANES).cast::<S::f32s>().read_unaligned();
                }
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                #[allow(unsafe_code, reason = "as above")]
                // SAFETY: `run` has checked all `m x k` elements of `a`, and `i + R <= m`.
                let factor = simd.splat_f32s(unsafe { *a.wrapping_add(r * a_row) });
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = simd.mul_add_e_f32s(factor, vector, *sum);
                }
            }
            a = a.wrapping_add(a_col);
            b = b.wrapping_add(b_row);
        }
        let (c, c_row) = (self.c.0.as_mut_ptr(), self.c.1);
        for (r, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let c = c.wrapping_add((i + r) * c_row + j + v * S::F32_LANES).cast::<S::f32s>();
                #[allow(unsafe_code, reason = "as above")]
                // SAFETY: `run` has checked all `m` rows of `n` columns of `c`, which is borrowed mutably.
                unsafe {
                    c.write_unaligned(match self.into {
                        Into::Overwrite => sum,
                        Into::Add => simd.add_f32s(c.read_unaligned(), sum),
                    });
                }
            }
        }
    }

    /// All rows of `V` vectors from column `j` on. Six rows of two vectors fill the sixteen registers of AVX2.
    #[inline(always)]
    fn panel<S: Simd, const V: usize>(&mut self, simd: S, j: usize) {
        let m = self.size.0;
        for i in (0..m).step_by(6) {
            match m - i {
                1 => self.micro::<S, 1, V>(simd, i, j),
                2 => self.micro::<S, 2, V>(simd, i, j),
                3 => self.micro::<S, 3, V>(simd, i, j),
                4 => self.micro::<S, 4, V>(simd, i, j),
                5 => self.micro::<S, 5, V>(simd, i, j),
                _ => self.micro::<S, 6, V>(simd, i, j),
            }
        }
    }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        const { assert!(PAD.is_multiple_of(S::F32_LANES), "rows are whole vectors") };
        let n = self.size.1;
        let mut j = 0;
        while j < n {
            if n - j >= 2 * S::F32_LANES {
                self.panel::<S, 2>(simd, j);
                j += 2 * S::F32_LANES;
            } else {
                self.panel::<S, 1>(simd, j);
                j += S::F32_LANES;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::factor::{
            Form, bits,
            tests::{paths, values},
        },
        *,
    };
    use crate::matmul::Isa;

    #[test]
    fn products_of_every_remainder_equal_plain_loops() {
        for (m, path) in
            (1..14).flat_map(|m| paths::<f32>(16).filter(|path| path.form == Form::F32).map(move |path| (m, path)))
        {
            for (n, k) in [(16, 1), (32, 7), (48, 20), (80, 3), (48, 0)] {
                for transposed in [false, true] {
                    let (a, b) = (values(20 * 20, 7), values(20 * 96, 5));
                    let left = if transposed { Left::new(bits(&a), 20).t() } else { Left::new(bits(&a), 20) };
                    // Small integers: exact in every order.
                    let exact = |i: usize, j: usize| -> f32 {
                        (0..k).map(|k| a[if transposed { k * 20 + i } else { i * 20 + k }] * b[k * 96 + j]).sum()
                    };
                    for (into, before) in [(Into::Overwrite, f32::NAN), (Into::Add, 5.0)] {
                        let mut c = vec![before; 13 * 96];
                        let (size, b, c_rows) = ((m, n, k), (bits(&b), 96), (&mut *c, 96));
                        Product { size, a: left, b, c: c_rows, into }.run(path);
                        for i in 0..13 {
                            for j in 0..96 {
                                let expected = match into {
                                    _ if i >= m || j >= n => before,
                                    Into::Overwrite => exact(i, j),
                                    Into::Add => 5.0 + exact(i, j),
                                };
                                let actual = c[i * 96 + j];
                                let same = actual == expected || (actual.is_nan() && expected.is_nan());
                                assert!(same, "{m} {n} {k} {transposed} {i} {j}: {actual} {expected}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "b lies in its slice")]
    fn refuses_to_read_outside() {
        let (a, b, mut c) = ([0.0; 4], [0.0; 31], [0.0; 32]);
        let (a, into) = (Left::new(bits(&a), 2), Into::Overwrite);
        let path = Path::new::<f32>(Isa::Portable, 2, 1);
        Product { size: (2, 16, 2), a, b: (bits(&b), 16), c: (&mut c, 16), into }.run(path);
    }
}
