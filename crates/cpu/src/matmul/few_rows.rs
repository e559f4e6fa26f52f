//! Products with few rows on the left and whole rows on the right, as in generation: each row of the weight passes by once and
//! meets every row of the left factor, so the memory's bandwidth is the limit.

use std::ops::Range;

use half::bf16;
use unsloth_core::{FloatElement, Result};

use super::{Elements, Into, Isa, Mat, MatMut, SMALL, Sum, Term};
#[cfg(target_arch = "x86_64")]
use crate::avx512;
use crate::{
    CpuBackend,
    backend::Workspace,
    parallel::Disjoint,
    simd::{self, BLOCK, vectorised},
};

/// Rows of the left factor, at most: from three on packing pays, and from two on where the right one would be widened row by row.
const MAX_ROWS: usize = 2;
/// Elements of the right factor that are worth a task.
const TASK: usize = 32 * BLOCK;

/// Rows of the right factor whose sums are finished together.
const GROUP: usize = 4;

/// A term with its left factor in f32.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "what AVX-512 wants to know"))]
struct Wide<'a> {
    factor: f32,
    left: Left<'a>,
    /// The left factor as it is where products of bf16 pairs are for it: a single row.
    pairs: Option<&'a [bf16]>,
    right: Mat<'a>,
    isa: Isa,
}

enum Left<'a> {
    Own(&'a [f32], usize),
    Scratch(Workspace),
}

impl Wide<'_> {
    fn row(&self, i: usize) -> &[f32] {
        let k = self.right.cols;
        match &self.left {
            Left::Own(data, stride) => &data[i * stride..][..k],
            Left::Scratch(data) => &data[i * k..][..k],
        }
    }
}

/// Whether a sum is a case for [`CpuBackend::product_of_few_rows`].
pub(super) fn applies(terms: &[Term<'_>], rows: usize) -> bool {
    let is_wide = |mat: &Mat<'_>| matches!(mat.data, Elements::F32(_));
    let by_rows = |term: &Term<'_>| !term.left.transposed && !term.right.transposed;
    terms.iter().all(|term| by_rows(term) && rows <= if is_wide(&term.right) { MAX_ROWS } else { 1 })
}

impl CpuBackend {
    /// [`Self::product`] where [`applies`].
    pub(super) fn product_of_few_rows<T: FloatElement>(&self, sum: Sum<'_>, result: MatMut<'_, T>) -> Result<()> {
        let MatMut { data, rows: m, cols: n, row_stride } = result;
        let terms = sum.terms.iter().map(|term| self.widened_term(term)).collect::<Result<Vec<_>>>()?;
        let elements = |cols: usize| terms.iter().map(|term| cols * term.right.cols).sum::<usize>();
        let result = Disjoint::new(data);
        let task = |task: &Range<usize>| {
            for start in task.clone().step_by(GROUP) {
                let cols = start..task.end.min(start + GROUP);
                let mut sums = [[0.0; GROUP]; MAX_ROWS];
                terms.iter().for_each(|term| term.add_columns(&cols, &mut sums[..m]));
                for (i, sums) in sums[..m].iter_mut().enumerate() {
                    let sums = &mut sums[..cols.len()];
                    if let Some(bias) = sum.bias {
                        bias.slice(cols.clone()).add_to(sums);
                    }
                    let at = i * row_stride + start;
                    #[allow(unsafe_code, reason = "tasks write pieces of the rows of one result")]
                    // SAFETY: tasks are disjoint ranges of columns, and this one takes some of its own at a time.
                    let to = unsafe { result.piece(at..at + cols.len()) };
                    for (to, sum_of_products) in to.iter_mut().zip(sums) {
                        let old = if sum.into == Into::Add { to.to_f32() } else { 0.0 };
                        *to = T::from_f32(old + *sum_of_products);
                    }
                }
            }
        };
        if m * elements(n) < SMALL {
            task(&(0..n));
            return Ok(());
        }
        let cols = n.div_ceil((elements(n) / TASK).clamp(1, 16 * self.num_threads())).next_multiple_of(GROUP);
        let tasks: Vec<Range<usize>> = (0..n).step_by(cols).map(|start| start..n.min(start + cols)).collect();
        self.for_each_task(&tasks, 0, |cols, _| task(cols))
    }

    fn widened_term<'a>(&self, term: &Term<'a>) -> Result<Wide<'a>> {
        let Term { factor, left, right } = *term;
        let scratch = |widen: &dyn Fn(usize, &mut [f32])| -> Result<Left<'a>> {
            let mut scratch = self.workspace(left.rows * left.cols)?;
            for i in 0..left.rows {
                widen(i * left.row_stride, &mut scratch[i * left.cols..][..left.cols]);
            }
            Ok(Left::Scratch(scratch))
        };
        let (narrow, rows) = (left.data, left.rows);
        let left = match left.data {
            Elements::F32(data) => Left::Own(data, left.row_stride),
            Elements::F16(data) => scratch(&|start, to| simd::widen(&data[start..][..to.len()], to))?,
            Elements::BF16(data) => scratch(&|start, to| simd::widen(&data[start..][..to.len()], to))?,
        };
        let pairs = match (narrow, right.data) {
            (Elements::BF16(data), Elements::BF16(_)) if self.isa().multiplies_pairs() && rows == 1 => {
                Some(&data[..right.cols])
            }
            _ => None,
        };
        Ok(Wide { factor, left, pairs, right, isa: self.isa() })
    }
}

