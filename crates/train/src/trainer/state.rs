//! What of a run changes from step to step, taken out of one trainer and put into another.

use std::rc::Rc;

use unsloth_autograd::Parameter;
use unsloth_core::{DType, Shape, Tensor};

use super::Trainer;
use crate::{Error, LossScaleState, Model, Result, error::invalid, optimizer::Parked};

/// Name of a parameter's value among its tensors.
pub const PARAMETER: &str = "parameter";

/// Where a trainer has a tensor.
#[derive(Clone)]
pub(crate) enum Contents {
    Here(Tensor),
    Away(Rc<Parked>),
}

/// A tensor that changes from step to step.
#[derive(Clone)]
pub struct StateTensor {
    /// The parameter that it belongs to.
    pub parameter: Parameter,
    /// What it is of it: [`PARAMETER`], its value, or what the optimiser keeps under this name.
    pub part: &'static str,
    pub(crate) contents: Contents,
}

impl StateTensor {
    /// Its shape.
    pub fn shape(&self) -> &Shape {
        match &self.contents {
            Contents::Here(tensor) => tensor.shape(),
            Contents::Away(parked) => parked.shape(),
        }
    }

    /// Its type.
    pub fn dtype(&self) -> DType {
        match &self.contents {
            Contents::Here(tensor) => tensor.dtype(),
            Contents::Away(parked) => parked.dtype(),
        }
    }

    /// Its contents on the device: the trainer's own buffer, or a copy of what waits elsewhere.
    ///
    /// # Errors
    /// As [`unsloth_core::StoredTensor::take`] and [`unsloth_core::TensorStore::put`]; [`unsloth_core::Error::InvalidSpec`] for what a later
    /// step has changed where it waited elsewhere.
    pub fn tensor(&self) -> unsloth_core::Result<Tensor> {
        match &self.contents {
            Contents::Here(tensor) => Ok(tensor.clone()),
            Contents::Away(parked) => parked.read(),
        }
    }
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

    /// Every parameter's tensors, in the order of their ids: with [`Trainer::run_state`] all that [`Trainer::restore`]
    /// needs. They share the trainer's buffers: drop them before the next step.
    ///
    /// # Errors
    /// [`Error::Unread`] until [`Trainer::finish`] has read the last step; [`Error::Stopped`] after a failure.
    pub fn state(&self) -> Result<Vec<StateTensor>> {
        self.check_running()?;
        if let Some(pending) = &self.pending {
            return Err(Error::Unread { step: pending.metrics.step });
        }
        Ok(self.optimizer.tensors())
    }

    /// Puts a trainer before its first step where another one was, to go on with the same bits.
    /// `tensor_of` is asked for every tensor of [`Trainer::state`], in its order, by parameter, part, shape and type. If it fails,
    /// do not use the trainer any more.
    ///
    /// # Errors
    /// Those of `tensor_of`; a tensor of another shape, type or device than the trainer's; [`Error::InvalidConfig`] for more
    /// than 2^24 steps, more skipped ones than steps or a trainer that has begun;
    /// [`crate::LossScaleError::EmptyState`] where this trainer scales the loss and the other did not.
    pub fn restore<E: From<Error>>(
        &mut self,
        run: RunState,
        tensor_of: impl FnMut(&Parameter, &'static str, (Shape, DType)) -> Result<Tensor, E>,
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
        self.optimizer.restore(tensor_of)?;
        self.scaler.load(loss_scale)?;
        self.optimizer.set_num_steps(self.model.device(), (num_steps - num_skipped) as u32)?;
        (self.num_steps, self.num_skipped) = (num_steps, num_skipped);
        Ok(())
    }
}
