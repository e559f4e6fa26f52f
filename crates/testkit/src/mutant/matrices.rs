//! Faults of linear layers and losses.

use unsloth_core::{
    Backend, Result, Tensor, Weight,
    ops::{
        cross_entropy::{self, CrossEntropy, IGNORE_INDEX, LossSpec},
        linear::{self, Linear},
        linear_cross_entropy::{self, LinearCrossEntropy},
        lora_linear::{self, Adapter, LoraLinear, ParameterGradients, RowDropout},
    },
};

use super::{MutantBackend, Mutation, mapped, mapped_integers, transposed, zeros_like};

fn transposed_weight(weight: &Weight) -> Result<Weight> {
    weight.device().prepare_weight(transposed(&weight.to_dense()?)?)
}

/// Targets with class 0 for rows that have none.
fn without_ignored(targets: &Tensor) -> Result<Tensor> {
    mapped_integers(targets, |_, target| if target == IGNORE_INDEX { 0 } else { target })
}

impl<B: Backend> Linear for MutantBackend<B> {
    fn linear_forward(
        &self,
        spec: &linear::Spec,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.inner.linear_forward(spec, x, weight, bias.filter(|_| !self.has(Mutation::LinearDropsBias)))
    }

    fn linear_input_gradient(&self, spec: &linear::Spec, dy: &Tensor, weight: &Weight) -> Result<Tensor> {
        if self.has(Mutation::LinearTransposesInputGradient) {
            return self.inner.linear_input_gradient(spec, dy, &transposed_weight(weight)?);
        }
        self.inner.linear_input_gradient(spec, dy, weight)
    }

    fn linear_weight_gradient(&self, spec: &linear::Spec, dy: &Tensor, x: &Tensor, dweight: &mut Tensor) -> Result<()> {
        if self.has(Mutation::LinearOverwritesWeightGradient) {
            self.inner.fill_zero(dweight)?;
        }
        if self.has(Mutation::LinearTransposesWeightGradient) {
            let mut fresh = zeros_like(dweight)?;
            self.inner.linear_weight_gradient(spec, dy, x, &mut fresh)?;
            return self.inner.accumulate(dweight, &transposed(&fresh)?);
        }
        self.inner.linear_weight_gradient(spec, dy, x, dweight)
    }

    fn linear_bias_gradient(&self, spec: &linear::Spec, dy: &Tensor, dbias: &mut Tensor) -> Result<()> {
        if self.has(Mutation::LinearOverwritesBiasGradient) {
            self.inner.fill_zero(dbias)?;
        }
        self.inner.linear_bias_gradient(spec, dy, dbias)
    }
}

impl<B: Backend> MutantBackend<B> {
    /// Sequences and positions for a fault that changes them.
    fn counters(&self, rows: Option<&RowDropout<'_>>) -> Result<Option<[Tensor; 2]>> {
        let Some(RowDropout { sequences, positions, .. }) = rows else { return Ok(None) };
        let (keep, zero, count) = (|_, value| value, |_, _| 0, |row, _| row as i32);
        Ok(match self.mutation {
            Some(Mutation::LoraDropoutIgnoresSequence) => {
                Some([mapped_integers(sequences, zero)?, mapped_integers(positions, keep)?])
            }
            Some(Mutation::LoraDropoutCountsRows) => {
                Some([mapped_integers(sequences, keep)?, mapped_integers(positions, count)?])
            }
            _ => None,
        })
    }

    fn change_dropout<'a>(
        &self,
        spec: &mut lora_linear::Spec,
        adapter: &mut Adapter<'a>,
        counters: &'a Option<[Tensor; 2]>,
    ) {
        let (Some(dropout), Some(rows)) = (&mut spec.dropout, &mut adapter.dropout) else { return };
        if self.has(Mutation::LoraDropoutIgnoresStep) {
            (dropout.step, rows.dropout.step) = (0, 0);
        }
        if let Some([sequences, positions]) = counters {
            (rows.sequences, rows.positions) = (sequences, positions);
        }
    }
}

impl<B: Backend> LoraLinear for MutantBackend<B> {
    fn lora_linear_hidden(&self, spec: &lora_linear::Spec, x: &Tensor, mut adapter: Adapter<'_>) -> Result<Tensor> {
        let mut spec = *spec;
        if self.has(Mutation::LoraHiddenIgnoresDropout) {
            (spec.dropout, adapter.dropout) = (None, None);
        }
        self.inner.lora_linear_hidden(&spec, x, adapter)
    }

    fn lora_linear_forward(
        &self,
        spec: &lora_linear::Spec,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        mut adapter: Adapter<'_>,
    ) -> Result<lora_linear::Forward> {
        let mut spec = *spec;
        if self.has(Mutation::LoraDropsScale) {
            (spec.scale, adapter.scale) = (1.0, 1.0);
        }
        let bias = bias.filter(|_| !self.has(Mutation::LoraDropsBias));
        if self.has(Mutation::LoraForwardIgnoresDropout) {
            (spec.dropout, adapter.dropout) = (None, None);
        }
        let counters = self.counters(adapter.dropout.as_ref())?;
        let mut adapter = adapter;
        self.change_dropout(&mut spec, &mut adapter, &counters);
        let mut forward = self.inner.lora_linear_forward(&spec, x, weight, bias, adapter)?;
        if self.has(Mutation::LoraRoundsTwice) {
            let nothing = weight.device().prepare_weight(zeros_like(&weight.to_dense()?)?)?;
            let update = self.inner.lora_linear_forward(&spec, x, &nothing, None, adapter)?.y;
            forward.y = self.inner.add(self.inner.linear_forward(&spec.base, x, weight, bias)?, &update)?;
        }
        if let (Some(dropout), true) = (spec.dropout, self.has(Mutation::LoraDropoutKeepsMagnitude)) {
            forward.h = mapped(&forward.h, |value| value * f64::from(1.0 - dropout.probability))?;
        }
        Ok(forward)
    }

