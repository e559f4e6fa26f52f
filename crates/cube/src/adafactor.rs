//! Adafactor has no kernel yet.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Error, Memory, Result, Tensor,
    ops::adafactor::{Adafactor, Buffers, Spec},
};

use crate::backend::CubeBackend;

impl<R: Runtime> Adafactor for CubeBackend<R> {
    /// # Errors
    /// [`Error::Unsupported`].
    fn adafactor(&self, _spec: &Spec, _buffers: Buffers<'_>, _state: &Tensor) -> Result<()> {
        Err(Error::Unsupported { op: "adafactor", what: "the operator", device: self.name() })
    }
}
