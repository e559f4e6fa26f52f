//! LoRA linear: the products of rank r around those of [`super::linear`].

use std::ops::Range;

use unsloth_core::{
    Category, DType, Result, Tensor, Weight,
    ops::lora_linear::{Adapter, Backward, Forward, LoraLinear, ParameterGradients, Spec},
};

use crate::{
    access::{output, read, write},
    backend::CpuBackend,
    dropout::Mask,
    gemm::{Into, Mat, MatMut, matmul},
    linear::{LowRank, ROW_BLOCK, Widened, blocks, dense},
};

/// One side of a product of rank r: a tensor `[rows, cols]`, or what dropout leaves of it.
#[derive(Clone, Copy)]
struct Side<'a> {
    tensor: &'a Tensor,
    mask: Option<&'a Mask<'a>>,
}

impl Side<'_> {
    /// Factor that [`CpuBackend::side`] leaves out.
    fn scale(&self) -> f32 {
        self.mask.map_or(1.0, Mask::kept_scale)
    }

    /// Rows at work at once: all where they are read as they are.
    fn row_block(&self) -> usize {
        let as_is = self.mask.is_none() && self.tensor.dtype() == DType::F32;
        if as_is { self.tensor.shape()[0] } else { ROW_BLOCK }
    }
}

impl CpuBackend {
    fn side<'a>(&self, side: Side<'a>, rows: Range<usize>) -> Result<Widened<'a>> {
        let cols = side.tensor.shape()[1];
        match side.mask {
            None => self.widened(side.tensor, rows.start * cols..rows.end * cols),
            Some(mask) => Ok(Widened::Scratch(self.dropped(side.tensor, rows, mask)?)),
        }
    }

    /// `scale * x R^T` (f32 `[rows, rank]`) for `right = [rank, cols]`, or `scale * x R` for `[cols, rank]`.
    fn to_rank(&self, x: Side<'_>, right: Mat<'_>, rank: usize, scale: f32) -> Result<Tensor> {
        let (rows, cols) = (x.tensor.shape()[0], x.tensor.shape()[1]);
        let mut h = output(x.tensor, DType::F32, [rows, rank], Category::Activations)?;
        let target = write::<f32>("lora_linear", "h", &mut h)?;
        for row in blocks(rows, x.row_block()) {
            let wide = self.side(x, row.clone())?;
            let target = MatMut::new(&mut target[row.start * rank..row.end * rank], row.len(), rank, rank);
            matmul(scale * x.scale(), Mat::new(&wide, row.len(), cols, cols), right, target, Into::Overwrite);
        }
        Ok(h)
    }

    /// `dlora_a += dh^T x` for an f32 `dh`, `[rows, rank]`.
    fn accumulate_a(&self, dh: &Tensor, x: Side<'_>, dlora_a: &mut [f32]) -> Result<()> {
        let (rank, cols) = (dh.shape()[1], x.tensor.shape()[1]);
        for row in blocks(dh.shape()[0], x.row_block()) {
            let wide = self.side(x, row.clone())?;
            let left = Mat::new(&read::<f32>(dh)[row.start * rank..row.end * rank], row.len(), rank, rank);
            let right = Mat::new(&wide, row.len(), cols, cols);
            matmul(x.scale(), left.t(), right, MatMut::new(dlora_a, rank, cols, cols), Into::Add);
        }
        Ok(())
    }
}

impl LoraLinear for CpuBackend {
    fn lora_linear_has_dropout(&self) -> bool {
        true
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
        let (rank, in_features, out_features) = (spec.rank, spec.base.in_features, spec.base.out_features);
        let mask = adapter.dropout.as_ref().map(Mask::new);
        self.run(|| {
            let a = self.widened(adapter.lora_a, 0..rank * in_features)?;
            let dropped = Side { tensor: x, mask: mask.as_ref() };
            let h = self.to_rank(dropped, Mat::new(&a, rank, in_features, in_features).t(), rank, 1.0)?;
            let b = self.widened(adapter.lora_b, 0..out_features * rank)?;
            let low_rank = LowRank { left: read(&h), right: &b, rank, scale: spec.scale, mask: None };
            let y = self.project(x, weight, bias, Some(low_rank))?;
            Ok(Forward { y, h })
        })
    }

    fn lora_linear_backward(
        &self,
        spec: &Spec,
        inputs: Backward<'_>,
        gradients: ParameterGradients<'_>,
    ) -> Result<Option<Tensor>> {
        const OP: &str = "lora_linear";
        let (rank, in_features, out_features) = (spec.rank, spec.base.in_features, spec.base.out_features);
        let Backward { dy, x, h, weight, adapter, needs_dx } = inputs;
        let weight = dense(OP, weight)?;
        let mask = adapter.dropout.as_ref().map(Mask::new);
        self.run(|| {
            if let Some(dlora_b) = gradients.dlora_b {
                let dlora_b = write::<f32>(OP, "dlora_b", dlora_b)?;
                self.accumulate_product((dy, out_features), (h, rank), spec.scale, dlora_b)?;
            }
            if gradients.dlora_a.is_none() && !needs_dx {
                return Ok(None);
            }
            let b = self.widened(adapter.lora_b, 0..out_features * rank)?;
            let whole = Side { tensor: dy, mask: None };
            let dh = self.to_rank(whole, Mat::new(&b, out_features, rank, rank), rank, spec.scale)?;
            if let Some(dlora_a) = gradients.dlora_a {
                let dlora_a = write::<f32>(OP, "dlora_a", dlora_a)?;
                self.accumulate_a(&dh, Side { tensor: x, mask: mask.as_ref() }, dlora_a)?;
            }
            if !needs_dx {
                return Ok(None);
            }
            let a = self.widened(adapter.lora_a, 0..rank * in_features)?;
            let low_rank = LowRank { left: read(&dh), right: &a, rank, scale: 1.0, mask: mask.as_ref() };
            self.project_back(dy, weight, Some(low_rank)).map(Some)
        })
    }
}