    fn lora_linear_backward(
        &self,
        spec: &lora_linear::Spec,
        mut inputs: lora_linear::Backward<'_>,
        mut gradients: ParameterGradients<'_>,
    ) -> Result<Option<Tensor>> {
        let mut spec = *spec;
        if self.has(Mutation::LoraBackwardDropsScale) {
            (spec.scale, inputs.adapter.scale) = (1.0, 1.0);
        }
        if self.has(Mutation::LoraBackwardIgnoresDropout) {
            (spec.dropout, inputs.adapter.dropout) = (None, None);
        }
        let counters = self.counters(inputs.adapter.dropout.as_ref())?;
        let mut inputs = inputs;
        self.change_dropout(&mut spec, &mut inputs.adapter, &counters);
        if self.has(Mutation::LoraDropsGradientOfB) {
            gradients.dlora_b = None;
        }
        if self.has(Mutation::LoraOverwritesGradients) {
            for gradient in [&mut gradients.dlora_a, &mut gradients.dlora_b].into_iter().flatten() {
                self.inner.fill_zero(gradient)?;
            }
        }
        if self.has(Mutation::LoraDropsUpdateInDx) {
            // `A` enters the backward pass in `dx` only.
            let lora_a = zeros_like(inputs.adapter.lora_a)?;
            let adapter = Adapter { lora_a: &lora_a, ..inputs.adapter };
            return self.inner.lora_linear_backward(&spec, lora_linear::Backward { adapter, ..inputs }, gradients);
        }
        self.inner.lora_linear_backward(&spec, inputs, gradients)
    }
}

impl<B: Backend> CrossEntropy for MutantBackend<B> {
    fn cross_entropy_forward(
        &self,
        spec: &cross_entropy::Spec,
        logits: &Tensor,
        targets: &Tensor,
    ) -> Result<cross_entropy::Forward> {
        let mut spec = *spec;
        let loss: &mut LossSpec = &mut spec.loss;
        match self.mutation {
            Some(Mutation::LossForgetsNumTargets) => loss.num_targets = 1,
            Some(Mutation::LossDropsSmoothing) => loss.label_smoothing = 0.0,
            Some(Mutation::LossDropsZLoss) => loss.z_loss = 0.0,
            Some(Mutation::LossDropsSoftcap) => loss.softcap = None,
            Some(Mutation::LossDropsLogitScale) => loss.logit_scale = 1.0,
            Some(Mutation::LossCountsIgnored) => {
                return self.inner.cross_entropy_forward(&spec, logits, &without_ignored(targets)?);
            }
            _ => {}
        }
        self.inner.cross_entropy_forward(&spec, logits, targets)
    }

    fn cross_entropy_backward(
        &self,
        spec: &cross_entropy::Spec,
        logits: Tensor,
        targets: &Tensor,
        lse: &Tensor,
    ) -> Result<Tensor> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::LossGradientForgetsNumTargets) => spec.loss.num_targets = 1,
            Some(Mutation::LossGradientDropsZLoss) => spec.loss.z_loss = 0.0,
            Some(Mutation::LossDropsLossScale) => spec.loss.loss_scale = 1.0,
            Some(Mutation::LossGradientCountsIgnored) => {
                return self.inner.cross_entropy_backward(&spec, logits, &without_ignored(targets)?, lse);
            }
            _ => {}
        }
        self.inner.cross_entropy_backward(&spec, logits, targets, lse)
    }
}

impl<B: Backend> LinearCrossEntropy for MutantBackend<B> {
    fn linear_cross_entropy(
        &self,
        spec: &linear_cross_entropy::Spec,
        x: &Tensor,
        weight: &Weight,
        targets: &Tensor,
        dweight: Option<&mut Tensor>,
    ) -> Result<linear_cross_entropy::Forward> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::LinearLossForgetsNumTargets) => spec.loss.num_targets = 1,
            Some(Mutation::LinearLossDropsLossScale) => spec.loss.loss_scale = 1.0,
            Some(Mutation::LinearLossCountsIgnored) => {
                return self.inner.linear_cross_entropy(&spec, x, weight, &without_ignored(targets)?, dweight);
            }
            Some(Mutation::LinearLossTransposesDx) => {
                let forward = self.inner.linear_cross_entropy(&spec, x, weight, targets, dweight)?;
                let wrong = self.inner.linear_cross_entropy(&spec, x, &transposed_weight(weight)?, targets, None)?;
                return Ok(linear_cross_entropy::Forward { dx: wrong.dx, ..forward });
            }
            Some(Mutation::LinearLossOverwritesDweight) => {
                let Some(dweight) = dweight else {
                    return self.inner.linear_cross_entropy(&spec, x, weight, targets, None);
                };
                self.inner.fill_zero(dweight)?;
                return self.inner.linear_cross_entropy(&spec, x, weight, targets, Some(dweight));
            }
            _ => {}
        }
        self.inner.linear_cross_entropy(&spec, x, weight, targets, dweight)
    }
}
