//! Values that are computed if they are asked for.
//!
//! What the last operators of a checkpointed function make, its caller reads after the first run; after the second one nobody does, for the
//! backward pass begins there. A function that gives its outputs deferred spares the second run that work. Operators whose
//! backward pass reads nothing of their results can be deferred.

use std::fmt;

use unsloth_core::{Result, Tensor, ops::elementwise};

use crate::{Tape, Var, var::Source};

/// A value that has its place on a tape, and is computed by [`Deferred::compute`]. A [`Var`] is one that has been already.
pub struct Deferred(State);

enum State {
    Computed(Var),
    Later { compute: Box<dyn FnOnce() -> Result<Tensor>>, source: Option<Source> },
}

impl Deferred {
    pub(crate) fn new(compute: impl FnOnce() -> Result<Tensor> + 'static, source: Option<Source>) -> Self {
        Self(State::Later { compute: Box::new(compute), source })
    }

    /// The value.
    ///
    /// # Errors
    /// Those of the operators that make it.
    pub fn compute(self) -> Result<Var> {
        match self.0 {
            State::Computed(value) => Ok(value),
            State::Later { compute, source } => Ok(Var::new(compute()?, source)),
        }
    }

    /// `self + b`, computed when it is asked for; otherwise [`crate::ops::add`].
    ///
    /// # Errors
    /// An input of another tape.
    pub fn add(self, tape: &Tape, b: &Var) -> Result<Deferred> {
        let (to_a, to_b) = (self.source(), b.source());
        let link = tape.link_sources("add", [to_a, to_b], &[])?;
        let b = b.tensor().clone();
        Ok(link.deferred(
            move || elementwise::add(self.compute()?.into_tensor(), &b),
            move |context, dout| {
                context.send(to_a, dout.clone())?;
                context.send(to_b, dout)
            },
        ))
    }

    pub(crate) fn source(&self) -> Option<Source> {
        match &self.0 {
            State::Computed(value) => value.source(),
            State::Later { source, .. } => *source,
        }
    }
}

impl From<Var> for Deferred {
    fn from(value: Var) -> Self {
        Self(State::Computed(value))
    }
}

impl fmt::Debug for Deferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            State::Computed(value) => value.fmt(f),
            State::Later { source, .. } => write!(f, "Deferred({source:?})"),
        }
    }
}
