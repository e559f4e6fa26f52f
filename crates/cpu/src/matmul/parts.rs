//! Factors as sums of bf16, in the order in which tiles of AMX take them.
//!
//! An f32 is the sum of three bf16, each the rest after the ones before it, rounded to nearest; an f16 of two; so products of bf16
//! make those of wider factors. A part is half a unit in the last place of the one before it or less, 2^-8 of it, and nothing is left
//! after three. Infinities and f32 above the largest bf16 have no finite rest: what they meet is not finite either.
//!
//! Henry, Tang & Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
//! arXiv:1904.06376.

use std::{arch::x86_64::*, mem::transmute, ops::Range};

use half::{bf16, f16};

use super::{Elements, Mat, pack::prefetch};
use crate::{
    amx::{BLOCK, DEPTH, SIDE, TILE},
    avx512::transposed,
};

/// Which factor of a product it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// A row of a tile is 32 neighbours of a line.
    Left,
    /// A row of a tile is a pair of neighbours of each of sixteen lines.
    Right,
}

/// How a factor is packed: block after block of up to 32 lines, in each step after step of the dimension summed over, in each part
/// after part, in each one tile for every sixteen lines.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    /// Parts of an element.
    pub(super) count: usize,
    side: Side,
    /// What the elements are multiplied by first.
    factor: f32,
}

/// Bytes of a line that are asked for before they are read.
const AHEAD: usize = 1024;

impl Parts {
    pub(super) fn new(from: &Mat<'_>, side: Side, factor: f32) -> Self {
        let count = match from.data {
            Elements::BF16(_) if factor == 1.0 => 1,
            Elements::F16(_) if factor == 1.0 => 2,
            _ => 3,
        };
        Self { count, side, factor }
    }

    /// As many parts of each element: a single one is the element rounded to bf16, three are an f32.
    pub(crate) fn first(count: usize, side: Side) -> Self {
        Self { count, side, factor: 1.0 }
    }

    /// 32-bit elements of a line for so many elements.
    pub(super) fn length(self, depth: usize) -> usize {
        self.count * depth.div_ceil(DEPTH) * SIDE
    }

    /// Packs all lines of a matrix.
    pub(crate) fn pack_all(self, from: &Mat<'_>, to: &mut [f32]) {
        self.pack(from, 0..from.rows, 0..from.cols, to);
    }

    /// Packs elements `depth` of lines `lines`. What fills a tile up along the dimension summed over is zero; lines that fill up a
    /// tile are arbitrary, since they can only meet sums that nobody stores.
    pub(super) fn pack(self, from: &Mat<'_>, lines: Range<usize>, depth: Range<usize>, to: &mut [f32]) {
        if lines.is_empty() || depth.is_empty() {
            return;
        }
        assert!(lines.end <= from.rows && depth.end <= from.cols, "tiles inside the matrix");
        assert!(from.lies_in(from.data.len()), "the matrix lies in its slice");
        assert!(to.len() >= lines.len().next_multiple_of(SIDE) * self.length(depth.len()), "tiles are whole");
        let start = lines.start * from.row_stride + depth.start * from.col_stride;
        let place = Place {
            parts: self,
            lines: lines.len(),
            depth: depth.len(),
            by_lines: from.row_stride != 1,
            stride: if from.row_stride != 1 { from.row_stride } else { from.col_stride },
            to: to.as_mut_ptr().cast(),
        };
        #[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
        // SAFETY: only the path of AMX packs tiles, which has AVX-512 with bf16 (`Isa::choose`); the extents are asserted above.
        unsafe {
            match from.data {
                Elements::BF16(data) if self.count == 1 => place.fill::<Narrow>(data.as_ptr().wrapping_add(start)),
                Elements::BF16(data) => place.fill::<Wide<bf16>>(data.as_ptr().wrapping_add(start)),
                Elements::F16(data) => place.fill::<Wide<f16>>(data.as_ptr().wrapping_add(start)),
                Elements::F32(data) => place.fill::<Wide<f32>>(data.as_ptr().wrapping_add(start)),
            }
        }
    }
}

/// Where a factor lies and its tiles belong.
#[derive(Clone, Copy)]
struct Place {
    parts: Parts,
    lines: usize,
    depth: usize,
    /// Elements of a line are neighbours; else those of several lines are.
    by_lines: bool,
    /// Distance of neighbours in the other direction.
    stride: usize,
    to: *mut u32,
}

