//! Faults of elementwise operators, reductions, embedding, RMSNorm, RoPE and GLU.

use unsloth_core::{
    Backend, DType, Result, Tensor, Weight,
    ops::{elementwise::Elementwise, embedding, glu, reduce::Reduce, rms_norm, rope},
};

use super::{MutantBackend, Mutation, edited, mapped, mapped_integers, zeros_like};

fn set_last(tensor: &Tensor, to: f64) -> Result<Tensor> {
    edited(tensor, |values| {
        if let Some(last) = values.last_mut() {
            *last = to;
        }
    })
}

impl<B: Backend> Elementwise for MutantBackend<B> {
    fn add(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        if self.has(Mutation::AddSubtracts) {
            return self.inner.add(a, &mapped(b, |b| -b)?);
        }
        self.inner.add(a, b)
    }

    fn mul(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        let product = self.inner.mul(a, b)?;
        if self.has(Mutation::MulSkipsTail) { set_last(&product, 0.0) } else { Ok(product) }
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        self.inner.scale(x, if self.has(Mutation::ScaleIgnoresFactor) { 1.0 } else { factor })
    }

    fn scale_by(&self, x: Tensor, scalar: &Tensor) -> Result<Tensor> {
        if self.has(Mutation::ScaleByIgnoresScalar) {
            return self.inner.scale(x, 1.0);
        }
        self.inner.scale_by(x, scalar)
    }

    fn accumulate(&self, accumulator: &mut Tensor, x: &Tensor) -> Result<()> {
        if self.has(Mutation::AccumulateOverwrites) {
            self.inner.fill_zero(accumulator)?;
        }
        self.inner.accumulate(accumulator, x)
    }

    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        if self.has(Mutation::CastTruncates) && dtype == DType::BF16 {
            let cut = mapped(x, |x| f64::from(f32::from_bits((x as f32).to_bits() & 0xFFFF_0000)))?;
            return self.inner.cast(&cut, dtype);
        }
        self.inner.cast(x, dtype)
    }

    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        if self.has(Mutation::CopyShares) { Ok(x.clone()) } else { self.inner.copy(x) }
    }

    fn fill_zero(&self, x: &mut Tensor) -> Result<()> {
        self.inner.fill_zero(x)?;
        if self.has(Mutation::FillZeroSkipsTail) && x.dtype().is_float() {
            *x = set_last(x, 1.0)?;
        }
        Ok(())
    }
}

impl<B: Backend> Reduce for MutantBackend<B> {
    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        if self.has(Mutation::SumSkipsTail) {
            return self.inner.sum(&set_last(x, 0.0)?);
        }
        let sum = self.inner.sum(x)?;
        if self.has(Mutation::SumInBf16) { mapped(&sum, |sum| crate::arith::round(DType::BF16, sum)) } else { Ok(sum) }
    }

    fn all_finite(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        if self.has(Mutation::FiniteLooksAtFirst) {
            return self.inner.all_finite(&tensors[..1]);
        }
        if self.has(Mutation::FiniteIgnoresInfinity) {
            let finite = |x: f64| if x.is_infinite() { 0.0 } else { x };
            let tensors = tensors.iter().map(|tensor| mapped(tensor, finite)).collect::<Result<Vec<_>>>()?;
            return self.inner.all_finite(&tensors.iter().collect::<Vec<_>>());
        }
        self.inner.all_finite(tensors)
    }

    fn grad_norm(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        if self.has(Mutation::NormIgnoresInfinity) {
            let finite = |x: &&Tensor| mapped(x, |x| if x.is_infinite() { 0.0 } else { x });
            let finite = tensors.iter().map(finite).collect::<Result<Vec<_>>>()?;
            return self.inner.grad_norm(&finite.iter().collect::<Vec<_>>());
        }
        let norm = self.inner.grad_norm(if self.has(Mutation::NormOfFirst) { &tensors[..1] } else { tensors })?;
        if self.has(Mutation::NormIsSquared) { mapped(&norm, |norm| norm * norm) } else { Ok(norm) }
    }
}

impl<B: Backend> embedding::Embedding for MutantBackend<B> {
    fn embedding_forward(&self, spec: &embedding::Spec, weight: &Weight, ids: &Tensor) -> Result<Tensor> {
        if self.has(Mutation::EmbeddingReadsNextRow) {
            let next = mapped_integers(ids, |_, id| id.wrapping_add(1).rem_euclid(spec.vocab_size as i32))?;
            return self.inner.embedding_forward(spec, weight, &next);
        }
        self.inner.embedding_forward(spec, weight, ids)
    }

    fn embedding_backward(
        &self,
        spec: &embedding::Spec,
        ids: &Tensor,
        dout: &Tensor,
        dweight: &mut Tensor,
    ) -> Result<()> {
        if self.has(Mutation::EmbeddingOverwritesGradient) {
            self.inner.fill_zero(dweight)?;
        }
        if self.has(Mutation::EmbeddingDropsRepeats) {
            let host = ids.to_vec::<i32>()?;
            let first_only = edited(dout, |dout| {
                for (t, id) in host.iter().enumerate() {
                    if host[..t].contains(id) {
                        dout[t * spec.hidden_size..][..spec.hidden_size].fill(0.0);
                    }
                }
            })?;
            return self.inner.embedding_backward(spec, ids, &first_only, dweight);
        }
        self.inner.embedding_backward(spec, ids, dout, dweight)
    }
}

