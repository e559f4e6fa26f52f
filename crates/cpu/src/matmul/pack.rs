//! Panels: lines of a factor side by side, `[depth][width]`, widened to f32 or as pairs of bf16.
//!
//! A line is a row of the left or a column of the right factor; both factors are packed by the same code.

use std::ops::Range;

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::transpose;
use super::{Elements, Mat, isa::Isa};
use crate::simd::{self, vectorised};

/// Lines that are transposed at a time.
pub(super) const LINES: usize = 8;

/// What an element of a panel is.
#[derive(Clone, Copy)]
pub(super) struct Form {
    /// Two bf16 neighbours of a line, the first in the low half; else an f32.
    pub(super) pairs: bool,
    pub(super) isa: Isa,
}

/// How lines are grouped.
#[derive(Clone, Copy)]
pub(super) struct Panels {
    /// Lines of every panel but the last.
    pub(super) lines: usize,
    /// Width of every panel but the last.
    pub(super) width: usize,
    /// The width of the last one is the smallest multiple of this that holds its lines.
    pub(super) step: usize,
}

impl Panels {
    /// First line and width of each panel.
    pub(super) fn of(self, lines: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..lines).step_by(self.lines).map(move |first| (first, self.width_of(lines - first)))
    }

    /// Width of a panel with so many lines left to pack.
    fn width_of(self, lines: usize) -> usize {
        lines.next_multiple_of(self.step).min(self.width)
    }
}

impl Form {
    /// Elements of a panel for `depth` elements of a line.
    pub(super) fn depth(self, depth: usize) -> usize {
        if self.pairs { depth.div_ceil(2) } else { depth }
    }

    /// Fills panels `[depth][width]`, one after another, with elements `depth` of lines `lines`. What fills up a panel is
    /// arbitrary, since it can only meet sums that nobody stores; half a pair is filled up with zero.
    pub(super) fn pack(self, from: &Mat<'_>, lines: Range<usize>, depth: Range<usize>, panels: Panels, to: &mut [f32]) {
        assert!(lines.end <= from.rows && depth.end <= from.cols, "panels inside the matrix");
        let start = lines.start * from.row_stride + depth.start * from.col_stride;
        let block = Block {
            lines: lines.len(),
            depth: depth.len(),
            length: self.depth(depth.len()),
            panels,
            line_stride: from.row_stride,
            step: from.col_stride,
            isa: self.isa,
        };
        match from.data {
            Elements::BF16(data) if self.pairs => block.pairs(tail(data, start), bytemuck::cast_slice_mut(to)),
            Elements::F32(data) => block.widened(tail(data, start), to),
            Elements::F16(data) => block.widened(tail(data, start), to),
            Elements::BF16(data) => block.widened(tail(data, start), to),
        }
    }
}

/// The slice from `start` on; an empty panel may start past the end.
fn tail<T>(data: &[T], start: usize) -> &[T] {
    &data[start.min(data.len())..]
}

/// A storage type whose elements a panel holds as f32.
pub(super) trait Wide: Copy {
    fn widen(self) -> f32;
    /// A run of elements.
    fn widen_run(from: &[Self], to: &mut [f32]);
    /// Eight elements.
    ///
    /// # Safety
    /// The processor has AVX2 and the rest of x86-64-v3; `from` points to eight elements.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256;
}

/// Where panels come from: element `(line, k)` is at `line * line_stride + k * step`.
#[derive(Clone, Copy)]
struct Block {
    lines: usize,
    depth: usize,
    /// Elements of a panel along the depth.
    length: usize,
    panels: Panels,
    line_stride: usize,
    step: usize,
    isa: Isa,
}

/// A panel of a [`Block`] whose lines are runs: element `(line, k)` is at `line * line_stride + k`.
#[derive(Clone, Copy)]
struct Panel {
    lines: usize,
    depth: usize,
    width: usize,
    line_stride: usize,
    isa: Isa,
}

