//! Factors of products, from rows of a head as they lie in memory, or from tiles.
//!
//! An element of a factor is an f32, or, where the processor multiplies pairs of bf16, two neighbours of the dimension summed
//! over. Both are 32 bits, and the products differ in nothing but an instruction. Where the processor has tiles of its own, AMX, a factor of
//! pairs is put in their order when it is made, once for all products that it is part of.

use half::bf16;
use unsloth_core::{DType, FloatElement};

use super::{
    Q_BLOCK,
    tile::{padded, stride},
};
#[cfg(target_arch = "x86_64")]
use crate::{
    avx512,
    matmul::{Elements, Mat, Parts, Side},
};
use crate::{
    matmul::Isa,
    simd::{self, vectorised},
};

/// How products are computed.
#[derive(Clone, Copy)]
pub(super) struct Path {
    pub(super) isa: Isa,
    pub(super) form: Form,
}

/// What factors are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    F32,
    /// Pairs of bf16.
    Pairs,
    /// In the order of AMX, in so many parts of bf16.
    #[cfg(target_arch = "x86_64")]
    Tiles(usize),
}

/// Fewest queries for which keys and values are worth splitting in parts.
const MANY_QUERIES: usize = 128;

/// 32-bit elements of a packed factor of any number of parts.
fn packed_len(lines: usize, depth: usize) -> usize {
    const MOST_PARTS: usize = 3;
    MOST_PARTS * padded(lines) * padded(depth.div_ceil(2))
}

/// Room for a factor of rows of `d` channels, in any form: by rows or by channels.
pub(super) fn factor_len(rows: usize, d: usize) -> usize {
    (rows * stride(d)).max(packed_len(rows, d)).max(packed_len(d, rows))
}

/// Room for a factor of columns of `d` channels.
pub(super) fn columns_len(rows: usize, d: usize) -> usize {
    (d * stride(rows)).max(packed_len(rows, d))
}

/// Room for [`Head::both`].
pub(super) fn both_len(rows: usize, d: usize) -> usize {
    (rows * stride(d)).max(packed_len(rows, d) + packed_len(d, rows))
}

/// Room for a factor of a tile `[rows, cols]`, in any form but as it lies.
pub(super) fn tile_len(rows: usize, cols: usize) -> usize {
    (rows.div_ceil(2) * stride(cols)).max(packed_len(rows, cols)).max(packed_len(cols, rows))
}

impl Path {
    /// The path for heads of `head_dim` elements of a type.
    pub(super) fn new<T: FloatElement>(isa: Isa, head_dim: usize, num_queries: usize) -> Self {
        let is_narrow = T::DTYPE == DType::BF16;
        let form = match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx if is_narrow => Form::Tiles(1),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx if num_queries >= MANY_QUERIES => Form::Tiles(3),
            // A pair must not be of two heads.
            _ if isa.multiplies_pairs() && is_narrow && head_dim.is_multiple_of(2) => Form::Pairs,
            _ => Form::F32,
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (num_queries, MANY_QUERIES);
        Self { isa, form }
    }

    /// Elements of a factor for so many of the dimension summed over.
    pub(super) fn depth(self, len: usize) -> usize {
        if self.form == Form::F32 { len } else { len.div_ceil(2) }
    }

