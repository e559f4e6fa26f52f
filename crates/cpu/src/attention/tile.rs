//! Tiles and their products, on one thread.
//!
//! Tiles are small and used once, so nothing is packed that is not in its place anyway, where a general matrix product does that
//! at every call: the right factor and the result are rows of whole vectors, and the left factor is read one element at a time,
//! in rows or in columns.
//!
//! An element of a factor is an f32, or, where the processor multiplies pairs of bf16, two neighbours of the dimension summed
//! over. Both are 32 bits, and the products differ in nothing but an instruction. Where the processor has tiles of its own, AMX, a factor of
//! pairs is put in their order when it is made, once for all products that it is part of.

use half::bf16;
use pulp::{Simd, WithSimd};
use unsloth_core::{DType, FloatElement};

#[cfg(target_arch = "x86_64")]
use crate::{
    avx512,
    matmul::{Parts, Side},
};
use crate::{
    matmul::{Elements, Into, Isa, Mat},
    simd::{self, vectorised},
};

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

/// How products are computed.
#[derive(Clone, Copy)]
pub(super) struct Path {
    isa: Isa,
    /// Factors are pairs of bf16; else f32.
    pub(super) pairs: bool,
}

impl Path {
    /// The path for heads of `head_dim` elements of a type.
    pub(super) fn new<T: FloatElement>(isa: Isa, head_dim: usize) -> Self {
        // A pair must not be of two heads.
        Self { isa, pairs: isa.multiplies_pairs() && T::DTYPE == DType::BF16 && head_dim.is_multiple_of(2) }
    }

    /// Factors are in the order of AMX.
    fn has_tiles(self) -> bool {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => self.pairs,
            _ => false,
        }
    }

    /// Elements of a factor for so many of the dimension summed over.
    pub(super) fn depth(self, len: usize) -> usize {
        if self.pairs { len.div_ceil(2) } else { len }
    }

    /// A tile `[rows, cols]` of f32 as the right factor of a product that sums over its rows; pairs are written to `to`.
    pub(super) fn by_rows<'a>(
        self,
        tile: &'a [f32],
        (rows, cols): (usize, usize),
        to: &'a mut [f32],
    ) -> (&'a [u32], usize) {
        let (width, cols) = (stride(cols), padded(cols));
        if !self.pairs {
            return (bits(tile), width);
        }
        #[cfg(target_arch = "x86_64")]
        if self.has_tiles() {
            return (packed(Side::Right, Mat::new(Elements::F32(tile), rows, cols, width).t(), to), 0);
        }
        let nothing = [0.0; super::Q_BLOCK];
        let to = bytemuck::cast_slice_mut::<f32, u32>(to);
        for (row, to) in (0..rows).step_by(2).zip(to.chunks_exact_mut(width)) {
            let low = &tile[row * width..][..cols];
            let high = if row + 1 < rows { &tile[(row + 1) * width..][..cols] } else { &nothing[..cols] };
            self.narrow_pairs((low, high), &mut to[..cols]);
        }
        (to, width)
    }

    /// A tile `[rows, cols]` of f32 as the left factor of a product that sums over its columns; pairs are written to `to`.
    pub(super) fn by_cols<'a>(self, tile: &'a [f32], (rows, cols): (usize, usize), to: &'a mut [f32]) -> Left<'a> {
        let width = stride(cols);
        if !self.pairs {
            return Left::new(bits(tile), width);
        }
        #[cfg(target_arch = "x86_64")]
        if self.has_tiles() {
            return Left::packed(packed(Side::Left, Mat::new(Elements::F32(tile), rows, cols, width), to));
        }
        let cols = padded(cols);
        let halves = bytemuck::cast_slice_mut::<f32, bf16>(&mut *to);
        for (from, to) in tile.chunks_exact(width).zip(halves.chunks_exact_mut(width)).take(rows) {
            self.narrow(&from[..cols], &mut to[..cols]);
        }
        Left::new(bits(to), width / 2)
    }

    fn narrow(self, from: &[f32], to: &mut [bf16]) {
        debug_assert!(self.pairs, "only pairs are narrowed");
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
        // SAFETY: pairs are for processors that have AVX-512 with bf16 (`Path::new`, `Isa::choose`).
        unsafe {
            avx512::narrow(from, to);
        }
        #[cfg(not(target_arch = "x86_64"))]
        simd::narrow(from, to);
    }

    fn narrow_pairs(self, (low, high): (&[f32], &[f32]), to: &mut [u32]) {
        debug_assert!(self.pairs, "only pairs are narrowed");
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
        // SAFETY: as in `narrow`.
        unsafe {
            avx512::narrow_pairs(low, high, to);
        }
        #[cfg(not(target_arch = "x86_64"))]
        for ((to, low), high) in to.iter_mut().zip(low).zip(high) {
            *to = pair(bf16::from_f32(*low), bf16::from_f32(*high));
        }
    }
}

