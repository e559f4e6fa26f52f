//! Matrices in slices of any float type, and sums of their products.

use std::ops::Range;

use half::{bf16, f16};
use unsloth_core::{DType, FloatElement, Tensor};

use crate::{
    access::{dispatch_float, read},
    simd::{self, BLOCK, vectorised},
};

/// The elements of a float tensor.
#[derive(Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl<'a> Elements<'a> {
    /// All elements of a float tensor.
    pub(crate) fn of(tensor: &'a Tensor) -> Self {
        dispatch_float!(tensor.dtype(), T => Self::from_slice::<T>(read(tensor)))
    }

    /// A slice of any float type.
    pub(crate) fn from_slice<T: FloatElement>(data: &'a [T]) -> Self {
        match T::DTYPE {
            DType::F32 => Self::F32(bytemuck::cast_slice(data)),
            DType::F16 => Self::F16(bytemuck::cast_slice(data)),
            _ => Self::BF16(bytemuck::cast_slice(data)),
        }
    }

    pub(super) fn len(self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::BF16(data) => data.len(),
        }
    }

    pub(super) fn slice(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(data) => Self::F32(&data[range]),
            Self::F16(data) => Self::F16(&data[range]),
            Self::BF16(data) => Self::BF16(&data[range]),
        }
    }

    /// Adds the elements to `to`, in blocks of at most [`BLOCK`].
    pub(super) fn add_to(self, to: &mut [f32]) {
        fn add<T: FloatElement>(from: &[T], to: &mut [f32]) {
            for (to, from) in to.chunks_mut(BLOCK).zip(from.chunks(BLOCK)) {
                let mut buffer = [0.0; BLOCK];
                let from = simd::widened(from, &mut buffer);
                vectorised(
                    #[inline(always)]
                    || to.iter_mut().zip(from).for_each(|(to, from)| *to += from),
                );
            }
        }
        match self {
            Self::F32(from) => add(from, to),
            Self::F16(from) => add(from, to),
            Self::BF16(from) => add(from, to),
        }
    }
}

/// A matrix in a slice: element `(i, j)` is at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub(super) data: Elements<'a>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
    /// Elements of a column are neighbours, not those of a row.
    pub(super) transposed: bool,
}

impl<'a> Mat<'a> {
    /// Row-major `rows x cols` whose rows are `row_stride` elements apart.
    pub(crate) fn new(data: Elements<'a>, rows: usize, cols: usize, row_stride: usize) -> Self {
        let mat = Self { data, rows, cols, row_stride, col_stride: 1, transposed: false };
        assert!(mat.lies_in(data.len()), "a matrix lies in its slice");
        mat
    }

    /// [`Self::new`] of f32 without gaps.
    pub(crate) fn f32(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::new(Elements::F32(data), rows, cols, cols)
    }

    /// A tensor of two dimensions.
    pub(crate) fn of(tensor: &'a Tensor) -> Self {
        Self::new(Elements::of(tensor), tensor.shape()[0], tensor.shape()[1], tensor.shape()[1])
    }

    /// The transpose, without moving data.
    pub(crate) fn t(self) -> Self {
        let (rows, cols, transposed) = (self.cols, self.rows, !self.transposed);
        Self { rows, cols, row_stride: self.col_stride, col_stride: self.row_stride, transposed, ..self }
    }

    /// Some of its rows.
    pub(crate) fn rows(self, rows: Range<usize>) -> Self {
        assert!(rows.end <= self.rows, "rows of the matrix");
        let start = (rows.start * self.row_stride).min(self.data.len());
        Self { data: self.data.slice(start..self.data.len()), rows: rows.len(), ..self }
    }

    /// Some of its columns.
    pub(super) fn cols(self, cols: Range<usize>) -> Self {
        self.t().rows(cols).t()
    }

    /// Whether all elements are below `len`.
    pub(super) fn lies_in(&self, len: usize) -> bool {
        if self.rows == 0 || self.cols == 0 {
            return true;
        }
        let row = (self.rows - 1).checked_mul(self.row_stride);
        let col = (self.cols - 1).checked_mul(self.col_stride);
        row.zip(col).and_then(|(row, col)| row.checked_add(col)).is_some_and(|last| last < len)
    }

    pub(super) fn is_bf16(&self) -> bool {
        matches!(self.data, Elements::BF16(_))
    }
}

/// `factor * left right^T`: a row of `right` is a column of the product.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    pub(crate) factor: f32,
    pub(crate) left: Mat<'a>,
    pub(crate) right: Mat<'a>,
}

impl<'a> Term<'a> {
    pub(crate) fn new(left: Mat<'a>, right: Mat<'a>) -> Self {
        Self { factor: 1.0, left, right }
    }

    /// Rows and columns of the product.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.left.rows, self.right.rows)
    }
}

/// What becomes of the old contents of the result.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// Overwritten; they are not read, and may be NaN.
    Overwrite,
    /// Added to.
    Add,
}

/// A sum of products with an optional row added to every row.
#[derive(Clone, Copy)]
pub(crate) struct Sum<'a> {
    pub(crate) terms: &'a [Term<'a>],
    pub(crate) bias: Option<Elements<'a>>,
    pub(crate) into: Into,
}

impl<'a> Sum<'a> {
    pub(crate) fn new(terms: &'a [Term<'a>], into: Into) -> Self {
        Self { terms, bias: None, into }
    }
}

/// A row-major matrix to write to: rows, columns, and the distance of the rows.
pub(crate) struct MatMut<'a, T> {
    pub(super) data: &'a mut [T],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(cols <= row_stride || rows <= 1, "rows of a result do not overlap");
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(), "a result lies in its slice");
        Self { data, rows, cols, row_stride }
    }

    /// Some of its rows.
    pub(super) fn rows(&mut self, rows: Range<usize>) -> MatMut<'_, T> {
        let Self { cols, row_stride, .. } = *self;
        assert!(rows.end <= self.rows, "rows of the result");
        let end = if rows.is_empty() { 0 } else { (rows.len() - 1) * row_stride + cols };
        let start = rows.start * row_stride;
        MatMut::new(&mut self.data[start..start + end], rows.len(), cols, row_stride)
    }
}
