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

    fn adamw(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::AdamwDropsEps) => spec.eps = 1e-30,
            Some(Mutation::AdamwDropsDecay) => spec.weight_decay = 0.0,
            Some(Mutation::AdamwDropsBiasCorrection) => {
                // After a million steps both corrections are 1.
                let late = edited(state, |state| state[StepState::STEPS] = 1e6)?;
                return self.inner.adamw(&spec, buffers, &late);
            }
            Some(Mutation::AdamwIgnoresGradientScale) => {
                let unscaled = edited(state, |state| state[StepState::GRADIENT_SCALE] = 1.0)?;
                return self.inner.adamw(&spec, buffers, &unscaled);
            }
            Some(Mutation::AdamwIgnoresSkip) => {
                let unskipped = edited(state, |state| state[StepState::SKIP] = 0.0)?;
                return self.inner.adamw(&spec, buffers, &unskipped);
            }
            Some(Mutation::AdamwCouplesDecay) => {
                let decay = f64::from(std::mem::take(&mut spec.weight_decay));
                let (param, scale) = (data::read(buffers.param)?, data::read(state)?[StepState::GRADIENT_SCALE]);
                let grad = edited(buffers.grad, |grad| {
                    grad.iter_mut().zip(&param).for_each(|(grad, param)| *grad += decay * param / scale);
                })?;
                return self.inner.adamw(&spec, Buffers { grad: &grad, ..buffers }, state);
            }
            _ => {}
        }
        self.inner.adamw(&spec, buffers, state)
    }
}
