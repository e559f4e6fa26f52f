//! Reductions on the kernels of `unsloth-pointwise`.

use cubecl::{prelude::Runtime, server::Handle};
use unsloth_core::{DType, Result, Tensor, ops::reduce::Reduce};
use unsloth_pointwise::reduce::{self as kernels, Exponent, NormPlan, Part, Reduction};

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
    /// Both steps, over all `tensors`, of which each has partial results of its own.
    fn reduce(&self, op: &'static str, reduction: Reduction, tensors: &[&Tensor]) -> Result<Tensor> {
        let total_parts = tensors.iter().map(|x| kernels::parts(x.num_elements())).sum();
        let len = kernels::workspace_len(reduction, total_parts);
        let mut workspace = workspace(op, tensors[0], DType::F32, [len])?;
        let workspace = handle_mut(op, "workspace", &mut workspace)?;
        let mut at = 0;
        for x in tensors {
            let part = Part { x: handle(x), len: x.num_elements(), workspace, at, total_parts };
            self.launch(op, |client| match reduction {
                Reduction::AllFinite => kernels::partial_finite(client, exponent(x.dtype()), part),
                _ => dispatch_float!(x.dtype(), E => kernels::partial_sum::<R, E>(client, part)),
            })?;
            at += kernels::parts(part.len);
        }
        self.fold(op, reduction, (total_parts, workspace), tensors[0])
    }

    /// The second step.
    fn fold(
        &self,
        op: &'static str,
        reduction: Reduction,
        (parts, workspace): (usize, &Handle),
        like: &Tensor,
    ) -> Result<Tensor> {
        let mut out = output(op, like, DType::F32, [1])?;
        let to_out = handle_mut(op, "out", &mut out)?;
        self.launch(op, |client| kernels::fold(client, reduction, parts, workspace, to_out))?;
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
        const OP: &str = "grad_norm";
        let of_type = |dtype| -> Vec<_> {
            let tensors = tensors.iter().filter(|x| x.dtype() == dtype);
            tensors.map(|x| (handle(x), x.num_elements())).collect()
        };
        let by_type = DType::FLOATS.map(|dtype| (dtype, of_type(dtype)));
        let plan = |(dtype, tensors): &(DType, Vec<_>)| (*dtype, NormPlan::new(self.client(), tensors));
        let plans: Vec<_> = by_type.iter().map(plan).collect();
        let total_parts = plans.iter().map(|(_, plan)| plan.parts()).sum();
        let len = kernels::workspace_len(Reduction::Norm, total_parts);
        let mut workspace = workspace(OP, tensors[0], DType::F32, [len])?;
        let workspace = handle_mut(OP, "workspace", &mut workspace)?;
        let mut at = 0;
        for (dtype, plan) in plans.iter().filter(|(_, plan)| plan.parts() > 0) {
            let parts = (at, total_parts);
            self.launch(
                OP,
                |client| dispatch_float!(*dtype, E => kernels::partial_norm::<R, E>(client, plan, workspace, parts)),
            )?;
            at += plan.parts();
        }
        self.fold(OP, Reduction::Norm, (total_parts, workspace), tensors[0])
    }
}
