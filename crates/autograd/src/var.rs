//! Values that operators work on.

use std::rc::Rc;

use unsloth_core::{DType, Shape, Tensor};

use crate::saved::Again;

/// Where on which tape a value was computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    /// Identity of the tape.
    pub(crate) tape: u64,
    /// Position of the node.
    pub(crate) node: usize,
    /// Which of the node's outputs.
    pub(crate) output: usize,
}

/// A tensor and, where its gradient matters, its place on a tape. Cloning shares the buffer. Belongs to its tape's thread.
#[derive(Clone, Debug)]
pub struct Var {
    tensor: Tensor,
    source: Option<Source>,
    /// How the backward pass makes it anew, where nodes are not to keep it.
    again: Option<Rc<Again>>,
}

impl Var {
    pub(crate) fn new(tensor: Tensor, source: Option<Source>) -> Self {
        Self { tensor, source, again: None }
    }

    pub(crate) fn with_again(self, again: Option<Rc<Again>>) -> Self {
        Self { again, ..self }
    }

    /// A value that nothing is differentiated with respect to.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, source: None, again: None }
    }

    /// The value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The value, off the tape.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }

    /// Dimensions of the value.
    pub fn shape(&self) -> &Shape {
        self.tensor.shape()
    }

    /// Storage type of the value.
    pub fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    /// Whether the value depends on a variable or a trained parameter of a tape.
    pub fn requires_grad(&self) -> bool {
        self.source.is_some()
    }

    pub(crate) fn again(&self) -> Option<&Rc<Again>> {
        self.again.as_ref()
    }

    pub(crate) fn source(&self) -> Option<Source> {
        self.source
    }
}
