//! Matrix products of f32 slices through the `gemm` crate, and widening of half-precision blocks.

use rayon::prelude::*;
use unsloth_core::FloatElement;

/// A matrix in a slice: element `(i, j)` is at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major `rows x cols` whose rows are `row_stride` elements apart.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving data.
    pub(crate) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// A row-major matrix to write to.
pub(crate) struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride }
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

/// `c = alpha * a b` or `c += alpha * a b`, on all threads of the current pool.
pub(crate) fn matmul(alpha: f32, a: Mat<'_>, b: Mat<'_>, c: MatMut<'_>, into: Into) {
    let (m, n, k) = (c.rows, c.cols, a.cols);
    assert!(a.rows == m && b.rows == k && b.cols == n, "matmul: {m}x{n} from {}x{k} by {}x{}", a.rows, b.rows, b.cols);
    assert!(spans(a.data.len(), (m, a.row_stride), (k, a.col_stride)), "matmul: a is outside its slice");
    assert!(spans(b.data.len(), (k, b.row_stride), (n, b.col_stride)), "matmul: b is outside its slice");
    assert!(spans(c.data.len(), (m, c.row_stride), (n, 1)), "matmul: c is outside its slice");
    assert!(n <= c.row_stride || m <= 1, "matmul: rows of c overlap");
    if m == 0 || n == 0 {
        return;
    }
    // Below this size starting the threads costs more than it saves.
    let parallelism = if m * n * k < 64 * 64 * 64 {
        gemm::Parallelism::None
    } else {
        gemm::Parallelism::Rayon(rayon::current_num_threads())
    };
    let read_c = into == Into::Add;
    #[allow(unsafe_code, reason = "the gemm crate takes raw pointers")]
    // SAFETY: `spans` has checked that every index `i * row_stride + j * col_stride` of each matrix lies in its slice, and
    // `c` is borrowed mutably, so it overlaps neither input. Strides fit isize because slices do.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.data.as_mut_ptr(),
            1,
            c.row_stride as isize,
            read_c,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0f32,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Whether a strided matrix lies in a slice of `len` elements.
fn spans(len: usize, rows: (usize, usize), cols: (usize, usize)) -> bool {
    if rows.0 == 0 || cols.0 == 0 {
        return true;
    }
    let last = (rows.0 - 1).checked_mul(rows.1).zip((cols.0 - 1).checked_mul(cols.1));
    last.and_then(|(row, col)| row.checked_add(col)).is_some_and(|last| last < len)
}

/// Elements that one task converts; the boundaries do not depend on the number of threads.
const CONVERT_BLOCK: usize = 16 * 1024;

/// `to[i] = from[i]`, widened.
pub(crate) fn widen<T: FloatElement>(from: &[T], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "widen: lengths differ");
    let blocks = to.par_chunks_mut(CONVERT_BLOCK).zip(from.par_chunks(CONVERT_BLOCK));
    blocks.for_each(|(to, from)| {
        pulp::Arch::new().dispatch(|| {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from.to_f32();
            }
        });
    });
}

/// `to` = columns `first_col ..` of the rows of `from` (rows of `from_stride` elements), widened, contiguous.
pub(crate) fn widen_columns<T: FloatElement>(
    from: &[T],
    from_stride: usize,
    first_col: usize,
    to: &mut [f32],
    cols: usize,
) {
    if cols == 0 {
        return;
    }
    let rows = to.par_chunks_mut(cols).zip(from.par_chunks(from_stride));
    rows.for_each(|(to, from)| {
        for (to, from) in to.iter_mut().zip(&from[first_col..first_col + cols]) {
            *to = from.to_f32();
        }
    });
}

/// Columns `first_col ..` of the rows of `to` (rows of `to_stride` elements) = `from`, rounded.
pub(crate) fn narrow_columns<T: FloatElement>(
    from: &[f32],
    cols: usize,
    to: &mut [T],
    to_stride: usize,
    first_col: usize,
) {
    if cols == 0 {
        return;
    }
    let rows = to.par_chunks_mut(to_stride).zip(from.par_chunks(cols));
    rows.for_each(|(to, from)| {
        for (to, from) in to[first_col..first_col + cols].iter_mut().zip(from) {
            *to = T::from_f32(*from);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_and_transposed_products() {
        // a = [1 2 3; 4 5 6] in rows of 4, b^T = [1 0 1; 0 1 1]; a b = [4 5; 10 11]
        let a = [1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0];
        let bt = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0];
        let mut c = [f32::NAN; 5];
        let (a, b) = (Mat::new(&a, 2, 3, 4), Mat::new(&bt, 2, 3, 3).t());
        matmul(1.0, a, b, MatMut::new(&mut c, 2, 2, 3), Into::Overwrite);
        assert_eq!([c[0], c[1], c[3], c[4]], [4.0, 5.0, 10.0, 11.0]);
        assert!(c[2].is_nan(), "the gap between rows is not touched");
        matmul(2.0, a, b, MatMut::new(&mut c, 2, 2, 3), Into::Add);
        assert_eq!([c[0], c[1], c[3], c[4]], [12.0, 15.0, 30.0, 33.0]);
    }

    #[test]
    fn an_empty_inner_dimension_gives_zeros() {
        let mut c = [f32::NAN; 4];
        matmul(1.0, Mat::new(&[], 2, 0, 0), Mat::new(&[], 0, 2, 2), MatMut::new(&mut c, 2, 2, 2), Into::Overwrite);
        assert_eq!(c, [0.0; 4]);
    }

    #[test]
    #[should_panic(expected = "a is outside its slice")]
    fn refuses_to_read_outside() {
        let (a, b, mut c) = ([0.0; 3], [0.0; 4], [0.0; 4]);
        matmul(1.0, Mat::new(&a, 2, 2, 2), Mat::new(&b, 2, 2, 2), MatMut::new(&mut c, 2, 2, 2), Into::Add);
    }
}
