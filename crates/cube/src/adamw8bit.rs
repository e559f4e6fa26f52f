//! AdamW with moments in 8 bits has no kernel yet.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Error, Memory, Result, Tensor,
    ops::{
        adamw::Spec,
        adamw8bit::{AdamW8bit, Buffers},
    },
};

use crate::backend::CubeBackend;

impl<R: Runtime> AdamW8bit for CubeBackend<R> {
    /// # Errors
    /// [`Error::Unsupported`].
    fn adamw8bit(&self, _spec: &Spec, _buffers: Buffers<'_>, _state: &Tensor) -> Result<()> {
        Err(Error::Unsupported { op: "adamw8bit", what: "an optimiser with 8-bit moments", device: self.name() })
    }
}
