//! Matrix products: strided factors of any float type, f32 sums, any float result.
//!
//! The result is cut into tasks, and a task walks the dimension summed over in blocks of fixed length: it packs a block of the
//! right factor, then strips of the left one, and runs a [`kernel`] over pairs of their panels. Factors are read where they lie;
//! what is widened or transposed exists only as the panels of one block. A sum's terms are added in the same order wherever its
//! tile lies, so neither the cut nor the number of threads shows in the bits.
//!
//! Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication", doi:10.1145/1356052.1356053.

mod few_rows;
mod full;
mod isa;
mod kernel;
mod pack;
#[cfg(target_arch = "x86_64")]
mod transpose;

use std::ops::Range;

use half::{bf16, f16};
use unsloth_core::{DType, FloatElement, Result, Tensor};

use self::{
    kernel::{Kernel, LEFT_WIDTH, Tile},
    pack::Form,
};
pub use isa::Isa;

use crate::{
    CpuBackend,
    access::{dispatch_float, read},
    parallel::Disjoint,
    simd::{self, BLOCK, vectorised},
};

/// Elements of a panel along the dimension summed over: eight rows of them are a quarter of a first-level cache.
const DEPTH: usize = 256;
/// Rows of a tile, on any path, divide it.
const ROW_UNIT: usize = 24;
/// Columns of a panel, on any path, divide it.
const COL_UNIT: usize = 48;
/// Rows and columns of a task, at most. The columns' panels fill half a second-level cache.
const TASK_ROWS: usize = 504;
const TASK_COLS: usize = 480;
/// Rows that are packed at a time.
const STRIP: usize = 96;
/// Products below this number of multiplications are not worth waking a thread for.
const SMALL: usize = 64 * 64 * 64;
/// Tasks per thread, so that one that is held up holds up no other.
const TASKS_PER_THREAD: usize = 4;

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

    fn len(self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::BF16(data) => data.len(),
        }
    }

    fn slice(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(data) => Self::F32(&data[range]),
            Self::F16(data) => Self::F16(&data[range]),
            Self::BF16(data) => Self::BF16(&data[range]),
        }
    }

    /// Adds the elements to `to`, in blocks of at most [`BLOCK`].
    fn add_to(self, to: &mut [f32]) {
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
    data: Elements<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    /// Elements of a column are neighbours, not those of a row.
    transposed: bool,
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

    /// Whether all elements are below `len`.
    fn lies_in(&self, len: usize) -> bool {
        if self.rows == 0 || self.cols == 0 {
            return true;
        }
        let row = (self.rows - 1).checked_mul(self.row_stride);
        let col = (self.cols - 1).checked_mul(self.col_stride);
        row.zip(col).and_then(|(row, col)| row.checked_add(col)).is_some_and(|last| last < len)
    }

    fn is_bf16(&self) -> bool {
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
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(cols <= row_stride || rows <= 1, "rows of a result do not overlap");
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(), "a result lies in its slice");
        Self { data, rows, cols, row_stride }
    }
}

/// A rectangle of the result.
struct Task {
    rows: Range<usize>,
    cols: Range<usize>,
}

/// How a result is cut.
fn tasks((m, n, k): (usize, usize, usize), num_threads: usize) -> Vec<Task> {
    let even = |total: usize, most: usize, unit: usize| total.div_ceil(total.div_ceil(most)).next_multiple_of(unit);
    let (mut rows, mut cols) = (even(m, TASK_ROWS, ROW_UNIT), even(n, TASK_COLS, COL_UNIT));
    let is_small = |rows: usize, cols: usize| rows * cols * k < 2 * SMALL;
    while num_threads > 1
        && m.div_ceil(rows) * n.div_ceil(cols) < TASKS_PER_THREAD * num_threads
        && !is_small(rows, cols)
    {
        // Splitting the rows packs the columns once more, and the other way round: the longer side costs less.
        let (fewer_rows, fewer_cols) = (even(rows, rows.div_ceil(2), ROW_UNIT), even(cols, cols.div_ceil(2), COL_UNIT));
        if rows >= cols && fewer_rows < rows {
            rows = fewer_rows;
        } else if fewer_cols < cols {
            cols = fewer_cols;
        } else if fewer_rows < rows {
            rows = fewer_rows;
        } else {
            break;
        }
    }
    let range = |start: usize, step: usize, end: usize| start..end.min(start + step);
    let starts = |total: usize, step: usize| (0..total).step_by(step);
    let row = |i| starts(n, cols).map(move |j| Task { rows: range(i, rows, m), cols: range(j, cols, n) });
    starts(m, rows).flat_map(row).collect()
}

/// f32 elements of scratch of a task: a strip of the left factor, a block of the right one, and the sums. It does not depend on
/// the path or on how the result is cut.
fn scratch_parts((m, n, k): (usize, usize, usize)) -> [usize; 3] {
    let depth = k.min(DEPTH);
    let (rows, cols) = (m.next_multiple_of(ROW_UNIT), n.next_multiple_of(COL_UNIT));
    // Six rows may be packed as eight. Whole cache lines, so that panels start at one.
    [
        (rows.min(STRIP) / 6 * LEFT_WIDTH * depth).next_multiple_of(16),
        cols.min(TASK_COLS) * depth,
        rows.min(TASK_ROWS) * cols.min(TASK_COLS),
    ]
}