impl Wide<'_> {
    /// Adds the products of rows `cols` of the right factor, [`GROUP`] at most, with the rows of the left one.
    fn add_columns(&self, cols: &Range<usize>, sums: &mut [[f32; GROUP]]) {
        #[cfg(target_arch = "x86_64")]
        if self.isa.has_avx512() && self.add_vectors(cols, sums) {
            return;
        }
        for (j, col) in cols.clone().enumerate() {
            let mut column = [0.0; MAX_ROWS];
            let column = &mut column[..sums.len()];
            self.add_column(col, column);
            sums.iter_mut().zip(column).for_each(|(sums, sum)| sums[j] += *sum);
        }
    }

    /// [`Self::add_columns`] on AVX-512, where there are products for the types.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
    fn add_vectors(&self, cols: &Range<usize>, sums: &mut [[f32; GROUP]]) -> bool {
        macro_rules! add {
            ($right:ident, $left:expr, $sums:expr, $dot:ident) => {
                // SAFETY: `Isa::choose` gives only what the processor has, and there are pairs only for one that multiplies them;
                // `row`, `pairs` and the lines have `right.cols` elements.
                self.add_lines(($right, cols), $sums, |line| unsafe { avx512::$dot($left, line) })
            };
        }
        match (self.right.data, self.pairs, sums) {
            (Elements::F32(right), _, sums) => {
                sums.iter_mut().enumerate().for_each(|(i, sums)| add!(right, self.row(i), sums, dot));
            }
            (Elements::BF16(right), Some(left), [sums]) => add!(right, left, sums, dot_bf16),
            (Elements::BF16(right), None, [sums]) => add!(right, self.row(0), sums, dot_f32_bf16),
            (Elements::F16(right), _, [sums]) => add!(right, self.row(0), sums, dot_f32_f16),
            _ => return false,
        }
        true
    }

    /// Adds what `dot` makes of each of the lines of the right factor.
    #[cfg(target_arch = "x86_64")]
    fn add_lines<T>(
        &self,
        (right, cols): (&[T], &Range<usize>),
        sums: &mut [f32; GROUP],
        dot: impl Fn(*const T) -> f32,
    ) {
        let Mat { row_stride, cols: k, .. } = self.right;
        for (sum, col) in sums.iter_mut().zip(cols.clone()) {
            *sum += self.factor * dot(right[col * row_stride..][..k].as_ptr());
        }
    }

    /// Adds the products of row `col` of the right factor with the rows of the left one.
    fn add_column(&self, col: usize, sums: &mut [f32]) {
        let right = self.right.data.slice(col * self.right.row_stride..col * self.right.row_stride + self.right.cols);
        match right {
            Elements::F32(right) => self.add_products(right, sums),
            Elements::F16(right) => self.add_products(right, sums),
            Elements::BF16(right) => match sums {
                [sum] => self.add_product(right, sum),
                _ => self.add_products(right, sums),
            },
        }
    }

    /// For a single row the detour through a buffer of f32 would cost more than the memory.
    fn add_product(&self, right: &[bf16], sum: &mut f32) {
        for (left, right) in self.row(0).chunks(BLOCK).zip(right.chunks(BLOCK)) {
            *sum += self.factor
                * vectorised(
                    #[inline(always)]
                    || simd::dot_bf16(left, right),
                );
        }
    }

    fn add_products<T: FloatElement>(&self, right: &[T], sums: &mut [f32]) {
        for (block, right) in right.chunks(BLOCK).enumerate() {
            let mut buffer = [0.0; BLOCK];
            let right = simd::widened(right, &mut buffer);
            for (i, sum) in sums.iter_mut().enumerate() {
                let left = &self.row(i)[block * BLOCK..][..right.len()];
                *sum += self.factor
                    * vectorised(
                        #[inline(always)]
                        || simd::dot(left, right),
                    );
            }
        }
    }
}