/// Splits 32 elements, two vectors of sixteen, and writes each part where it belongs.
trait Split {
    type Element;

    /// Neighbours, of which the mask says which are there.
    ///
    /// # Safety
    /// The processor has AVX-512 with bf16; elements of the mask can be read, and sixteen for each part be written.
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    unsafe fn neighbours(from: *const Self::Element, mask: __mmask32, parts: Parts, to: *mut u32, part: usize);

    /// Pairs of one element of each of two rows of sixteen, of which the masks say which are there.
    ///
    /// # Safety
    /// As above.
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    unsafe fn pairs(from: [*const Self::Element; 2], masks: [__mmask16; 2], parts: Parts, to: *mut u32, part: usize);
}

/// Elements that are bf16 already.
struct Narrow;

impl Split for Narrow {
    type Element = bf16;

    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn neighbours(from: *const bf16, mask: __mmask32, _: Parts, to: *mut u32, _: usize) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(to.cast(), _mm512_maskz_loadu_epi16(mask, from.cast())) };
    }

    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn pairs(from: [*const bf16; 2], masks: [__mmask16; 2], _: Parts, to: *mut u32, _: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(masks[0], from[0].cast()));
            let high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(masks[1], from[1].cast()));
            _mm512_storeu_si512(to.cast(), _mm512_or_si512(low, _mm512_slli_epi32::<16>(high)));
        }
    }
}

/// Elements that become f32 first.
struct Wide<T>(T);

/// A storage type that is loaded as f32.
trait Load {
    /// # Safety
    /// The processor has AVX-512; elements of the mask can be read.
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512;
}

impl Load for f32 {
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }
}

impl Load for bf16 {
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        widened(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) })
    }
}

impl Load for f16 {
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) })
    }
}

/// Sixteen bf16 as f32.
#[target_feature(enable = "avx512f")]
#[inline]
fn widened(halves: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
}

impl<T: Load> Split for Wide<T> {
    type Element = T;

    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn neighbours(from: *const T, mask: __mmask32, parts: Parts, to: *mut u32, part: usize) {
        let factor = _mm512_set1_ps(parts.factor);
        // SAFETY: the caller's promise.
        let mut low = _mm512_mul_ps(factor, unsafe { T::load(from, mask as __mmask16) });
        // SAFETY: as above.
        let mut high = _mm512_mul_ps(factor, unsafe { T::load(from.wrapping_add(SIDE), (mask >> SIDE) as __mmask16) });
        for i in 0..parts.count {
            // SAFETY: two views of 64 bytes for which every pattern is valid.
            let halves = unsafe { transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) };
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_si512(to.wrapping_add(i * part).cast(), halves) };
            low = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(halves)));
            high = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64::<1>(halves)));
        }
    }

    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn pairs(from: [*const T; 2], masks: [__mmask16; 2], parts: Parts, to: *mut u32, part: usize) {
        let factor = _mm512_set1_ps(parts.factor);
        // SAFETY: the caller's promise.
        let mut low = _mm512_mul_ps(factor, unsafe { T::load(from[0], masks[0]) });
        // SAFETY: as above.
        let mut high = _mm512_mul_ps(factor, unsafe { T::load(from[1], masks[1]) });
        for i in 0..parts.count {
            // SAFETY: two views of 32 bytes for which every pattern is valid.
            let [first, second] = [low, high].map(|x| unsafe { transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)) });
            let (first, second) =
                (_mm512_cvtepu16_epi32(first), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(second)));
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_si512(to.wrapping_add(i * part).cast(), _mm512_or_si512(first, second)) };
            low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(first)));
            high = _mm512_sub_ps(high, _mm512_castsi512_ps(second));
        }
    }
}

impl Place {
    /// Steps of the dimension summed over.
    fn steps(self) -> usize {
        self.depth.div_ceil(DEPTH)
    }

    /// Tiles side by side in the block that starts at a line.
    fn across(self, first: usize) -> usize {
        (self.lines - first).min(BLOCK).div_ceil(SIDE)
    }

    /// Where the first part of a step of the sixteen lines from `first` on belongs, and how far apart parts are.
    fn tile(self, first: usize, step: usize) -> (*mut u32, usize) {
        let block = first / BLOCK * BLOCK;
        let across = self.across(block);
        let part = across * TILE;
        let start = block * self.parts.length(self.depth) + step * self.parts.count * part;
        (self.to.wrapping_add(start + (first - block) / SIDE * TILE), part)
    }