/// The lines of a matrix, rounded to bf16, in the order of AMX.
#[cfg(target_arch = "x86_64")]
fn packed<'a>(side: Side, from: Mat<'_>, to: &'a mut [f32]) -> &'a [u32] {
    Parts::rounded(side).pack_all(&from, to);
    bits(to)
}

/// The bits of f32 elements.
pub(super) fn bits(values: &[f32]) -> &[u32] {
    bytemuck::cast_slice(values)
}

fn pair(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
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

    /// Rows `first ..` as they lie in memory, as pairs of channels.
    fn pairs(&self, first: usize) -> Left<'a> {
        let data = bytemuck::cast_slice::<T, u32>(self.data);
        let d = self.head_dim / 2;
        Left::new(&data[((first * self.num_heads + self.head) * d).min(data.len())..], self.num_heads * d)
    }

    /// Rows `first ..` as a matrix.
    #[cfg(target_arch = "x86_64")]
    fn mat(&self, (first, rows): (usize, usize)) -> Mat<'a> {
        let row = self.num_heads * self.head_dim;
        let start = (first * row + self.head * self.head_dim).min(self.data.len());
        Mat::new(Elements::from_slice(&self.data[start..]), rows, self.head_dim, row)
    }

    /// Rows `first ..` as the left factor of a product that sums over channels; what does not lie as it has to is put in `tile`.
    pub(super) fn left<'b>(&self, path: Path, rows: (usize, usize), tile: &'b mut [f32]) -> Left<'b>
    where
        'a: 'b,
    {
        #[cfg(target_arch = "x86_64")]
        if path.has_tiles() {
            return Left::packed(packed(Side::Left, self.mat(rows), tile));
        }
        if path.pairs {
            return self.pairs(rows.0);
        }
        if T::DTYPE == DType::F32 {
            let row = self.num_heads * self.head_dim;
            let data = bytemuck::cast_slice::<T, u32>(self.data);
            return Left::new(&data[(rows.0 * row + self.head * self.head_dim).min(data.len())..], row);
        }
        self.load(rows.0, rows.1, tile);
        Left::new(bits(tile), stride(self.head_dim))
    }

    /// Rows `first ..` as the right factor of a product that sums over them, in `tile`.
    pub(super) fn right<'b>(
        &self,
        path: Path,
        (first, rows): (usize, usize),
        tile: &'b mut [f32],
    ) -> (&'b [u32], usize) {
        let (wide, d) = (stride(self.head_dim), self.head_dim);
        if !path.pairs {
            self.load(first, rows, tile);
            return (bits(tile), wide);
        }
        #[cfg(target_arch = "x86_64")]
        if path.has_tiles() {
            return (packed(Side::Right, self.mat((first, rows)).t(), tile), 0);
        }
        let pairs = bytemuck::cast_slice_mut::<f32, u32>(&mut *tile);
        for (row, to) in (0..rows).step_by(2).zip(pairs.chunks_exact_mut(wide)) {
            let low = bytemuck::cast_slice::<T, bf16>(self.row(first + row));
            let high = if row + 1 < rows { bytemuck::cast_slice(self.row(first + row + 1)) } else { low };
            let mask = if row + 1 < rows { u32::MAX } else { 0xFFFF };
            vectorised(
                #[inline(always)]
                || {
                    for (to, (low, high)) in to[..d].iter_mut().zip(low.iter().zip(high)) {
                        *to = pair(*low, *high) & mask;
                    }
                },
            );
            to[d..].fill(0);
        }
        (bits(tile), wide)
    }

    /// Channels of rows `first ..` as the left factor of a product that sums over rows, in `tile`.
    pub(super) fn channels<'b>(&self, path: Path, rows: (usize, usize), tile: &'b mut [f32]) -> Left<'b> {
        #[cfg(target_arch = "x86_64")]
        if path.has_tiles() {
            return Left::packed(packed(Side::Left, self.mat(rows).t(), tile));
        }
        let (data, stride) = self.right(path, rows, tile);
        Left::new(data, stride).t()
    }

    /// [`Self::left`] and [`Self::channels`], both in `tile`.
    pub(super) fn both<'b>(&self, path: Path, rows: (usize, usize), tile: &'b mut [f32]) -> [Left<'b>; 2]
    where
        'a: 'b,
    {
        if !path.pairs && T::DTYPE != DType::F32 {
            let left = self.left(path, rows, tile);
            return [left, left.t()];
        }
        let len = rows.1.next_multiple_of(PAD) * self.head_dim.div_ceil(2).next_multiple_of(PAD);
        let (of_rows, tile) = tile.split_at_mut(if path.has_tiles() { len } else { 0 });
        [self.left(path, rows, of_rows), self.channels(path, rows, tile)]
    }

    /// Rows `first ..` as columns, the right factor of a product that sums over channels. Unless factors are pairs, `tile` has them, as
    /// [`Self::load`] leaves them.
    pub(super) fn columns<'b>(
        &self,
        path: Path,
        (first, rows): (usize, usize),
        tile: &[f32],
        to: &'b mut [f32],
    ) -> (&'b [u32], usize) {
        if !path.pairs {
            transpose(tile, (rows, self.head_dim), to);
            return (bits(to), stride(rows));
        }
        #[cfg(target_arch = "x86_64")]
        if path.has_tiles() {
            return (packed(Side::Right, self.mat((first, rows)), to), 0);
        }
        let (from, pairs) = (self.pairs(first), bytemuck::cast_slice_mut::<f32, u32>(&mut *to));
        for (j, to) in pairs.chunks_exact_mut(stride(rows)).take(self.head_dim / 2).enumerate() {
            for (i, to) in to[..rows].iter_mut().enumerate() {
                *to = from.data[i * from.row + j];
            }
            to[rows..].fill(0);
        }
        (bits(to), stride(rows))
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
    pub(super) data: &'a [u32],
    pub(super) row: usize,
    pub(super) col: usize,
}

