//! Products of f32 alone: nothing has to be widened, and there the `gemm` crate is as fast as [`super::kernel`] or faster, so it
//! does them. It chooses its instructions itself.

use unsloth_core::{DType, FloatElement};

use super::{Elements, Into, Mat, MatMut, SMALL, Sum, Term};
use crate::CpuBackend;

/// Whether a sum is a case for [`CpuBackend::product_of_f32`].
pub(super) fn applies<T: FloatElement>(sum: &Sum<'_>) -> bool {
    let is_f32 = |mat: &Mat<'_>| matches!(mat.data, Elements::F32(_));
    T::DTYPE == DType::F32 && sum.terms.iter().all(|term| is_f32(&term.left) && is_f32(&term.right))
}

impl CpuBackend {
    /// [`Self::product`] where [`applies`].
    pub(super) fn product_of_f32<T: FloatElement>(&self, sum: Sum<'_>, result: MatMut<'_, T>) {
        let MatMut { data, rows, cols, row_stride } = result;
        let data: &mut [f32] = bytemuck::cast_slice_mut(data);
        let mut add = sum.into == Into::Add;
        if sum.bias.is_some() || sum.terms.iter().all(|term| term.left.cols == 0) {
            for row in data.chunks_mut(row_stride).take(rows) {
                if !add {
                    row[..cols].fill(0.0);
                }
                if let Some(bias) = sum.bias {
                    bias.add_to(&mut row[..cols]);
                }
            }
            add = true;
        }
        let mut result = MatMut::new(data, rows, cols, row_stride);
        for term in sum.terms.iter().filter(|term| term.left.cols > 0) {
            self.run(|| multiply(term, add, &mut result, self.num_threads()));
            add = true;
        }
    }
}

/// `result = factor * left right^T`, or `+=`.
fn multiply(term: &Term<'_>, add: bool, result: &mut MatMut<'_, f32>, num_threads: usize) {
    let Term { factor, left, right } = term;
    let (Elements::F32(a), Elements::F32(b)) = (left.data, right.data) else {
        panic!("a product of f32 has factors of f32");
    };
    let (m, n, k) = (result.rows, result.cols, left.cols);
    // Every element is in its slice: for the factors this is what `Mat` holds, and `product` has compared the shapes.
    assert!(left.lies_in(a.len()) && right.lies_in(b.len()), "factors lie in their slices");
    assert!(left.rows == m && right.rows == n && right.cols == k, "factors fit the result");
    let parallelism = if m * n * k < SMALL { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(num_threads) };
    #[allow(unsafe_code, reason = "the gemm crate takes raw pointers")]
    // SAFETY: the assertions say that all elements of the factors lie in their slices, `MatMut::new` that those of the result
    // lie in its own and that rows do not overlap. The result is borrowed mutably, so it overlaps neither factor. Strides fit
    // isize because slices do.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            result.data.as_mut_ptr(),
            1,
            result.row_stride as isize,
            add,
            a.as_ptr(),
            left.col_stride as isize,
            left.row_stride as isize,
            b.as_ptr(),
            right.row_stride as isize,
            right.col_stride as isize,
            1.0f32,
            *factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}
