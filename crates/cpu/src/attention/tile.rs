//! Tiles of f32 and their products, on one thread.
//!
//! Tiles are small and used once, so nothing is packed and nothing is allocated, where a general matrix product does both at
//! every call: the right factor and the result are rows of whole vectors, and the left factor is read one element at a time, in
//! rows or in columns.

use pulp::{Simd, WithSimd};
use unsloth_core::FloatElement;

use crate::{matmul::Into, simd};

/// Every vector width divides it.
const PAD: usize = 16;

/// Columns of a row filled up to whole vectors.
pub(super) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(PAD)
}

/// Distance of the rows of a tile. Without the extra vector, rows of 64 or 128 channels would share a few sets of the cache.
pub(super) fn stride(cols: usize) -> usize {
    padded(cols) + PAD
}

/// The rows of one head in `[tokens, heads, head_dim]`.
#[derive(Clone, Copy)]
pub(super) struct Head<'a, T> {
    pub(super) data: &'a [T],
    pub(super) num_heads: usize,
    pub(super) head: usize,
    pub(super) head_dim: usize,
}

impl<'a, T: FloatElement> Head<'a, T> {
    pub(super) fn row(&self, token: usize) -> &'a [T] {
        &self.data[(token * self.num_heads + self.head) * self.head_dim..][..self.head_dim]
    }

    /// Copies rows `first ..` to the rows of a tile; what fills a row up is zero.
    pub(super) fn load(&self, first: usize, rows: usize, tile: &mut [f32]) {
        let (width, d) = (stride(self.head_dim), self.head_dim);
        for (i, to) in tile.chunks_exact_mut(width).take(rows).enumerate() {
            simd::widen(self.row(first + i), &mut to[..d]);
            to[d..].fill(0.0);
        }
    }
}

/// `to` = the transpose of `rows x cols` elements of a tile; what fills its rows up is zero.
pub(super) fn transpose(from: &[f32], (rows, cols): (usize, usize), to: &mut [f32]) {
    let (from_stride, to_stride) = (stride(cols), stride(rows));
    for (j, to) in to.chunks_exact_mut(to_stride).take(cols).enumerate() {
        for (i, to) in to[..rows].iter_mut().enumerate() {
            *to = from[i * from_stride + j];
        }
        to[rows..].fill(0.0);
    }
}

/// A left factor: element `(i, k)` is at `i * row + k * col`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    data: &'a [f32],
    row: usize,
    col: usize,
}

impl<'a> Left<'a> {
    pub(super) fn new(data: &'a [f32], stride: usize) -> Self {
        Self { data, row: stride, col: 1 }
    }

    /// The transpose, without moving data.
    pub(super) fn t(self) -> Self {
        Self { row: self.col, col: self.row, ..self }
    }
}

/// `c = alpha * a b`, or `c += alpha * a b`.
pub(super) struct Product<'a> {
    /// Rows of `c`, columns of `c`, and the dimension summed over. Columns count what fills the rows up.
    pub(super) size: (usize, usize, usize),
    pub(super) alpha: f32,
    pub(super) a: Left<'a>,
    /// Right factor and the distance of its rows.
    pub(super) b: (&'a [f32], usize),
    /// Result and the distance of its rows.
    pub(super) c: (&'a mut [f32], usize),
    pub(super) into: Into,
}

impl Product<'_> {
    pub(super) fn run(self) {
        let (m, n, k) = self.size;
        if m == 0 || n == 0 {
            return;
        }
        let last = |count: usize, stride: usize| count.saturating_sub(1) * stride;
        assert!(n.is_multiple_of(PAD), "rows are whole vectors");
        assert!(k == 0 || last(m, self.a.row) + last(k, self.a.col) < self.a.data.len(), "a lies in its slice");
        assert!(k == 0 || last(k, self.b.1) + n <= self.b.0.len(), "b lies in its slice");
        assert!(last(m, self.c.1) + n <= self.c.0.len(), "c lies in its slice");
        pulp::Arch::new().dispatch(self);
    }

    /// Rows `i .. i + R` and vectors `V` from column `j` on, held in registers.
    #[inline(always)]
    fn micro<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, i: usize, j: usize) {
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        let (a_row, a_col, b_row) = (self.a.row, self.a.col, self.b.1);
        let mut a = self.a.data.as_ptr().wrapping_add(i * a_row);
        let mut b = self.b.0.as_ptr().wrapping_add(j);
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
        let alpha = simd.splat_f32s(self.alpha);
        let (c, c_row) = (self.c.0.as_mut_ptr(), self.c.1);
        for (r, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let c = c.wrapping_add((i + r) * c_row + j + v * S::F32_LANES).cast::<S::f32s>();
                #[allow(unsafe_code, reason = "as above")]
                // SAFETY: `run` has checked all `m` rows of `n` columns of `c`, which is borrowed mutably.
                unsafe {
                    c.write_unaligned(match self.into {
                        Into::Overwrite => simd.mul_f32s(alpha, sum),
                        Into::Add => simd.mul_add_e_f32s(alpha, sum, c.read_unaligned()),
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
    use super::*;

    #[test]
    fn products_of_every_remainder_equal_plain_loops() {
        let values =
            |len: usize, modulus: usize| -> Vec<f32> { (0..len).map(|i| (i % modulus) as f32 - 3.0).collect() };
        for m in 1..14 {
            for (n, k) in [(16, 1), (32, 7), (48, 20), (48, 0)] {
                for transposed in [false, true] {
                    let (a, b) = (values(20 * 20, 7), values(20 * 64, 5));
                    let left = if transposed { Left::new(&a, 20).t() } else { Left::new(&a, 20) };
                    // Small integers: exact in every order.
                    let exact = |i: usize, j: usize| -> f32 {
                        (0..k).map(|k| a[if transposed { k * 20 + i } else { i * 20 + k }] * b[k * 64 + j]).sum()
                    };
                    for (into, before) in [(Into::Overwrite, f32::NAN), (Into::Add, 5.0)] {
                        let mut c = vec![before; 13 * 64];
                        Product { size: (m, n, k), alpha: 2.0, a: left, b: (&b, 64), c: (&mut c, 64), into }.run();
                        for i in 0..13 {
                            for j in 0..64 {
                                let expected = match into {
                                    _ if i >= m || j >= n => before,
                                    Into::Overwrite => 2.0 * exact(i, j),
                                    Into::Add => 5.0 + 2.0 * exact(i, j),
                                };
                                let actual = c[i * 64 + j];
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
        let (a, into) = (Left::new(&a, 2), Into::Overwrite);
        Product { size: (2, 16, 2), alpha: 1.0, a, b: (&b, 16), c: (&mut c, 16), into }.run();
    }

    #[test]
    fn transposes_and_fills_up_with_zeros() {
        let from: Vec<f32> = (0..3 * stride(5)).map(|i| i as f32).collect();
        let mut to = vec![f32::NAN; 5 * stride(3)];
        transpose(&from, (3, 5), &mut to);
        for (j, row) in to.chunks_exact(stride(3)).enumerate() {
            assert_eq!(row[..3], [j as f32, (stride(5) + j) as f32, (2 * stride(5) + j) as f32]);
            assert!(row[3..].iter().all(|&x| x == 0.0));
        }
    }
}
