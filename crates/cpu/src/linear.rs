//! Matrix products with a weight `[out_features, in_features]`: `x W^T`, `dy W`, `dy^T x`, with the rank-r parts of LoRA fused.
//!
//! Everything f32 goes to the `gemm` crate whole. Half-precision operands are widened block by block into pooled scratch, so
//! that no second copy of a weight ever exists; a weight block is widened once for up to [`ROW_BLOCK`] rows.

use std::ops::Range;

use rayon::prelude::*;
use unsloth_core::{Category, DType, Error, FloatElement, Result, Tensor, Weight, ops::linear};

use crate::{
    access::{dispatch_float, output, read, write},
    backend::{CpuBackend, Workspace},
    dropout::Mask,
    gemm::{Into, Mat, MatMut, matmul, narrow_columns, widen, widen_columns},
};

/// Rows of activations that share one widening of a weight block.
pub(crate) const ROW_BLOCK: usize = 512;
/// Elements of a widened weight block: 4 MiB stay in the outer cache while the rows pass by.
const WEIGHT_BLOCK: usize = 1 << 20;

/// Elements of a tensor as f32: the tensor's own where it is f32, else widened into scratch.
pub(crate) enum Widened<'a> {
    Own(&'a [f32]),
    Scratch(Workspace),
}

impl std::ops::Deref for Widened<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Widened::Own(slice) => slice,
            Widened::Scratch(workspace) => workspace,
        }
    }
}

/// The dense elements of a weight.
pub(crate) fn dense<'a>(op: &'static str, weight: &'a Weight) -> Result<&'a Tensor> {
    match weight {
        Weight::Dense(tensor) => Ok(tensor),
        _ => Err(Error::Unsupported { op, what: "this form of weight", device: "cpu".into() }),
    }
}

/// A step of a loop over `total` items: all at once where nothing has to be widened.
pub(crate) fn blocks(total: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..total).step_by(block.max(1)).map(move |start| start..(start + block).min(total))
}

/// The update `scale * h B^T` of an output, or `scale * drop(dh A)` of an input gradient.
#[derive(Clone, Copy)]
pub(crate) struct LowRank<'a> {
    /// f32 `[rows, rank]`
    pub(crate) left: &'a [f32],
    /// f32 `[out_features, rank]` for an output, `[rank, in_features]` for an input gradient.
    pub(crate) right: &'a [f32],
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// Dropout of an input gradient's update.
    pub(crate) mask: Option<&'a Mask<'a>>,
}

impl LowRank<'_> {
    /// Adds the update of some rows and columns to an input gradient, of which `c` holds them, rows `stride` apart. `left` is
    /// that of the rows. `scratch` has room for [`ROW_BLOCK`] rows where there is dropout.
    fn add_back(&self, c: &mut [f32], stride: usize, (row, col): (&Range<usize>, &Range<usize>), scratch: &mut [f32]) {
        let (right, width) = (&self.right[col.start..], col.len());
        let in_features = self.right.len() / self.rank;
        let right = Mat::new(right, self.rank, width, in_features);
        let left = |part: &Range<usize>| {
            Mat::new(&self.left[part.start * self.rank..part.end * self.rank], part.len(), self.rank, self.rank)
        };
        let Some(mask) = self.mask else {
            let c = MatMut::new(c, row.len(), width, stride);
            return matmul(self.scale, left(&(0..row.len())), right, c, Into::Add);
        };
        for part in blocks(row.len(), ROW_BLOCK) {
            let update = &mut scratch[..part.len() * width];
            let into = MatMut::new(update, part.len(), width, width);
            matmul(self.scale * mask.kept_scale(), left(&part), right, into, Into::Overwrite);
            mask.zero(row.start + part.start..row.start + part.end, (col.start, width), update);
            let c = c[part.start * stride..].par_chunks_mut(stride.max(1));
            let add = |(c, update): (&mut [f32], &[f32])| c.iter_mut().zip(update).for_each(|(c, update)| *c += update);
            c.zip(update.par_chunks(width.max(1))).for_each(add);
        }
    }
}

