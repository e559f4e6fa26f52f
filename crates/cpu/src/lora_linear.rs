//! LoRA linear: the products of rank r around those of [`super::linear`].

use unsloth_core::{
    Category, DType, Result, Tensor, Weight,
    ops::lora_linear::{Adapter, Backward, Forward, LoraLinear, ParameterGradients, Spec},
};

use crate::{
    access::{output, write},
    backend::CpuBackend,
    gemm::{Into, Mat, MatMut, matmul},
    linear::{LowRank, blocks, dense},
};

/// Rows that are widened at a time for the rank-r products.
const ROW_BLOCK: usize = 512;

impl CpuBackend {
    /// `x R^T` (f32 `[rows, rank]`) for `right = [rank, cols]`, or `x R` for `[cols, rank]`.
    fn to_rank(&self, x: &Tensor, right: Mat<'_>, (cols, rank): (usize, usize), scale: f32) -> Result<Tensor> {
        let rows = x.shape()[0];
        let mut h = output(x, DType::F32, [rows, rank], Category::Activations)?;
        let target = write::<f32>("lora_linear", "h", &mut h)?;
        for row in blocks(rows, if x.dtype() == DType::F32 { rows } else { ROW_BLOCK }) {
            let x = self.widened(x, row.start * cols..row.end * cols)?;
            let target = MatMut::new(&mut target[row.start * rank..row.end * rank], row.len(), rank, rank);
            matmul(scale, Mat::new(&x, row.len(), cols, cols), right, target, Into::Overwrite);
        }
        Ok(h)
    }
}

impl LoraLinear for CpuBackend {
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
        self.run(|| {
            let a = self.widened(adapter.lora_a, 0..rank * in_features)?;
            let h = self.to_rank(x, Mat::new(&a, rank, in_features, in_features).t(), (in_features, rank), 1.0)?;
            let b = self.widened(adapter.lora_b, 0..out_features * rank)?;
            let low_rank = LowRank { left: crate::access::read(&h), right: &b, rank, scale: spec.scale };
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
        self.run(|| {
            if let Some(dlora_b) = gradients.dlora_b {
                let dlora_b = write::<f32>(OP, "dlora_b", dlora_b)?;
                self.accumulate_product((dy, out_features), (h, rank), spec.scale, dlora_b)?;
            }
            if gradients.dlora_a.is_none() && !needs_dx {
                return Ok(None);
            }
            let b = self.widened(adapter.lora_b, 0..out_features * rank)?;
            let dh = self.to_rank(dy, Mat::new(&b, out_features, rank, rank), (out_features, rank), spec.scale)?;
            if let Some(dlora_a) = gradients.dlora_a {
                let dlora_a = write::<f32>(OP, "dlora_a", dlora_a)?;
                self.accumulate_product((&dh, rank), (x, in_features), 1.0, dlora_a)?;
            }
            if !needs_dx {
                return Ok(None);
            }
            let a = self.widened(adapter.lora_a, 0..rank * in_features)?;
            let low_rank = LowRank { left: crate::access::read(&dh), right: &a, rank, scale: 1.0 };
            self.project_back(dy, weight, Some(low_rank)).map(Some)
        })
    }
}
