//! LoRA linear: the products of rank r around those of [`super::linear`].

use unsloth_core::{
    Category, DType, Result, Tensor, Weight,
    ops::lora_linear::{Adapter, Backward, Forward, LoraLinear, ParameterGradients, Spec},
};

use crate::{
    access::{dispatch_float, output, write},
    backend::CpuBackend,
    dropout::Mask,
    linear::{blocks, dense},
    matmul::{Into, Mat, MatMut, Sum, Term},
    simd,
};

/// Rows of which dropout is at work at once.
const ROW_BLOCK: usize = 512;

impl CpuBackend {
    /// `factor * x right^T`, f32 `[rows, rank]`, for `right = [rank, cols]` and what dropout leaves of `x`.
    fn to_rank(&self, x: &Tensor, mask: Option<&Mask<'_>>, right: Mat<'_>, factor: f32) -> Result<Tensor> {
        let (rows, rank) = Term::new(Mat::of(x), right).shape();
        let mut h = output(x, DType::F32, [rows, rank], Category::Activations)?;
        let target = write::<f32>("lora_linear", "h", &mut h)?;
        let Some(mask) = mask else {
            let term = Term { factor, left: Mat::of(x), right };
            self.product(Sum::new(&[term], Into::Overwrite), MatMut::new(target, rows, rank, rank))?;
            return Ok(h);
        };
        for block in blocks(rows, ROW_BLOCK) {
            let left = self.dropped(x, block.clone(), mask)?;
            let left = Mat::f32(&left, block.len(), x.shape()[1]);
            let term = Term { factor: factor * mask.kept_scale(), left, right };
            let target = &mut target[block.start * rank..block.end * rank];
            self.product(Sum::new(&[term], Into::Overwrite), MatMut::new(target, block.len(), rank, rank))?;
        }
        Ok(h)
    }

    /// `dlora_a += dh^T x` for what dropout leaves of `x`.
    fn accumulate_a(&self, dh: &Tensor, x: &Tensor, mask: Option<&Mask<'_>>, dlora_a: &mut [f32]) -> Result<()> {
        let Some(mask) = mask else {
            return self.accumulate_product(dh, x, 1.0, dlora_a);
        };
        let (rank, cols) = (dh.shape()[1], x.shape()[1]);
        for block in blocks(dh.shape()[0], ROW_BLOCK) {
            let right = self.dropped(x, block.clone(), mask)?;
            let right = Mat::f32(&right, block.len(), cols).t();
            let term = Term { factor: mask.kept_scale(), left: Mat::of(dh).rows(block).t(), right };
            self.product(Sum::new(&[term], Into::Add), MatMut::new(dlora_a, rank, cols, cols))?;
        }
        Ok(())
    }

    /// `dx = dy W + drop(dh A)`: the update first, since dropout must not touch what is added to it.
    fn dropped_back(&self, dy: &Tensor, weight: &Tensor, update: Term<'_>, mask: &Mask<'_>) -> Result<Tensor> {
        let (rows, cols) = update.shape();
        let mut dx = output(dy, dy.dtype(), [rows, cols], Category::Activations)?;
        let fill = |block: std::ops::Range<usize>, target: &mut [f32]| -> Result<()> {
            let term = Term { factor: mask.kept_scale(), left: update.left.rows(block.clone()), right: update.right };
            let into = MatMut::new(target, block.len(), cols, cols);
            self.product(Sum::new(&[term], Into::Overwrite), into)?;
            mask.zero(self, block.clone(), (0, cols), target);
            let term = Term::new(Mat::of(dy).rows(block.clone()), Mat::of(weight).t());
            self.product(Sum::new(&[term], Into::Add), MatMut::new(target, block.len(), cols, cols))
        };
        if dy.dtype() == DType::F32 {
            fill(0..rows, write::<f32>("lora_linear", "dx", &mut dx)?)?;
            return Ok(dx);
        }
        for block in blocks(rows, ROW_BLOCK) {
            let elements = block.start * cols..block.end * cols;
            let mut wide = self.workspace(elements.len())?;
            fill(block, &mut wide)?;
            dispatch_float!(dy.dtype(), T => {
                simd::narrow(&wide, &mut write::<T>("lora_linear", "dx", &mut dx)?[elements]);
            });
        }
        Ok(dx)
    }
}

impl LoraLinear for CpuBackend {
    fn lora_linear_hidden(&self, _spec: &Spec, x: &Tensor, adapter: Adapter<'_>) -> Result<Tensor> {
        let mask = adapter.dropout.as_ref().map(Mask::new);
        self.to_rank(x, mask.as_ref(), Mat::of(adapter.lora_a), 1.0)
    }

    fn lora_linear_forward(
        &self,
        spec: &Spec,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        adapter: Adapter<'_>,
    ) -> Result<Forward> {
        let weight = dense("lora_linear", weight)?;
        let h = self.lora_linear_hidden(spec, x, adapter)?;
        let low_rank = Term { factor: spec.scale, left: Mat::of(&h), right: Mat::of(adapter.lora_b) };
        let y = self.project(x, weight, bias, Some(low_rank))?;
        Ok(Forward { y, h })
    }

    fn lora_linear_backward(
        &self,
        spec: &Spec,
        inputs: Backward<'_>,
        gradients: ParameterGradients<'_>,
    ) -> Result<Option<Tensor>> {
        const OP: &str = "lora_linear";
        let Backward { dy, x, h, weight, adapter, needs_dx } = inputs;
        let weight = dense(OP, weight)?;
        let mask = adapter.dropout.as_ref().map(Mask::new);
        if let Some(dlora_b) = gradients.dlora_b {
            self.accumulate_product(dy, h, spec.scale, write::<f32>(OP, "dlora_b", dlora_b)?)?;
        }
        if gradients.dlora_a.is_none() && !needs_dx {
            return Ok(None);
        }
        let dh = self.to_rank(dy, None, Mat::of(adapter.lora_b).t(), spec.scale)?;
        if let Some(dlora_a) = gradients.dlora_a {
            self.accumulate_a(&dh, x, mask.as_ref(), write::<f32>(OP, "dlora_a", dlora_a)?)?;
        }
        if !needs_dx {
            return Ok(None);
        }
        let update = Term::new(Mat::of(&dh), Mat::of(adapter.lora_a).t());
        match &mask {
            None => self.project_back(dy, weight, Some(update)),
            Some(mask) => self.dropped_back(dy, weight, update, mask),
        }
        .map(Some)
    }
}
