//! Reductions on the kernels of `unsloth-pointwise`.

use cubecl::prelude::Runtime;
use unsloth_core::{DType, Result, Tensor, ops::reduce::Reduce};
use unsloth_pointwise::reduce::{self as kernels, Exponent, Part, Reduction};

use crate::{
    access::{dispatch_float, handle, handle_mut, output, workspace},
    backend::CubeBackend,
};

fn exponent(dtype: DType) -> Exponent {
    match dtype {
        DType::F16 => Exponent::F16,
        DType::BF16 => Exponent::BF16,
        _ => Exponent::F32,
    }
}

impl<R: Runtime> CubeBackend<R> {
    /// Both steps, over all `tensors`.
    fn reduce(&self, op: &'static str, reduction: Reduction, tensors: &[&Tensor]) -> Result<Tensor> {
        let total_parts = tensors.iter().map(|x| kernels::parts(x.num_elements())).sum();
        let len = kernels::workspace_len(reduction, total_parts);
        let mut workspace = workspace(op, tensors[0], DType::F32, [len])?;
        let workspace = handle_mut(op, "workspace", &mut workspace)?;
        let mut at = 0;
        for x in tensors {
            let part = Part { x: handle(x), len: x.num_elements(), workspace, at, total_parts };
            self.launch(op, |client| match reduction {
                Reduction::Sum => dispatch_float!(x.dtype(), E => kernels::partial_sum::<R, E>(client, part)),
                Reduction::Norm => dispatch_float!(x.dtype(), E => kernels::partial_norm::<R, E>(client, part)),
                Reduction::AllFinite => kernels::partial_finite(client, exponent(x.dtype()), part),
            })?;
            at += kernels::parts(part.len);
        }
        let mut out = output(op, tensors[0], DType::F32, [1])?;
        let to_out = handle_mut(op, "out", &mut out)?;
        self.launch(op, |client| kernels::fold(client, reduction, total_parts, workspace, to_out))?;
        Ok(out)
    }
}

impl<R: Runtime> Reduce for CubeBackend<R> {
    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        self.reduce("sum", Reduction::Sum, &[x])
    }

    fn all_finite(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        self.reduce("all_finite", Reduction::AllFinite, tensors)
    }

    fn grad_norm(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        self.reduce("grad_norm", Reduction::Norm, tensors)
    }
}