impl Block {
    /// Calls `pack(panel, from, to)` for each panel.
    fn by_panels<T, U>(self, from: &[T], to: &mut [U], pack: impl Fn(Panel, &[T], &mut [U])) {
        let Self { depth, length, line_stride, isa, .. } = self;
        for (i, (first, width)) in self.panels.of(self.lines).enumerate() {
            let panel = Panel { lines: self.panels.lines.min(self.lines - first), depth, width, line_stride, isa };
            let to = &mut to[i * self.panels.width * length..][..width * length];
            pack(panel, &from[(first * line_stride).min(from.len())..], to);
        }
    }

    fn widened<T: Wide>(self, from: &[T], to: &mut [f32]) {
        if self.line_stride != 1 {
            return self.by_panels(from, to, Panel::transpose_widened);
        }
        vectorised(
            #[inline(always)]
            || {
                let row = |k: usize| (&from[k * self.step..][..self.lines], &[][..]);
                for start in (0..self.length).step_by(RUN) {
                    self.prefetch(from, start + RUN..start + 2 * RUN);
                    let rows = start..self.length.min(start + RUN);
                    self.distribute(rows, row, to, |row, _, to| T::widen_run(row, to));
                }
            },
        );
    }

    fn pairs(self, from: &[bf16], to: &mut [u32]) {
        if self.line_stride != 1 {
            return self.by_panels(from, to, Panel::transpose_pairs);
        }
        vectorised(
            #[inline(always)]
            || {
                let row = |k: usize| &from[k * self.step..][..self.lines];
                let whole = self.depth / 2;
                for start in (0..whole).step_by(RUN) {
                    self.prefetch(from, 2 * (start + RUN)..2 * (start + 2 * RUN));
                    let rows = start..whole.min(start + RUN);
                    self.distribute(
                        rows,
                        |k| (row(2 * k), row(2 * k + 1)),
                        to,
                        |low, high, to| {
                            to.iter_mut().zip(low).zip(high).for_each(|((to, low), high)| *to = pair(*low, *high));
                        },
                    );
                }
                self.distribute(
                    whole..self.length,
                    |k| (row(2 * k), &[][..]),
                    to,
                    |low, _, to| {
                        to.iter_mut().zip(low).for_each(|(to, low)| *to = pair(*low, bf16::ZERO));
                    },
                );
            },
        );
    }

    /// Asks for rows: they may lie pages apart, which no processor foresees. Beyond the slice that does nothing.
    #[inline(always)]
    fn prefetch<T>(self, from: &[T], rows: Range<usize>) {
        for row in rows {
            for line in (0..self.lines).step_by(64 / size_of::<T>()) {
                prefetch(from.as_ptr().wrapping_add(row * self.step + line));
            }
        }
    }

    /// Calls `fill` for some rows of each panel with what belongs there of one row or two of all lines, in runs of a length that
    /// the compiler knows.
    #[inline(always)]
    fn distribute<'a, T: 'a, U>(
        self,
        rows: Range<usize>,
        row: impl Fn(usize) -> (&'a [T], &'a [T]),
        to: &mut [U],
        fill: impl Fn(&[T], &[T], &mut [U]),
    ) {
        match self.panels.lines {
            6 => self.distribute_by::<6, T, U>(rows, row, to, fill),
            8 => self.distribute_by::<8, T, U>(rows, row, to, fill),
            16 => self.distribute_by::<16, T, U>(rows, row, to, fill),
            _ => self.distribute_by::<64, T, U>(rows, row, to, fill),
        }
    }

