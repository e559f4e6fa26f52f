//! Products with few rows on the left and whole rows on the right, as in generation: each row of the weight passes by once and
//! meets every row of the left factor, so the memory's bandwidth is the limit. No path has its own instructions for it.

use std::ops::Range;

use half::bf16;
use unsloth_core::{FloatElement, Result};

use super::{Elements, Into, Mat, MatMut, SMALL, Sum, Term};
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

/// A term with its left factor in f32.
struct Wide<'a> {
    factor: f32,
    left: Left<'a>,
    right: Mat<'a>,
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
        let task = |cols: &Range<usize>| {
            for col in cols.clone() {
                let mut sums = [0.0; MAX_ROWS];
                terms.iter().for_each(|term| term.add_column(col, &mut sums[..m]));
                for (i, value) in sums[..m].iter_mut().enumerate() {
                    if let Some(bias) = sum.bias {
                        bias.slice(col..col + 1).add_to(std::slice::from_mut(value));
                    }
                    let at = i * row_stride + col;
                    #[allow(unsafe_code, reason = "tasks write pieces of the rows of one result")]
                    // SAFETY: tasks are disjoint ranges of columns, and this one takes one element of its own at a time.
                    let to = unsafe { result.piece(at..at + 1) };
                    if sum.into == Into::Add {
                        *value += to[0].to_f32();
                    }
                    to[0] = T::from_f32(*value);
                }
            }
        };
        if m * elements(n) < SMALL {
            task(&(0..n));
            return Ok(());
        }
        let cols = n.div_ceil((elements(n) / TASK).clamp(1, 16 * self.num_threads()));
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
        let left = match left.data {
            Elements::F32(data) => Left::Own(data, left.row_stride),
            Elements::F16(data) => scratch(&|start, to| simd::widen(&data[start..][..to.len()], to))?,
            Elements::BF16(data) => scratch(&|start, to| simd::widen(&data[start..][..to.len()], to))?,
        };
        Ok(Wide { factor, left, right })
    }
}

impl Wide<'_> {
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