impl CpuBackend {
    /// `result = sum` or `result += sum`, on all threads.
    ///
    /// # Errors
    /// [`unsloth_core::Error::OutOfMemory`] for the panels. Products of f32 alone have none in the ledger.
    pub(crate) fn product<T: FloatElement>(&self, sum: Sum<'_>, result: MatMut<'_, T>) -> Result<()> {
        let MatMut { data, rows: m, cols: n, row_stride } = result;
        for Term { left, right, .. } in sum.terms {
            assert!(left.rows == m && right.rows == n && left.cols == right.cols, "factors fit the result");
        }
        assert!(sum.bias.is_none_or(|bias| bias.len() == n), "a bias fits the columns");
        let k = sum.terms.iter().map(|term| term.left.cols).max().unwrap_or(0);
        if m == 0 || n == 0 {
            return Ok(());
        }
        if few_rows::applies(sum.terms, m) {
            return self.product_of_few_rows(sum, MatMut { data, rows: m, cols: n, row_stride });
        }
        if full::applies::<T>(&sum) {
            self.product_of_f32(sum, MatMut { data, rows: m, cols: n, row_stride });
            return Ok(());
        }
        let size = (m, n, k);
        let num_threads = if m * n * k < SMALL { 1 } else { self.num_threads() };
        let tasks = tasks(size, num_threads);
        let parts = scratch_parts(size);
        let result = Disjoint::new(data);
        self.for_each_task_on(num_threads, &tasks, parts.iter().sum(), |task, scratch| {
            let (left, scratch) = scratch.split_at_mut(parts[0]);
            let (right, sums) = scratch.split_at_mut(parts[1]);
            let mut work = Work { isa: self.isa(), left, right, sums, rows: task.rows.len(), cols: task.cols.len() };
            work.sum(sum.terms, task);
            work.store(&sum, task, |row| {
                let start = row * row_stride + task.cols.start;
                #[allow(unsafe_code, reason = "tasks write pieces of the rows of one result")]
                // SAFETY: tasks are disjoint rectangles, and this one takes one row of its own at a time.
                unsafe {
                    result.piece(start..start + task.cols.len())
                }
            });
        })
    }
}

/// A task at work: panels, and its sums as tiles, `[panel][row][column of the panel]`.
struct Work<'a> {
    isa: Isa,
    left: &'a mut [f32],
    right: &'a mut [f32],
    sums: &'a mut [f32],
    rows: usize,
    cols: usize,
}

impl Work<'_> {
    fn sum(&mut self, terms: &[Term<'_>], task: &Task) {
        let mut add = false;
        for term in terms {
            let kernel = Kernel::new(self.isa, term.left.is_bf16() && term.right.is_bf16() && term.factor == 1.0);
            let step = if kernel.pairs { 2 * DEPTH } else { DEPTH };
            let depth = term.left.cols;
            for start in (0..depth).step_by(step) {
                self.block(term, kernel, task, start..depth.min(start + step), add);
                add = true;
            }
        }
        if !add {
            self.sums.fill(0.0);
        }
    }

    /// Adds a block of the dimension summed over.
    fn block(&mut self, term: &Term<'_>, kernel: Kernel, task: &Task, depth: Range<usize>, add: bool) {
        let form = Form { pairs: kernel.pairs, isa: self.isa };
        let length = form.depth(depth.len());
        let columns = task.cols.clone();
        form.pack(&term.right, columns, depth.clone(), kernel.right_panels(), self.right);
        let padded_rows = self.rows.next_multiple_of(kernel.rows);
        for strip in (0..self.rows).step_by(STRIP) {
            let rows = strip..self.rows.min(strip + STRIP);
            let lines = task.rows.start + rows.start..task.rows.start + rows.end;
            form.pack(&term.left, lines, depth.clone(), kernel.left_panels(), self.left);
            if term.factor != 1.0 {
                simd::scale(&mut self.left[..rows.len().div_ceil(kernel.rows) * LEFT_WIDTH * length], term.factor);
            }
            let (left, right) = (bytemuck::cast_slice(self.left), bytemuck::cast_slice::<f32, u32>(self.right));
            for (i, row) in rows.step_by(kernel.rows).enumerate() {
                let a = &left[i * LEFT_WIDTH * length..][..LEFT_WIDTH * length];
                for (first, width) in kernel.right_panels().of(self.cols) {
                    let b = &right[first * length..][..width * length];
                    let c = &mut self.sums[first * padded_rows + row * width..][..kernel.rows * width];
                    kernel.run(Tile { depth: length, width, a, b, c, add });
                }
            }
        }
    }

    /// Writes the sums to the rows of the result, `row(i)` being the task's part of row `i`.
    fn store<'b, T: FloatElement>(&mut self, sum: &Sum<'_>, task: &Task, row: impl Fn(usize) -> &'b mut [T]) {
        let kernel = Kernel::new(self.isa, false);
        let padded_rows = self.rows.next_multiple_of(kernel.rows);
        let bias = sum.bias.map(|bias| bias.slice(task.cols.clone()));
        for i in 0..self.rows {
            let to = row(task.rows.start + i);
            for (first, width) in kernel.right_panels().of(self.cols) {
                let cols = first..self.cols.min(first + width);
                let sums = &mut self.sums[first * padded_rows + i * width..][..cols.len()];
                if let Some(bias) = bias {
                    bias.slice(cols.clone()).add_to(sums);
                }
                let to = &mut to[cols];
                if sum.into == Into::Add {
                    Elements::from_slice::<T>(to).add_to(sums);
                }
                simd::narrow(sums, to);
            }
        }
    }
}

#[cfg(test)]
mod tests;