impl CpuBackend {
    /// Elements `range` of a float tensor as f32.
    pub(crate) fn widened<'a>(&self, tensor: &'a Tensor, range: Range<usize>) -> Result<Widened<'a>> {
        if tensor.dtype() == DType::F32 {
            return Ok(Widened::Own(&read::<f32>(tensor)[range]));
        }
        let mut scratch = self.workspace(range.len())?;
        dispatch_float!(tensor.dtype(), T => widen::<T>(&read(tensor)[range], &mut scratch));
        Ok(Widened::Scratch(scratch))
    }

    /// How many rows of a weight `[rows, cols]` to widen at a time.
    pub(crate) fn weight_rows(&self, weight: &Tensor) -> usize {
        let (rows, cols) = (weight.shape()[0], weight.shape()[1]);
        if weight.dtype() == DType::F32 { rows } else { (WEIGHT_BLOCK / cols.max(1)).clamp(64, 4096) }
    }

    /// `y = x W^T + bias + scale * h B^T`.
    pub(crate) fn project(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        low_rank: Option<LowRank<'_>>,
    ) -> Result<Tensor> {
        let (rows, in_features, out_features) = (x.shape()[0], x.shape()[1], weight.shape()[0]);
        let mut y = output(x, x.dtype(), [rows, out_features], Category::Activations)?;
        let bias = bias.map(|bias| self.widened(bias, 0..out_features)).transpose()?;
        let whole = x.dtype() == DType::F32 && weight.dtype() == DType::F32;
        for row in blocks(rows, if whole { rows } else { ROW_BLOCK }) {
            let wide_x = self.widened(x, row.start * in_features..row.end * in_features)?;
            let wide_x = Mat::new(&wide_x, row.len(), in_features, in_features);
            let low_rank = low_rank.map(|l| LowRank { left: &l.left[row.start * l.rank..row.end * l.rank], ..l });
            for out in blocks(out_features, self.weight_rows(weight)) {
                let wide_w = self.widened(weight, out.start * in_features..out.end * in_features)?;
                let wide_w = Mat::new(&wide_w, out.len(), in_features, in_features);
                self.on_block(&mut y, &row, &out, |c, stride| {
                    let into = match &bias {
                        Some(bias) => {
                            fill_rows(c, stride, &bias[out.clone()]);
                            Into::Add
                        }
                        None => Into::Overwrite,
                    };
                    let shape = (row.len(), out.len());
                    matmul(1.0, wide_x, wide_w.t(), MatMut::new(c, shape.0, shape.1, stride), into);
                    if let Some(l) = &low_rank {
                        let left = Mat::new(l.left, shape.0, l.rank, l.rank);
                        let right = Mat::new(&l.right[out.start * l.rank..out.end * l.rank], shape.1, l.rank, l.rank);
                        let c = MatMut::new(c, shape.0, shape.1, stride);
                        matmul(l.scale, left, right.t(), c, Into::Add);
                    }
                })?;
            }
        }
        Ok(y)
    }

    /// `dx = dy W + scale * drop(dh A)`.
    pub(crate) fn project_back(&self, dy: &Tensor, weight: &Tensor, low_rank: Option<LowRank<'_>>) -> Result<Tensor> {
        let (rows, out_features, in_features) = (dy.shape()[0], weight.shape()[0], weight.shape()[1]);
        let mut dx = output(dy, dy.dtype(), [rows, in_features], Category::Activations)?;
        let (whole_dy, whole_weight) = (dy.dtype() == DType::F32, weight.dtype() == DType::F32);
        let columns = if whole_weight { in_features } else { (WEIGHT_BLOCK / out_features.max(1)).clamp(64, 4096) };
        for row in blocks(rows, if whole_dy && whole_weight { rows } else { ROW_BLOCK }) {
            let wide_dy = self.widened(dy, row.start * out_features..row.end * out_features)?;
            let wide_dy = Mat::new(&wide_dy, row.len(), out_features, out_features);
            let low_rank = low_rank.map(|l| LowRank { left: &l.left[row.start * l.rank..row.end * l.rank], ..l });
            for col in blocks(in_features, columns) {
                let (wide_w, stride_w) = if whole_weight {
                    (Widened::Own(read::<f32>(weight)), in_features)
                } else {
                    let mut scratch = self.workspace(out_features * col.len())?;
                    dispatch_float!(weight.dtype(), T =>
                        widen_columns::<T>(read(weight), in_features, col.start, &mut scratch, col.len()));
                    (Widened::Scratch(scratch), col.len())
                };
                let wide_w = Mat::new(&wide_w, out_features, col.len(), stride_w);
                let has_dropout = low_rank.is_some_and(|l| l.mask.is_some());
                let scratch_rows = if has_dropout { row.len().min(ROW_BLOCK) } else { 0 };
                let mut scratch = self.workspace(scratch_rows * col.len())?;
                self.on_block(&mut dx, &row, &col, |c, stride| {
                    let target = MatMut::new(c, row.len(), col.len(), stride);
                    matmul(1.0, wide_dy, wide_w, target, Into::Overwrite);
                    if let Some(l) = &low_rank {
                        l.add_back(c, stride, (&row, &col), &mut scratch);
                    }
                })?;
            }
        }
        Ok(dx)
    }

    /// Lets `fill` write an f32 block of a `[rows, cols]` tensor, given as a slice and its row stride: in place for f32, else
    /// through scratch that is then rounded.
    fn on_block(
        &self,
        to: &mut Tensor,
        row: &Range<usize>,
        col: &Range<usize>,
        fill: impl FnOnce(&mut [f32], usize),
    ) -> Result<()> {
        let stride = to.shape()[1];
        let start = row.start * stride;
        if to.dtype() == DType::F32 {
            fill(&mut write::<f32>("linear", "output", to)?[start + col.start..row.end * stride], stride);
            return Ok(());
        }
        let mut scratch = self.workspace(row.len() * col.len())?;
        fill(&mut scratch, col.len());
        dispatch_float!(to.dtype(), T => {
            let to = &mut write::<T>("linear", "output", to)?[start..row.end * stride];
            narrow_columns(&scratch, col.len(), to, stride, col.start);
        });
        Ok(())
    }

    /// `accumulator += scale * left^T right` over the rows of both; `left` is `[rows, m]`, `right` `[rows, n]`.
    pub(crate) fn accumulate_product(
        &self,
        (left, m): (&Tensor, usize),
        (right, n): (&Tensor, usize),
        scale: f32,
        accumulator: &mut [f32],
    ) -> Result<()> {
        let rows = left.num_elements().checked_div(m).unwrap_or(0);
        let whole = left.dtype() == DType::F32 && right.dtype() == DType::F32;
        for row in blocks(rows, if whole { rows } else { ROW_BLOCK }) {
            let wide_left = self.widened(left, row.start * m..row.end * m)?;
            let wide_right = self.widened(right, row.start * n..row.end * n)?;
            let (left, right) = (Mat::new(&wide_left, row.len(), m, m), Mat::new(&wide_right, row.len(), n, n));
            matmul(scale, left.t(), right, MatMut::new(accumulator, m, n, n), Into::Add);
        }
        Ok(())
    }
}