    /// A tile `[rows, cols]` of f32 as the right factor of a product that sums over its rows; pairs are written to `to`.
    pub(super) fn by_rows<'a>(
        self,
        tile: &'a [f32],
        (rows, cols): (usize, usize),
        to: &'a mut [f32],
    ) -> (&'a [u32], usize) {
        let (width, cols) = (stride(cols), padded(cols));
        match self.form {
            Form::F32 => return (bits(tile), width),
            Form::Pairs => {}
            #[cfg(target_arch = "x86_64")]
            Form::Tiles(parts) => {
                return (packed((parts, Side::Right), Mat::new(Elements::F32(tile), rows, cols, width).t(), to), 0);
            }
        }
        let nothing = [0.0; Q_BLOCK];
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
        match self.form {
            Form::F32 => return Left::new(bits(tile), width),
            Form::Pairs => {}
            #[cfg(target_arch = "x86_64")]
            Form::Tiles(parts) => {
                return Left::packed(packed((parts, Side::Left), Mat::new(Elements::F32(tile), rows, cols, width), to));
            }
        }
        let cols = padded(cols);
        let halves = bytemuck::cast_slice_mut::<f32, bf16>(&mut *to);
        for (from, to) in tile.chunks_exact(width).zip(halves.chunks_exact_mut(width)).take(rows) {
            self.narrow(&from[..cols], &mut to[..cols]);
        }
        Left::new(bits(to), width / 2)
    }

    fn narrow(self, from: &[f32], to: &mut [bf16]) {
        debug_assert!(self.form == Form::Pairs, "only pairs are narrowed");
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
        debug_assert!(self.form == Form::Pairs, "only pairs are narrowed");
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

/// The lines of a matrix in the order of AMX.
#[cfg(target_arch = "x86_64")]
fn packed<'a>((parts, side): (usize, Side), from: Mat<'_>, to: &'a mut [f32]) -> &'a [u32] {
    Parts::first(parts, side).pack_all(&from, to);
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
        match path.form {
            #[cfg(target_arch = "x86_64")]
            Form::Tiles(parts) => Left::packed(packed((parts, Side::Left), self.mat(rows), tile)),
            Form::Pairs => self.pairs(rows.0),
            Form::F32 if T::DTYPE == DType::F32 => {
                let row = self.num_heads * self.head_dim;
                let data = bytemuck::cast_slice::<T, u32>(self.data);
                Left::new(&data[(rows.0 * row + self.head * self.head_dim).min(data.len())..], row)
            }
            Form::F32 => {
                self.load(rows.0, rows.1, tile);
                Left::new(bits(tile), stride(self.head_dim))
            }
        }
    }

    /// Rows `first ..` as the right factor of a product that sums over them, in `tile`.
    pub(super) fn right<'b>(
        &self,
        path: Path,
        (first, rows): (usize, usize),
        tile: &'b mut [f32],
    ) -> (&'b [u32], usize) {
        let (wide, d) = (stride(self.head_dim), self.head_dim);
        match path.form {
            #[cfg(target_arch = "x86_64")]
            Form::Tiles(parts) => return (packed((parts, Side::Right), self.mat((first, rows)).t(), tile), 0),
            Form::Pairs => {}
            Form::F32 => {
                self.load(first, rows, tile);
                return (bits(tile), wide);
            }
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
        if let Form::Tiles(parts) = path.form {
            return Left::packed(packed((parts, Side::Left), self.mat(rows).t(), tile));
        }
        let (data, stride) = self.right(path, rows, tile);
        Left::new(data, stride).t()
    }

    /// [`Self::left`] and [`Self::channels`], both in `tile`.
    pub(super) fn both<'b>(&self, path: Path, rows: (usize, usize), tile: &'b mut [f32]) -> [Left<'b>; 2]
    where
        'a: 'b,
    {
        if path.form == Form::F32 && T::DTYPE != DType::F32 {
            let left = self.left(path, rows, tile);
            return [left, left.t()];
        }
        // What is read where it lies needs no room.
        let lies = matches!(path.form, Form::F32 | Form::Pairs);
        let (of_rows, tile) = tile.split_at_mut(if lies { 0 } else { packed_len(rows.1, self.head_dim) });
        [self.left(path, rows, of_rows), self.channels(path, rows, tile)]
    }

    /// Rows `first ..` as columns, the right factor of a product that sums over channels. Where factors are f32, `tile` has them, as
    /// [`Self::load`] leaves them.
    pub(super) fn columns<'b>(
        &self,
        path: Path,
        (first, rows): (usize, usize),
        tile: &[f32],
        to: &'b mut [f32],
    ) -> (&'b [u32], usize) {
        match path.form {
            #[cfg(target_arch = "x86_64")]
            Form::Tiles(parts) => return (packed((parts, Side::Right), self.mat((first, rows)), to), 0),
            Form::Pairs => {}
            Form::F32 => {
                transpose(tile, (rows, self.head_dim), to);
                return (bits(to), stride(rows));
            }
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

#[cfg(test)]
pub(super) mod tests {
    use super::{super::tile::Product, *};
    use crate::matmul::Into;

    pub(in super::super) fn paths<T: FloatElement>(head_dim: usize) -> impl Iterator<Item = Path> {
        Isa::available().flat_map(move |isa| [1, MANY_QUERIES].map(|many| Path::new::<T>(isa, head_dim, many)))
    }

    pub(in super::super) fn values(len: usize, modulus: usize) -> Vec<f32> {
        (0..len).map(|i| (i % modulus) as f32 - 3.0).collect()
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
                let tile = |len: usize| vec![f32::NAN; len];
                let (mut a, mut b) = (tile(factor_len(rows, d)), tile(both_len(KEYS, d)));
                let mut columns = tile(columns_len(rows, d));
                head(&q[..]).load(1, rows, &mut a);
                let q_columns = head(&q[..]).columns(path, (1, rows), &a, &mut columns);
                let [left, channels] = head(&k[..]).both(path, (1, KEYS), &mut b);
                let (mut scores, into) = (tile(KEYS * width), Into::Overwrite);
                let size = (KEYS, padding, path.depth(d));
                Product { size, a: left, b: q_columns, c: (&mut scores, width), into }.run(path);
                for (j, i) in (0..KEYS).flat_map(|j| (0..rows).map(move |i| (j, i))) {
                    assert_eq!(scores[j * width + i], score(j, i), "scores: {rows} {d} {j} {i}");
                }
                let mut pairs = tile(tile_len(KEYS, rows));
                let (mut by_queries, mut by_keys) = (tile(d * width), tile(KEYS * wide));
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
