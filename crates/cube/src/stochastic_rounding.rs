//! Stochastic rounding has no kernel yet.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Error, Memory, Result, Tensor,
    ops::stochastic_rounding::{Spec, StochasticRounding},
};

use crate::backend::CubeBackend;

impl<R: Runtime> StochasticRounding for CubeBackend<R> {
    /// # Errors
    /// [`Error::Unsupported`].
    fn round_stochastically(&self, _spec: &Spec, _x: &Tensor, _out: &mut Tensor) -> Result<()> {
        Err(Error::Unsupported { op: "stochastic_rounding", what: "the operator", device: self.name() })
    }
}