    /// # Safety
    /// The processor has AVX-512 with bf16; all elements can be read, and tiles for them be written.
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn fill<S: Split>(self, from: *const S::Element) {
        // SAFETY: the caller's promises.
        unsafe { if self.by_lines { self.lines::<S>(from) } else { self.rows::<S>(from) } }
    }

    /// Lines whose elements are neighbours: sixteen at a time, all along.
    ///
    /// # Safety
    /// As for [`Self::fill`].
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn lines<S: Split>(self, from: *const S::Element) {
        let (steps, step_bytes) = (self.steps(), DEPTH * size_of::<S::Element>());
        let ahead = (AHEAD / step_bytes).min(steps);
        for first in (0..self.lines).step_by(SIDE) {
            for step in 0..steps {
                let (to, part) = self.tile(first, step);
                let mask = u32::MAX >> (DEPTH - (self.depth - step * DEPTH).min(DEPTH));
                // What will be read: more of these lines or, towards their ends, the next ones from their starts.
                let later =
                    if step + ahead < steps { (first, step + ahead) } else { (first + SIDE, step + ahead - steps) };
                for line in 0..(self.lines - first).min(SIDE) {
                    let at = |(first, step)| from.wrapping_add((first + line) * self.stride + step * DEPTH);
                    for byte in (0..step_bytes).step_by(64) {
                        _mm_prefetch::<_MM_HINT_T1>(at(later).wrapping_byte_add(byte).cast());
                    }
                    // SAFETY: the mask is of elements of this line; a row of a tile is written for each part.
                    unsafe { S::neighbours(at((first, step)), mask, self.parts, to.wrapping_add(line * SIDE), part) };
                }
                if self.parts.side == Side::Right {
                    // SAFETY: the tiles of all parts are there.
                    unsafe { self.transpose(to, part) };
                }
            }
        }
    }

    /// Lines side by side: two elements of all lines at a time.
    ///
    /// # Safety
    /// As for [`Self::fill`].
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn rows<S: Split>(self, from: *const S::Element) {
        for step in 0..self.steps() {
            for row in 0..SIDE {
                let k = step * DEPTH + 2 * row;
                let rows = [k, k + 1].map(|k| from.wrapping_add(k * self.stride));
                for row in rows {
                    // Rows may lie pages apart, which no processor foresees.
                    let next = row.wrapping_add(DEPTH * self.stride);
                    (0..self.lines).step_by(64 / size_of::<S::Element>()).for_each(|i| prefetch(next.wrapping_add(i)));
                }
                for first in (0..self.lines).step_by(SIDE) {
                    let there = u16::MAX >> (SIDE - (self.lines - first).min(SIDE));
                    let masks = [k, k + 1].map(|k| if k < self.depth { there } else { 0 });
                    let (to, part) = self.tile(first, step);
                    let from = rows.map(|row| row.wrapping_add(first));
                    // SAFETY: the masks are of elements of these lines below the depth; a row of a tile is written for each part.
                    unsafe { S::pairs(from, masks, self.parts, to.wrapping_add(row * SIDE), part) };
                }
            }
            if self.parts.side == Side::Left {
                for first in (0..self.lines).step_by(SIDE) {
                    let (to, part) = self.tile(first, step);
                    // SAFETY: the tiles of all parts are there.
                    unsafe { self.transpose(to, part) };
                }
            }
        }
    }

