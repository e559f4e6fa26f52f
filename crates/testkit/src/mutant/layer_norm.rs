//! Faults of LayerNorm.

use unsloth_core::{
    Backend, Result, Tensor,
    ops::layer_norm::{Affine, Backward, Forward, LayerNorm, ParameterGradients, Spec},
};

use super::{MutantBackend, Mutation, mapped, zeros_like};

impl<B: Backend> LayerNorm for MutantBackend<B> {
    fn layer_norm_forward(
        &self,
        spec: &Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        affine: Affine<'_>,
    ) -> Result<Forward> {
        let mut spec = *spec;
        if self.has(Mutation::LayerNormDropsEps) {
            spec.eps = 1e-30;
        }
        if self.has(Mutation::LayerNormIgnoresMean) {
            // What RMSNorm gives, with the bias.
            let norm = unsloth_core::ops::rms_norm::Spec {
                rows: spec.rows,
                hidden_size: spec.hidden_size,
                eps: spec.eps,
                weight_offset: 0.0,
                dtype: spec.dtype,
                weight_dtype: spec.weight_dtype,
            };
            let mean = self.inner.layer_norm_forward(&spec, mapped(&x, |x| x)?, residual, affine)?.mean;
            let found = self.inner.rms_norm_forward(&norm, x, residual, affine.weight)?;
            return Ok(Forward { out: found.out, sum: found.sum, mean, rstd: found.rstd });
        }
        if self.has(Mutation::LayerNormDropsBias) {
            return self.inner.layer_norm_forward(&spec, x, residual, Affine { bias: None, ..affine });
        }
        if self.has(Mutation::LayerNormDropsResidual) {
            let zeros = residual.map(zeros_like).transpose()?;
            return self.inner.layer_norm_forward(&spec, x, zeros.as_ref(), affine);
        }
        self.inner.layer_norm_forward(&spec, x, residual, affine)
    }

    fn layer_norm_backward(
        &self,
        spec: &Spec,
        mut inputs: Backward<'_>,
        mut gradients: ParameterGradients<'_>,
    ) -> Result<Tensor> {
        if self.has(Mutation::LayerNormDropsDsum) {
            inputs.dsum = None;
        }
        if self.has(Mutation::LayerNormOverwritesDbias)
            && let Some(dbias) = &mut gradients.dbias
        {
            self.inner.fill_zero(dbias)?;
        }
        if self.has(Mutation::LayerNormForgetsDweight) {
            gradients.dweight = None;
        }
        if self.has(Mutation::LayerNormGradientIgnoresMean) {
            // Without a mean to subtract, a constant that is added to every gradient of a row shows.
            let zeros = zeros_like(inputs.mean)?;
            return self.inner.layer_norm_backward(spec, Backward { mean: &zeros, ..inputs }, gradients);
        }
        if self.has(Mutation::LayerNormDropsProjection) {
            let (dout, zeros) = (mapped(&inputs.dout, |g| g)?, zeros_like(inputs.sum)?);
            let mean = zeros_like(inputs.mean)?;
            let constant = Backward { dout, sum: &zeros, mean: &mean, ..inputs };
            self.inner.layer_norm_backward(spec, inputs, gradients)?;
            return self.inner.layer_norm_backward(spec, constant, ParameterGradients::default());
        }
        self.inner.layer_norm_backward(spec, inputs, gradients)
    }
}
