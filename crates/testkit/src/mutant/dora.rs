//! Faults of layers with trained lengths.

use unsloth_core::{
    Backend, Result, Tensor, Weight,
    ops::dora::{Dora, Lengths, NormSpec, Spec},
};

use super::{MutantBackend, Mutation, zeros_like};

impl<B: Backend> Dora for MutantBackend<B> {
    fn dora_norms(&self, spec: &NormSpec, weight: &Weight, lora_a: &Tensor, lora_b: &Tensor) -> Result<Tensor> {
        if self.has(Mutation::DoraNormsOfBase) {
            return self.inner.dora_norms(spec, weight, lora_a, &zeros_like(lora_b)?);
        }
        let scale = if self.has(Mutation::DoraNormsIgnoreScale) { 1.0 } else { spec.scale };
        self.inner.dora_norms(&NormSpec { scale, ..*spec }, weight, lora_a, lora_b)
    }

    fn dora_forward(&self, spec: &Spec, t: &Tensor, lengths: Lengths<'_>, bias: Option<&Tensor>) -> Result<Tensor> {
        let bias = bias.filter(|_| !self.has(Mutation::DoraDropsBias));
        self.inner.dora_forward(spec, t, lengths, bias)
    }

    fn dora_backward(
        &self,
        spec: &Spec,
        dy: Tensor,
        t: &Tensor,
        lengths: Lengths<'_>,
        dmagnitude: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let magnitude = if self.has(Mutation::DoraGradientIgnoresLengths) { lengths.norms } else { lengths.magnitude };
        let lengths = Lengths { magnitude, ..lengths };
        match dmagnitude {
            Some(dmagnitude) if self.has(Mutation::DoraOverwritesGradient) => {
                self.inner.fill_zero(dmagnitude)?;
                self.inner.dora_backward(spec, dy, t, lengths, Some(dmagnitude))
            }
            dmagnitude => self.inner.dora_backward(spec, dy, t, lengths, dmagnitude),
        }
    }
}