    /// Transposes a tile of each part where it lies.
    ///
    /// # Safety
    /// The processor has AVX-512; the tiles can be read and written.
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn transpose(self, to: *mut u32, part: usize) {
        for tile in (0..self.parts.count).map(|i| to.wrapping_add(i * part)) {
            let mut rows = [_mm512_setzero_si512(); SIDE];
            for (i, row) in rows.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *row = unsafe { _mm512_loadu_si512(tile.wrapping_add(i * SIDE).cast()) };
            }
            for (i, row) in transposed(rows).into_iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { _mm512_storeu_si512(tile.wrapping_add(i * SIDE).cast(), row) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    /// Numbers of every magnitude that have three parts, none of which a device may take for zero.
    fn values(len: usize) -> Vec<f32> {
        let random =
            |i: usize| (i as u32).wrapping_mul(0x9E37_79B9).wrapping_add(0x7F4A_7C15).wrapping_mul(0x85EB_CA6B);
        let magnitude = |bits: u32| (bits >> 8) % 200 + 27;
        (0..len)
            .map(|i| (random(i), random(i + len)))
            .map(|(x, y)| f32::from_bits(x & 0x807F_FFFF | magnitude(y) << 23))
            .collect()
    }

    /// What tiles hold for an element: the sum of its parts, and how many there are.
    fn packed(parts: Parts, tiles: &[f32], (lines, depth): (usize, usize), (line, k): (usize, usize)) -> f64 {
        let steps = depth.div_ceil(DEPTH);
        let block = line / BLOCK * BLOCK;
        let across = (lines - block).min(BLOCK).div_ceil(SIDE);
        let (row, col) = match parts.side {
            Side::Left => (line % SIDE, k % DEPTH),
            Side::Right => (k % DEPTH / 2, 2 * (line % SIDE) + k % 2),
        };
        let halves = bytemuck::cast_slice::<f32, bf16>(tiles);
        let part = |i: usize| {
            let tile =
                block / SIDE * steps * parts.count + (k / DEPTH * parts.count + i) * across + (line - block) / SIDE;
            halves[2 * (tile * TILE + row * SIDE) + col].to_f64()
        };
        (0..parts.count).map(part).sum()
    }

    /// Parts add up to the element, exactly, wherever it lies; what fills up the dimension summed over is zero.
    #[test]
    fn parts_of_every_remainder_add_up() {
        if !Isa::available().any(|isa| isa == Isa::Avx512Bf16) {
            return;
        }
        for (lines, depth) in [(1, 1), (3, 33), (16, 32), (17, 31), (32, 64), (49, 70), (100, 129)] {
            for by_lines in [true, false] {
                let (rows, cols) = if by_lines { (lines + 2, depth + 3) } else { (depth + 3, lines + 2) };
                let wide = values(rows * cols);
                let half: Vec<f16> =
                    wide.iter().enumerate().map(|(i, x)| f16::from_f32(x.signum() * i as f32 / 3.0)).collect();
                let narrow: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
                for (data, count) in
                    [(Elements::F32(&wide), 3), (Elements::F16(&half), 2), (Elements::BF16(&narrow), 1)]
                {
                    let mat = Mat::new(data, rows, cols, cols);
                    let mat = if by_lines { mat } else { mat.t() };
                    let element = |line: usize, k: usize| {
                        let at = (line + 1) * mat.row_stride + (k + 1) * mat.col_stride;
                        let mut value = [0.0];
                        data.slice(at..at + 1).add_to(&mut value);
                        f64::from(value[0])
                    };
                    for side in [Side::Left, Side::Right] {
                        let parts = Parts::new(&mat, side, 1.0);
                        assert_eq!(parts.count, count);
                        let mut tiles = vec![f32::NAN; lines.next_multiple_of(SIDE) * parts.length(depth)];
                        parts.pack(&mat, 1..lines + 1, 1..depth + 1, &mut tiles);
                        for (line, k) in
                            (0..lines).flat_map(|line| (0..depth.next_multiple_of(DEPTH)).map(move |k| (line, k)))
                        {
                            let expected = if k < depth { element(line, k) } else { 0.0 };
                            let actual = packed(parts, &tiles, (lines, depth), (line, k));
                            assert_eq!(actual, expected, "{lines} {depth} {by_lines} {count} {line} {k}");
                        }
                    }
                }
            }
        }
    }

    /// A factor is multiplied in before an element is split.
    #[test]
    fn a_scaled_element_has_three_parts() {
        if !Isa::available().any(|isa| isa == Isa::Avx512Bf16) {
            return;
        }
        let narrow = [bf16::from_f32(3.0), bf16::from_f32(-0.7)];
        let mat = Mat::new(Elements::BF16(&narrow), 1, 2, 2);
        let parts = Parts::new(&mat, Side::Left, 1.1);
        let mut tiles = vec![f32::NAN; SIDE * parts.length(2)];
        parts.pack(&mat, 0..1, 0..2, &mut tiles);
        for (k, value) in narrow.iter().enumerate() {
            assert_eq!(packed(parts, &tiles, (1, 2), (0, k)), f64::from(value.to_f32() * 1.1));
        }
    }
}