impl<'a> Left<'a> {
    pub(super) fn new(data: &'a [u32], stride: usize) -> Self {
        Self { data, row: stride, col: 1 }
    }

    /// In the order of AMX.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn packed(data: &'a [u32]) -> Self {
        Self { data, row: 0, col: 0 }
    }

    /// The transpose, without moving data, of what is not in the order of AMX.
    pub(super) fn t(self) -> Self {
        Self { row: self.col, col: self.row, ..self }
    }
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
        match path.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx if path.pairs => super::amx::run(self),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => self.tiles(path.pairs),
            isa => isa.vectorize(self),
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
        super::{K_BLOCK, Q_BLOCK},
        *,
    };

    fn paths<T: FloatElement>(head_dim: usize) -> impl Iterator<Item = Path> {
        Isa::available().map(move |isa| Path::new::<T>(isa, head_dim))
    }

    fn values(len: usize, modulus: usize) -> Vec<f32> {
        (0..len).map(|i| (i % modulus) as f32 - 3.0).collect()
    }

    #[test]
    fn products_of_every_remainder_equal_plain_loops() {
        for (m, path) in (1..14).flat_map(|m| paths::<f32>(16).map(move |path| (m, path))) {
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
        let path = Path::new::<f32>(Isa::Portable, 2);
        Product { size: (2, 16, 2), a, b: (bits(&b), 16), c: (&mut c, 16), into }.run(path);
    }

    /// Each way from rows in memory or a tile to a factor, in every form, for odd and even numbers of rows.
    #[test]
    fn factors_of_every_path_equal_plain_loops() {
        const KEYS: usize = 9;
        let bf16s = |values: Vec<f32>| -> Vec<bf16> { values.into_iter().map(bf16::from_f32).collect() };
        for (rows, d) in [1, 2, 5, 17].into_iter().flat_map(|rows| [1, 2, 24].map(|d| (rows, d))) {
            let (q, k) = (bf16s(values((rows + 1) * 2 * d, 7)), bf16s(values((KEYS + 1) * 2 * d, 5)));
            let head = |data| Head { data, num_heads: 2, head: 1, head_dim: d };
            let at = |data: &[bf16], i: usize, c: usize| data[((i + 1) * 2 + 1) * d + c].to_f32();
            let score = |j: usize, i: usize| -> f32 { (0..d).map(|c| at(&k, j, c) * at(&q, i, c)).sum() };
            let (wide, width, padding) = (stride(d), stride(rows), padded(rows));
            for path in paths::<bf16>(d) {
                let tile = |rows: usize, cols: usize| vec![f32::NAN; rows * cols];
                let (mut a, mut b) = (tile(Q_BLOCK, wide), tile(K_BLOCK, wide));
                let mut columns = tile(padded(d), width);
                head(&q[..]).load(1, rows, &mut a);
                let q_columns = head(&q[..]).columns(path, (1, rows), &a, &mut columns);
                let [left, channels] = head(&k[..]).both(path, (1, KEYS), &mut b);
                let (mut scores, into) = (tile(KEYS, width), Into::Overwrite);
                let size = (KEYS, padding, path.depth(d));
                Product { size, a: left, b: q_columns, c: (&mut scores, width), into }.run(path);
                for (j, i) in (0..KEYS).flat_map(|j| (0..rows).map(move |i| (j, i))) {
                    assert_eq!(scores[j * width + i], score(j, i), "scores: {rows} {d} {j} {i}");
                }
                let mut pairs = tile(K_BLOCK / 2, width);
                let (mut by_queries, mut by_keys) = (tile(d, width), tile(KEYS, wide));
                let size = (d, padding, path.depth(KEYS));
                let b = path.by_rows(&scores, (KEYS, rows), &mut pairs);
                Product { size, a: channels, b, c: (&mut by_queries, width), into }.run(path);
                let queries = head(&q[..]).right(path, (1, rows), &mut a);
                let left = path.by_cols(&scores, (KEYS, rows), &mut pairs);
                let size = (KEYS, padded(d), path.depth(rows));
                Product { size, a: left, b: queries, c: (&mut by_keys, wide), into }.run(path);
                for c in 0..d {
                    for i in 0..rows {
                        let exact: f32 = (0..KEYS).map(|j| score(j, i) * at(&k, j, c)).sum();
                        assert_eq!(by_queries[c * width + i], exact, "by rows: {rows} {d} {i} {c}");
                    }
                    for j in 0..KEYS {
                        let exact: f32 = (0..rows).map(|i| score(j, i) * at(&q, i, c)).sum();
                        assert_eq!(by_keys[j * wide + c], exact, "by columns: {rows} {d} {j} {c}");
                    }
                }
            }
        }
    }
}