    #[inline(always)]
    fn distribute_by<'a, const LINES: usize, T: 'a, U>(
        self,
        rows: Range<usize>,
        row: impl Fn(usize) -> (&'a [T], &'a [T]),
        to: &mut [U],
        fill: impl Fn(&[T], &[T], &mut [U]),
    ) {
        let (panel, width) = (self.panels.width * self.length, self.panels.width);
        // The runs of one panel follow each other: rows of many panels would lie in a few sets of the cache.
        for i in 0..self.lines / LINES {
            for k in rows.clone() {
                let (low, high) = row(k);
                let (Some(low), Some(to)) =
                    (low.as_chunks::<LINES>().0.get(i), to[i * panel + k * width..].first_chunk_mut::<LINES>())
                else {
                    unreachable!("rows hold all lines, and panels are whole")
                };
                fill(low, high.as_chunks::<LINES>().0.get(i).unwrap_or(low), to);
            }
        }
        let (whole, rest) = (self.lines / LINES, self.lines % LINES);
        if rest > 0 {
            let width = self.panels.width_of(rest);
            for k in rows {
                let (low, high) = row(k);
                let start = whole * panel + k * width;
                fill(&low[whole * LINES..], high.get(whole * LINES..).unwrap_or(&[]), &mut to[start..start + rest]);
            }
        }
    }
}

/// Rows that are packed at once, while the next ones are asked for.
const RUN: usize = 8;

/// Asks for the line of the cache that holds an address, which may be any.
#[inline(always)]
pub(super) fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code, reason = "an intrinsic")]
    // SAFETY: prefetching an address reads nothing, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// [`prefetch`] of every line of some elements.
pub(crate) fn prefetch_all<T>(elements: &[T]) {
    (0..elements.len()).step_by(64 / size_of::<T>()).for_each(|i| prefetch(elements.as_ptr().wrapping_add(i)));
}

fn pair(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}

impl Panel {
    fn transpose_widened<T: Wide>(self, from: &[T], to: &mut [f32]) {
        let Self { width, line_stride, .. } = self;
        let done = self.transpose(from, to);
        for line in 0..self.lines {
            for k in done..self.depth {
                to[k * width + line] = from[line * line_stride + k].widen();
            }
        }
    }

    fn transpose_pairs(self, from: &[bf16], to: &mut [u32]) {
        let Self { width, line_stride, depth, .. } = self;
        let done = self.transpose_whole_pairs(from, to);
        for line in 0..self.lines {
            for k in done..depth.div_ceil(2) {
                let at = |k: usize| if k < depth { from[line * line_stride + k] } else { bf16::ZERO };
                to[k * width + line] = pair(at(2 * k), at(2 * k + 1));
            }
        }
    }

    /// Whether a panel has room for the lines filled up to squares.
    fn fits_squares(self) -> bool {
        self.lines.next_multiple_of(LINES) <= self.width
    }

    /// Transposes as much of the depth as squares of [`LINES`] cover, of all lines; gives the depth that is done.
    fn transpose<T: Wide>(self, from: &[T], to: &mut [f32]) -> usize {
        #[cfg(target_arch = "x86_64")]
        if self.isa != Isa::Portable && self.fits_squares() {
            let (lines, depth) = (self.lines, self.depth / LINES * LINES);
            if lines == 0 || depth == 0 {
                return 0;
            }
            assert!((lines - 1) * self.line_stride + depth <= from.len(), "all lines lie in the slice");
            assert!(depth * self.width <= to.len(), "the panel is whole");
            #[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
            // SAFETY: every path but the portable one has AVX2 (`Isa::choose`); the extents are asserted above.
            unsafe {
                transpose::transpose(from.as_ptr(), self.line_stride, to.as_mut_ptr(), self.width, (lines, depth));
            }
            return depth;
        }
        let _ = (from, to);
        0
    }

    /// [`Self::transpose`] of pairs.
    fn transpose_whole_pairs(self, from: &[bf16], to: &mut [u32]) -> usize {
        #[cfg(target_arch = "x86_64")]
        if self.isa != Isa::Portable && self.fits_squares() {
            let (lines, pairs) = (self.lines, self.depth / 2 / LINES * LINES);
            if lines == 0 || pairs == 0 {
                return 0;
            }
            assert!((lines - 1) * self.line_stride + 2 * pairs <= from.len(), "all lines lie in the slice");
            assert!(pairs * self.width <= to.len(), "the panel is whole");
            let (from, to) = (from.as_ptr().cast::<u16>(), to.as_mut_ptr().cast::<f32>());
            #[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
            // SAFETY: as in `transpose`; bf16 is u16 in memory, and moving bits through a vector of f32 does not change them.
            unsafe {
                transpose::transpose_pairs(from, self.line_stride, to, self.width, (lines, pairs));
            }
            return pairs;
        }
        let _ = (from, to);
        0
    }
}

