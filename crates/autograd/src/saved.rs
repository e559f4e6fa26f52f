//! What a backward pass reads of a value: the value, or how to make it again from what is kept anyway.
//!                                             Korthikanti et al. 2022, "Reducing activation recomputation", arXiv:2205.05198

use std::{cell::RefCell, fmt, rc::Rc};

use unsloth_core::{Result, Tensor};

use crate::Var;

/// Operators whose results are computed again by the backward pass instead of kept for those that read them. What they are
/// computed from is kept by the operators themselves, so it costs little time and no other memory; the bits are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recompute {
    /// Norms, fused with an add or not.
    pub norms: bool,
    /// Gated linear units.
    pub gates: bool,
}

type Recipe = Box<dyn FnOnce() -> Result<Tensor>>;

enum State {
    Recipe(Recipe),
    Made(Tensor),
    /// The recipe has failed, which has ended the walk.
    Failed,
}

/// A value to be made at its first use in the backward pass, once for all its users.
pub(crate) struct Again(RefCell<State>);

impl Again {
    pub(crate) fn new(recipe: impl FnOnce() -> Result<Tensor> + 'static) -> Rc<Self> {
        Rc::new(Self(RefCell::new(State::Recipe(Box::new(recipe)))))
    }

    fn tensor(&self) -> Result<Tensor> {
        let tensor = match self.0.replace(State::Failed) {
            State::Recipe(recipe) => recipe()?,
            State::Made(tensor) => tensor,
            State::Failed => panic!("the first error ends a backward pass"),
        };
        self.0.replace(State::Made(tensor.clone()));
        Ok(tensor)
    }
}

impl fmt::Debug for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Again")
    }
}

/// A value as a node keeps it.
pub(crate) enum Saved {
    Kept(Tensor),
    Again(Rc<Again>),
}

impl Saved {
    pub(crate) fn of(var: &Var) -> Self {
        var.again().map_or_else(|| Saved::Kept(var.tensor().clone()), |again| Saved::Again(again.clone()))
    }

    /// The last of a value's users leaves no other owner.
    pub(crate) fn take(self) -> Result<Tensor> {
        match self {
            Saved::Kept(tensor) => Ok(tensor),
            Saved::Again(again) => again.tensor(),
        }
    }
}
