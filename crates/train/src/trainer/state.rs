//! What of a run changes from step to step, taken out of one trainer and put into another.

use unsloth_autograd::Parameter;
use unsloth_core::Tensor;

use super::Trainer;
use crate::{Error, LossScaleState, Model, Result, error::invalid};

/// What of a parameter changes from step to step.
#[derive(Clone, Debug)]
pub struct ParameterState {
    /// Its value, in its own type.
    pub value: Tensor,
    /// First moment of its gradient, f32 of its shape.
    pub m: Tensor,
    /// Second moment of its gradient, f32 of its shape.
    pub v: Tensor,
}

/// Where a run is, but for its tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunState {
    /// Steps done.
    pub num_steps: usize,
    /// Of these, the ones that changed nothing.
    pub num_skipped: usize,
    /// The loss scaler; `None` without one.
    pub loss_scale: Option<LossScaleState>,
}

/// The device counts steps in an f32.
const MAX_STEPS: usize = 1 << 24;

impl<M: Model> Trainer<M> {
    /// Where the run is, behind a step that [`Trainer::finish`] has read.
    pub fn run_state(&self) -> RunState {
        let (num_steps, num_skipped) = (self.num_steps, self.num_skipped);
        RunState { num_steps, num_skipped, loss_scale: self.scaler.state() }
    }

    /// Every parameter with its state, in the order of their ids: with [`Trainer::run_state`] all that [`Trainer::restore`]
    /// needs. The tensors share the trainer's buffers: drop them before the next step.
    ///
    /// # Errors
    /// [`Error::Unread`] until [`Trainer::finish`] has read the last step; [`Error::Stopped`] after a failure.
    pub fn state(&self) -> Result<Vec<(Parameter, ParameterState)>> {
        self.check_running()?;
        if let Some(pending) = &self.pending {
            return Err(Error::Unread { step: pending.metrics.step });
        }
        let state = |(parameter, m, v): (&Parameter, &Tensor, &Tensor)| {
            let value = parameter.value();
            (parameter.clone(), ParameterState { value, m: m.clone(), v: v.clone() })
        };
        Ok(self.optimizer.slots().map(state).collect())
    }

    /// Puts a trainer before its first step where another one was, to go on with the same bits.
    /// `state_of` is asked for every parameter, in the order of their ids. If it fails, do not use the trainer any more.
    ///
    /// # Errors
    /// Those of `state_of`; a tensor of another shape, type or device than the trainer's; [`Error::InvalidConfig`] for more
    /// than 2^24 steps, more skipped ones than steps or a trainer that has begun;
    /// [`crate::LossScaleError::EmptyState`] where this trainer scales the loss and the other did not.
    pub fn restore<E: From<Error>>(
        &mut self,
        run: RunState,
        mut state_of: impl FnMut(&Parameter) -> Result<ParameterState, E>,
    ) -> Result<(), E> {
        let RunState { num_steps, num_skipped, loss_scale } = run;
        if num_steps > MAX_STEPS {
            return Ok(invalid("num_steps", num_steps, "at most 2^24")?);
        }
        if num_skipped > num_steps {
            return Ok(invalid("num_skipped", num_skipped, "at most the number of steps")?);
        }
        if self.num_steps != 0 {
            return Ok(invalid("trainer", format!("{} steps on", self.num_steps), "before its first step")?);
        }
        let parameters: Vec<Parameter> = self.optimizer.parameters().cloned().collect();
        for parameter in parameters {
            let state = state_of(&parameter)?;
            self.optimizer.restore(&parameter, state)?;
        }
        self.scaler.load(loss_scale)?;
        self.optimizer.set_num_steps(self.model.device(), (num_steps - num_skipped) as u32)?;
        (self.num_steps, self.num_skipped) = (num_steps, num_skipped);
        Ok(())
    }
}
