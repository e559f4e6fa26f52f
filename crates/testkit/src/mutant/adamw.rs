//! Faults of AdamW and of the scalars that steer it.

use unsloth_core::{
    Backend, Result, Tensor,
    ops::adamw::{AdamW, Buffers, ControlSpec, Spec, StepState},
};

use super::{MutantBackend, Mutation, edited, mapped};
use crate::data;

impl<B: Backend> AdamW for MutantBackend<B> {
    fn step_control(&self, spec: &ControlSpec, norm: &Tensor, finite: &Tensor, state: &mut Tensor) -> Result<()> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::ControlIgnoresClip) => spec.max_grad_norm = None,
            Some(Mutation::ControlIgnoresLossScale) => spec.loss_scale = 1.0,
            Some(Mutation::ControlIsNotSticky) => spec.sticky = false,
            Some(Mutation::ControlIgnoresFinite) => {
                return self.inner.step_control(&spec, norm, &mapped(finite, |_| 1.0)?, state);
            }
            _ => {}
        }
        self.inner.step_control(&spec, norm, finite, state)?;
        if self.has(Mutation::ControlCountsSkippedSteps) {
            *state = edited(state, |state| state[StepState::STEPS] += state[StepState::SKIP])?;
        }
        Ok(())
    }

    fn adamw(&self, spec: &Spec, parameters: &mut [Buffers<'_>], state: &Tensor) -> Result<()> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::AdamwDropsEps) => spec.eps = 1e-30,
            Some(Mutation::AdamwDropsDecay) => spec.weight_decay = 0.0,
            Some(Mutation::AdamwDropsBiasCorrection) => {
                // After a million steps both corrections are 1.
                let late = edited(state, |state| state[StepState::STEPS] = 1e6)?;
                return self.inner.adamw(&spec, parameters, &late);
            }
            Some(Mutation::AdamwIgnoresGradientScale) => {
                let unscaled = edited(state, |state| state[StepState::GRADIENT_SCALE] = 1.0)?;
                return self.inner.adamw(&spec, parameters, &unscaled);
            }
            Some(Mutation::AdamwIgnoresSkip) => {
                let unskipped = edited(state, |state| state[StepState::SKIP] = 0.0)?;
                return self.inner.adamw(&spec, parameters, &unskipped);
            }
            Some(Mutation::AdamwCouplesDecay) => {
                let decay = f64::from(std::mem::take(&mut spec.weight_decay));
                let scale = data::read(state)?[StepState::GRADIENT_SCALE];
                for Buffers { param, grad, m, v } in parameters {
                    let values = data::read(param)?;
                    let grad = &edited(grad, |grad| {
                        grad.iter_mut().zip(&values).for_each(|(grad, value)| *grad += decay * value / scale);
                    })?;
                    self.inner.adamw(&spec, &mut [Buffers { param, grad, m, v }], state)?;
                }
                return Ok(());
            }
            Some(Mutation::AdamwLeavesLast) => {
                let last = usize::from(parameters.len() > 1);
                let changed = parameters.len() - last;
                return self.inner.adamw(&spec, &mut parameters[..changed], state);
            }
            _ => {}
        }
        self.inner.adamw(&spec, parameters, state)
    }
}
