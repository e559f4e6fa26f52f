//! RMSNorm on the kernels of `unsloth-norm`.

use cubecl::prelude::*;
use unsloth_core::{
    DType, Result, Tensor,
    ops::{
        elementwise::Elementwise,
        rms_norm::{Backward, Forward, RmsNorm, Spec},
    },
};
use unsloth_norm::{Gradient, column_parts, rms_norm as kernels};

use crate::{
    access::{dispatch_float, handle, handle_mut, output, workspace},
    backend::CubeBackend,
};

const OP: &str = "rms_norm";

fn shape(spec: &Spec) -> kernels::Shape {
    let &Spec { rows, hidden_size, eps, weight_offset, .. } = spec;
    kernels::Shape { rows, hidden_size, eps, weight_offset }
}

impl<R: Runtime> RmsNorm for CubeBackend<R> {
    fn rms_norm_forward(&self, spec: &Spec, x: Tensor, residual: Option<&Tensor>, weight: &Tensor) -> Result<Forward> {
        let mut out = output(OP, &x, spec.dtype, [spec.rows, spec.hidden_size])?;
        let mut rstd = output(OP, &x, DType::F32, [spec.rows])?;
        let mut x = if residual.is_none() || x.is_unique() { x } else { self.copy(&x)? };
        let args = kernels::Forward {
            // Written only where there is a residual.
            x: if residual.is_some() { handle_mut(OP, "sum", &mut x)? } else { handle(&x) },
            residual: residual.map(handle),
            weight: handle(weight),
            out: handle_mut(OP, "out", &mut out)?,
            rstd: handle_mut(OP, "rstd", &mut rstd)?,
        };
        self.launch(OP, |client| {
            dispatch_float!(spec.dtype, E => dispatch_float!(spec.weight_dtype, W =>
                kernels::forward::<R, E, W>(client, shape(spec), args)))
        })?;
        Ok(Forward { out, sum: residual.map(|_| x), rstd })
    }

    fn rms_norm_backward(&self, spec: &Spec, inputs: Backward<'_>, dweight: Option<&mut Tensor>) -> Result<Tensor> {
        let mut dx = if inputs.dout.is_unique() { inputs.dout } else { self.copy(&inputs.dout)? };
        let sums = [column_parts(spec.rows, spec.hidden_size), spec.hidden_size];
        let partial = dweight.is_some().then(|| workspace(OP, &dx, DType::F32, sums)).transpose()?;
        let total = dweight.map(|dweight| handle_mut(OP, "dweight", dweight)).transpose()?;
        let args = kernels::Backward {
            dout: handle_mut(OP, "dx", &mut dx)?,
            dsum: inputs.dsum.map(handle),
            sum: handle(inputs.sum),
            weight: handle(inputs.weight),
            rstd: handle(inputs.rstd),
            dweight: partial.as_ref().zip(total).map(|(partial, total)| Gradient { workspace: handle(partial), total }),
        };
        self.launch(OP, |client| {
            dispatch_float!(spec.dtype, E => dispatch_float!(spec.weight_dtype, W =>
                kernels::backward::<R, E, W>(client, shape(spec), args)))
        })?;
        Ok(dx)
    }
}
