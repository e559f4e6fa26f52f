//! LayerNorm on the kernels of `unsloth-norm`.

use cubecl::prelude::*;
use unsloth_core::{
    DType, Result, Tensor,
    ops::{
        elementwise::Elementwise,
        layer_norm::{Affine, Backward, Forward, LayerNorm, ParameterGradients, Spec},
    },
};
use unsloth_norm::{Gradient, column_parts, layer_norm as kernels};

use crate::{
    access::{dispatch_float, handle, handle_mut, output, workspace},
    backend::CubeBackend,
};

const OP: &str = "layer_norm";

fn shape(spec: &Spec) -> kernels::Shape {
    let &Spec { rows, hidden_size, eps, .. } = spec;
    kernels::Shape { rows, hidden_size, eps }
}

fn gradient<'a>(partial: Option<&'a Tensor>, total: Option<&'a cubecl::server::Handle>) -> Option<Gradient<'a>> {
    Some(Gradient { workspace: handle(partial?), total: total? })
}

impl<R: Runtime> LayerNorm for CubeBackend<R> {
    fn layer_norm_forward(
        &self,
        spec: &Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        affine: Affine<'_>,
    ) -> Result<Forward> {
        let mut out = output(OP, &x, spec.dtype, [spec.rows, spec.hidden_size])?;
        let mut mean = output(OP, &x, DType::F32, [spec.rows])?;
        let mut rstd = output(OP, &x, DType::F32, [spec.rows])?;
        let mut x = if residual.is_none() || x.is_unique() { x } else { self.copy(&x)? };
        let args = kernels::Forward {
            // Written only where there is a residual.
            x: if residual.is_some() { handle_mut(OP, "sum", &mut x)? } else { handle(&x) },
            residual: residual.map(handle),
            weight: handle(affine.weight),
            bias: affine.bias.map(handle),
            out: handle_mut(OP, "out", &mut out)?,
            statistics: kernels::Statistics {
                mean: handle_mut(OP, "mean", &mut mean)?,
                rstd: handle_mut(OP, "rstd", &mut rstd)?,
            },
        };
        self.launch(OP, |client| {
            dispatch_float!(spec.dtype, E => dispatch_float!(spec.weight_dtype, W =>
                kernels::forward::<R, E, W>(client, shape(spec), args)))
        })?;
        Ok(Forward { out, sum: residual.map(|_| x), mean, rstd })
    }

    fn layer_norm_backward(
        &self,
        spec: &Spec,
        inputs: Backward<'_>,
        gradients: ParameterGradients<'_>,
    ) -> Result<Tensor> {
        let Backward { dout, dsum, sum, weight, mean, rstd } = inputs;
        let ParameterGradients { dweight, dbias } = gradients;
        let mut dx = if dout.is_unique() { dout } else { self.copy(&dout)? };
        let sums = [column_parts(spec.rows, spec.hidden_size), spec.hidden_size];
        let partial = || workspace(OP, sum, DType::F32, sums);
        let of_weight = dweight.is_some().then(partial).transpose()?;
        let of_bias = dbias.is_some().then(partial).transpose()?;
        let dweight = dweight.map(|dweight| handle_mut(OP, "dweight", dweight)).transpose()?;
        let dbias = dbias.map(|dbias| handle_mut(OP, "dbias", dbias)).transpose()?;
        let args = kernels::Backward {
            dout: handle_mut(OP, "dx", &mut dx)?,
            dsum: dsum.map(handle),
            sum: handle(sum),
            weight: handle(weight),
            statistics: kernels::Statistics { mean: handle(mean), rstd: handle(rstd) },
            dweight: gradient(of_weight.as_ref(), dweight),
            dbias: gradient(of_bias.as_ref(), dbias),
        };
        self.launch(OP, |client| {
            dispatch_float!(spec.dtype, E => dispatch_float!(spec.weight_dtype, W =>
                kernels::backward::<R, E, W>(client, shape(spec), args)))
        })?;
        Ok(dx)
    }
}