/// Every row of `c` (rows `stride` apart, the last one possibly shorter) starts with `row`.
fn fill_rows(c: &mut [f32], stride: usize, row: &[f32]) {
    if !row.is_empty() {
        c.par_chunks_mut(stride).for_each(|c| c[..row.len()].copy_from_slice(row));
    }
}

/// Rows of one partial sum; the boundaries do not depend on the number of threads.
const SUM_BLOCK: usize = 64;

fn sum_rows<T: FloatElement>(dy: &[T], dbias: &mut [f32]) {
    let features = dbias.len();
    if features == 0 {
        return;
    }
    let partials: Vec<Vec<f32>> = dy
        .par_chunks(features * SUM_BLOCK)
        .map(|rows| {
            let mut sum = vec![0.0f32; features];
            for row in rows.chunks_exact(features) {
                for (sum, value) in sum.iter_mut().zip(row) {
                    *sum += value.to_f32();
                }
            }
            sum
        })
        .collect();
    for partial in partials {
        for (dbias, partial) in dbias.iter_mut().zip(partial) {
            *dbias += partial;
        }
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
        self.run(|| self.project(x, weight, bias, None))
    }

    fn linear_input_gradient(&self, _spec: &linear::Spec, dy: &Tensor, weight: &Weight) -> Result<Tensor> {
        let weight = dense("linear", weight)?;
        self.run(|| self.project_back(dy, weight, None))
    }

    fn linear_weight_gradient(&self, spec: &linear::Spec, dy: &Tensor, x: &Tensor, dweight: &mut Tensor) -> Result<()> {
        let dweight = write::<f32>("linear", "dweight", dweight)?;
        self.run(|| self.accumulate_product((dy, spec.out_features), (x, spec.in_features), 1.0, dweight))
    }

    fn linear_bias_gradient(&self, _spec: &linear::Spec, dy: &Tensor, dbias: &mut Tensor) -> Result<()> {
        let dbias = write::<f32>("linear", "dbias", dbias)?;
        self.run(|| dispatch_float!(dy.dtype(), T => sum_rows::<T>(read(dy), dbias)));
        Ok(())
    }
}