impl Wide for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn widen_run(from: &[Self], to: &mut [f32]) {
        // Not a call of `memcpy`: runs are short, and their length is known.
        to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from) }
    }
}

impl Wide for bf16 {
    /// As `bf16::to_f32`, which looks for a signalling NaN first, to quiet it: here the next product does that.
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn widen_run(from: &[Self], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.widen());
    }
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise; eight bf16 are 16 bytes.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
}

impl Wide for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn widen_run(from: &[Self], to: &mut [f32]) {
        simd::widen(from, to);
    }
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code, reason = "intrinsics on pointers")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise; eight f16 are 16 bytes, and x86-64-v3 includes F16C.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PANELS: [Panels; 4] = [
        Panels { lines: 6, width: 8, step: 8 },
        Panels { lines: 8, width: 8, step: 8 },
        Panels { lines: 16, width: 16, step: 8 },
        Panels { lines: 64, width: 64, step: 16 },
    ];

    /// Calls `check(line, k, element)` for every element of every panel that a kernel reads.
    fn for_each_element(panels: Panels, lines: usize, length: usize, mut check: impl FnMut(usize, usize, usize)) {
        for (i, (first, width)) in panels.of(lines).enumerate() {
            for k in 0..length {
                for line in first..lines.min(first + panels.lines) {
                    check(line, k, i * panels.width * length + k * width + line - first);
                }
            }
        }
    }

    /// Every element of a panel lies where it belongs, whatever the layout, the remainders and the types.
    #[test]
    fn panels_of_every_remainder() {
        for isa in Isa::available() {
            for ((lines, depth), panels) in [(1, 1), (3, 9), (8, 8), (8, 17), (17, 16), (24, 33), (50, 5), (96, 40)]
                .into_iter()
                .flat_map(|size| PANELS.map(|panels| (size, panels)))
            {
                for transposed in [false, true] {
                    let (rows, cols) = if transposed { (depth + 3, lines + 2) } else { (lines + 2, depth + 3) };
                    let values: Vec<f32> = (0..rows * cols).map(|i| (i % 251) as f32 + 1.0).collect();
                    let narrow: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
                    let half: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
                    let at = |line: usize, k: usize| {
                        let (line, k) = (line + 1, k + 1);
                        if k > depth { 0.0 } else { values[if transposed { k * cols + line } else { line * cols + k }] }
                    };
                    let num_panels = lines.div_ceil(panels.lines);
                    for data in [Elements::F32(&values), Elements::BF16(&narrow), Elements::F16(&half)] {
                        let mat = Mat::new(data, rows, cols, cols);
                        let mat = if transposed { mat.t() } else { mat };
                        let mut packed = vec![f32::NAN; num_panels * panels.width * depth];
                        Form { pairs: false, isa }.pack(&mat, 1..lines + 1, 1..depth + 1, panels, &mut packed);
                        for_each_element(panels, lines, depth, |line, k, i| {
                            assert_eq!(packed[i], at(line, k), "{lines} {depth} {transposed} {line} {k}");
                        });
                    }
                    let mat = Mat::new(Elements::BF16(&narrow), rows, cols, cols);
                    let mat = if transposed { mat.t() } else { mat };
                    let length = depth.div_ceil(2);
                    let mut packed = vec![f32::NAN; num_panels * panels.width * length];
                    Form { pairs: true, isa }.pack(&mat, 1..lines + 1, 1..depth + 1, panels, &mut packed);
                    for_each_element(panels, lines, length, |line, k, i| {
                        let bits = packed[i].to_bits();
                        let pair = [bits << 16, bits & 0xFFFF_0000].map(f32::from_bits);
                        assert_eq!(
                            pair,
                            [at(line, 2 * k), at(line, 2 * k + 1)],
                            "{lines} {depth} {transposed} {line} {k}"
                        );
                    });
                }
            }
        }
    }
}