impl<B: Backend> rms_norm::RmsNorm for MutantBackend<B> {
    fn rms_norm_forward(
        &self,
        spec: &rms_norm::Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        weight: &Tensor,
    ) -> Result<rms_norm::Forward> {
        let mut spec = *spec;
        if self.has(Mutation::NormDropsEps) {
            spec.eps = 1e-30;
        }
        if self.has(Mutation::NormDropsWeightOffset) {
            spec.weight_offset = 0.0;
        }
        if self.has(Mutation::NormDropsResidual) {
            let zeros = residual.map(zeros_like).transpose()?;
            return self.inner.rms_norm_forward(&spec, x, zeros.as_ref(), weight);
        }
        self.inner.rms_norm_forward(&spec, x, residual, weight)
    }

    fn rms_norm_backward(
        &self,
        spec: &rms_norm::Spec,
        mut inputs: rms_norm::Backward<'_>,
        mut dweight: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let mut spec = *spec;
        if self.has(Mutation::NormBackwardDropsWeightOffset) {
            spec.weight_offset = 0.0;
        }
        if self.has(Mutation::NormDropsDsum) {
            inputs.dsum = None;
        }
        if self.has(Mutation::NormOverwritesDweight)
            && let Some(dweight) = &mut dweight
        {
            self.inner.fill_zero(dweight)?;
        }
        if self.has(Mutation::NormScalesDweight)
            && let Some(dweight) = &mut dweight
        {
            let mut fresh = zeros_like(dweight)?;
            let dx = self.inner.rms_norm_backward(&spec, inputs, Some(&mut fresh))?;
            self.inner.accumulate(dweight, &self.inner.scale(fresh, 1.01)?)?;
            return Ok(dx);
        }
        if self.has(Mutation::NormDropsProjection) {
            let (dout, zeros) = (mapped(&inputs.dout, |g| g)?, zeros_like(inputs.sum)?);
            let constant = rms_norm::Backward { dout, sum: &zeros, ..inputs };
            self.inner.rms_norm_backward(&spec, inputs, dweight)?;
            return self.inner.rms_norm_backward(&spec, constant, None);
        }
        self.inner.rms_norm_backward(&spec, inputs, dweight)
    }
}

impl<B: Backend> rope::Rope for MutantBackend<B> {
    fn rope(&self, spec: &rope::Spec, q: Tensor, k: Tensor, angles: rope::Angles<'_>) -> Result<(Tensor, Tensor)> {
        use rope::{Direction, Layout};
        let mut spec = *spec;
        if self.has(Mutation::RopeFlipsSin) {
            let sin = mapped(angles.sin, |sin| -sin)?;
            return self.inner.rope(&spec, q, k, rope::Angles { sin: &sin, ..angles });
        }
        if self.has(Mutation::RopeGradientRotatesForward) {
            spec.direction = Direction::Forward;
        }
        if self.has(Mutation::RopeSwapsLayout) {
            spec.layout = if spec.layout == Layout::Half { Layout::Interleaved } else { Layout::Half };
        }
        if self.has(Mutation::RopeIgnoresRestart) {
            let last = spec.num_positions as i32 - 1;
            let positions = mapped_integers(angles.positions, |t, _| (t as i32).min(last))?;
            return self.inner.rope(&spec, q, k, rope::Angles { positions: &positions, ..angles });
        }
        if self.has(Mutation::RopeLeavesKeys) {
            let original = mapped(&k, |k| k)?;
            return Ok((self.inner.rope(&spec, q, k, angles)?.0, original));
        }
        self.inner.rope(&spec, q, k, angles)
    }
}

impl<B: Backend> glu::Glu for MutantBackend<B> {
    fn glu_forward(&self, spec: &glu::Spec, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let mut spec = *spec;
        if self.has(Mutation::GluErfIsTanh) && spec.activation == glu::Activation::GeluErf {
            spec.activation = glu::Activation::GeluTanh;
        }
        if self.has(Mutation::GluSwapsOperands) {
            return self.inner.glu_forward(&spec, up, gate);
        }
        self.inner.glu_forward(&spec, gate, up)
    }

    fn glu_backward(&self, spec: &glu::Spec, dout: &Tensor, gate: Tensor, up: Tensor) -> Result<glu::Gradients> {
        if self.has(Mutation::GluDerivativeIsActivation) {
            let factor = mapped(&up, |up| up)?;
            let glu::Gradients { dup, .. } = self.inner.glu_backward(spec, dout, gate, up)?;
            return Ok(glu::Gradients { dgate: self.inner.mul(dup.clone(), &factor)?, dup });
        }
        if self.has(Mutation::GluDupDropsActivation) {
            let glu::Gradients { dgate, .. } = self.inner.glu_backward(spec, dout, gate, up)?;
            return Ok(glu::Gradients { dgate, dup: mapped(dout, |dout| dout)? });
        }
        self.inner.glu_backward(spec, dout, gate, up)
    }
}
