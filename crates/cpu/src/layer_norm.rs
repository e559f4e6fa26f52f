//! LayerNorm by rows: see [`crate::norm`].

use unsloth_core::{
    Category, DType, Result, Tensor,
    ops::layer_norm::{Affine, Backward, Forward, LayerNorm, ParameterGradients, Spec},
};

use crate::{
    CpuBackend,
    access::{dispatch_float, output, read, write},
    elementwise::Reused,
    norm::{self, Arguments, Norm},
};

const OP: &str = "layer_norm";

fn of_spec<'a>(spec: &Spec, weight: &'a [f32], bias: Option<&'a [f32]>) -> Norm<'a> {
    let &Spec { rows, hidden_size, eps, .. } = spec;
    let channels = |values: &'a [f32]| &values[..hidden_size];
    Norm { rows, hidden_size, eps, weight: channels(weight), bias: bias.map(channels) }
}

impl LayerNorm for CpuBackend {
    fn layer_norm_forward(
        &self,
        spec: &Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        affine: Affine<'_>,
    ) -> Result<Forward> {
        let mut out = output(&x, spec.dtype, [spec.rows, spec.hidden_size], Category::Activations)?;
        let mut mean = output(&x, DType::F32, [spec.rows], Category::Activations)?;
        let mut rstd = output(&x, DType::F32, [spec.rows], Category::Activations)?;
        let weight = self.channels(affine.weight, 0.0)?;
        let bias = affine.bias.map(|bias| self.channels(bias, 0.0)).transpose()?;
        let (x, sum) = match residual {
            None => (Some(x), None),
            Some(residual) => {
                let mut sum = Reused::new(x)?;
                dispatch_float!(spec.dtype, T => self.add_residual::<T>(OP, &mut sum, residual)?);
                (None, Some(sum.out))
            }
        };
        let (means, rstds) = (write::<f32>(OP, "mean", &mut mean)?, write::<f32>(OP, "rstd", &mut rstd)?);
        if spec.hidden_size == 0 {
            means.fill(0.0);
            rstds.fill(1.0 / spec.eps.sqrt());
        } else if let Some(x) = x.as_ref().or(sum.as_ref()) {
            dispatch_float!(spec.dtype, T => {
                let out = write::<T>(OP, "out", &mut out)?;
                self.normalise::<T, true>(of_spec(spec, &weight, bias.as_deref()), read::<T>(x), out, (means, rstds));
            });
        }
        Ok(Forward { out, sum, mean, rstd })
    }

    fn layer_norm_backward(
        &self,
        spec: &Spec,
        inputs: Backward<'_>,
        gradients: ParameterGradients<'_>,
    ) -> Result<Tensor> {
        let Backward { dout, dsum, sum, weight, mean, rstd } = inputs;
        let weight = self.channels(weight, 0.0)?;
        let gradients = norm::ParameterGradients {
            dweight: gradients.dweight.map(|dweight| write::<f32>(OP, "dweight", dweight)).transpose()?,
            dbias: gradients.dbias.map(|dbias| write::<f32>(OP, "dbias", dbias)).transpose()?,
        };
        let mut dx = Reused::new(dout)?;
        if spec.rows == 0 || spec.hidden_size == 0 {
            return Ok(dx.out);
        }
        dispatch_float!(spec.dtype, T => {
            let (dx, dout_source) = dx.slices::<T>(OP)?;
            let (dsum, sum) = (dsum.map(read::<T>), read::<T>(sum));
            let args = Arguments { dout_source, dsum, sum, mean: read::<f32>(mean), rstd: read::<f32>(rstd) };
            self.backward_rows::<T, true>(of_spec(spec, &weight, None), args, dx, gradients)?;
        });
        Ok(dx.out)
    }
}
