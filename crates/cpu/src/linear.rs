//! Matrix products with a weight `[out_features, in_features]`: `x W^T`, `dy W`, `dy^T x`, with the rank-r parts of LoRA fused.
//!
//! No second copy of a weight ever exists: panels of it are widened or transposed block by block, see [`crate::matmul`].

use std::ops::Range;

use unsloth_core::{Category, Error, FloatElement, Result, Tensor, Weight, ops::linear};

use crate::{
    access::{dispatch_float, output, read, write},
    backend::CpuBackend,
    matmul::{Elements, Into, Mat, MatMut, Sum, Term},
};

/// The dense elements of a weight.
pub(crate) fn dense<'a>(op: &'static str, weight: &'a Weight) -> Result<&'a Tensor> {
    match weight {
        Weight::Dense(tensor) => Ok(tensor),
        _ => Err(Error::Unsupported { op, what: "this form of weight", device: "cpu".into() }),
    }
}

/// Rows of one partial sum; the boundaries do not depend on the number of threads.
const SUM_BLOCK: usize = 64;

/// A loop over `total` items in blocks.
pub(crate) fn blocks(total: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..total).step_by(block.max(1)).map(move |start| start..(start + block).min(total))
}

impl CpuBackend {
    fn sum_rows<T: FloatElement>(&self, dy: &[T], dbias: &mut [f32]) {
        let features = dbias.len();
        if features == 0 {
            return;
        }
        let partials = self.map_parts(dy.chunks(features * SUM_BLOCK), |rows| {
            let mut sum = vec![0.0f32; features];
            for row in rows.chunks_exact(features) {
                for (sum, value) in sum.iter_mut().zip(row) {
                    *sum += value.to_f32();
                }
            }
            sum
        });
        for partial in partials {
            for (dbias, partial) in dbias.iter_mut().zip(partial) {
                *dbias += partial;
            }
        }
    }

    /// `product`, and the term of rank r if there is one, in a new tensor like `like`.
    fn activations(
        &self,
        like: &Tensor,
        product: Term<'_>,
        low_rank: Option<Term<'_>>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (rows, cols) = product.shape();
        let mut result = output(like, like.dtype(), [rows, cols], Category::Activations)?;
        let both = low_rank.map(|low_rank| [product, low_rank]);
        let terms = both.as_ref().map_or(std::slice::from_ref(&product), |both| both);
        let sum = Sum { terms, bias: bias.map(Elements::of), into: Into::Overwrite };
        dispatch_float!(like.dtype(), T => {
            self.product(sum, MatMut::new(write::<T>("linear", "output", &mut result)?, rows, cols, cols))?;
        });
        Ok(result)
    }

    /// `y = x W^T + bias`, and the term `scale * h B^T` of an adapter.
    pub(crate) fn project(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        low_rank: Option<Term<'_>>,
    ) -> Result<Tensor> {
        self.activations(x, Term::new(Mat::of(x), Mat::of(weight)), low_rank, bias)
    }

    /// `dx = dy W`, and the term `dh A` of an adapter.
    pub(crate) fn project_back(&self, dy: &Tensor, weight: &Tensor, low_rank: Option<Term<'_>>) -> Result<Tensor> {
        self.activations(dy, Term::new(Mat::of(dy), Mat::of(weight).t()), low_rank, None)
    }

    /// `accumulator += factor * left^T right` over the rows of both; `left` is `[rows, m]`, `right` `[rows, n]`.
    pub(crate) fn accumulate_product(
        &self,
        left: &Tensor,
        right: &Tensor,
        factor: f32,
        accumulator: &mut [f32],
    ) -> Result<()> {
        let term = Term { factor, left: Mat::of(left).t(), right: Mat::of(right).t() };
        let (m, n) = term.shape();
        self.product(Sum::new(&[term], Into::Add), MatMut::new(accumulator, m, n, n))
    }
}

impl linear::Linear for CpuBackend {
    fn linear_forward(
        &self,
        _spec: &linear::Spec,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let weight = dense("linear", weight)?;
        self.project(x, weight, bias, None)
    }

    fn linear_input_gradient(&self, _spec: &linear::Spec, dy: &Tensor, weight: &Weight) -> Result<Tensor> {
        let weight = dense("linear", weight)?;
        self.project_back(dy, weight, None)
    }

    fn linear_weight_gradient(
        &self,
        _spec: &linear::Spec,
        dy: &Tensor,
        x: &Tensor,
        dweight: &mut Tensor,
    ) -> Result<()> {
        let dweight = write::<f32>("linear", "dweight", dweight)?;
        self.accumulate_product(dy, x, 1.0, dweight)
    }

    fn linear_bias_gradient(&self, _spec: &linear::Spec, dy: &Tensor, dbias: &mut Tensor) -> Result<()> {
        let dbias = write::<f32>("linear", "dbias", dbias)?;
        dispatch_float!(dy.dtype(), T => self.sum_rows::<T>(read(dy), dbias));
        Ok(())
    }
}
