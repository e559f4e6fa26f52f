//! RoPE on the kernel of `unsloth-rope`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Result, Tensor,
    ops::rope::{Angles, Direction, Layout, Rope, Spec},
};
use unsloth_rope::rope as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut},
    backend::CubeBackend,
};

impl<R: Runtime> Rope for CubeBackend<R> {
    fn rope(&self, spec: &Spec, q: Tensor, k: Tensor, angles: Angles<'_>) -> Result<(Tensor, Tensor)> {
        let (mut q, mut k) = (self.reusable(q)?, self.reusable(k)?);
        let &Spec { tokens, num_heads, num_kv_heads, head_dim, num_positions, .. } = spec;
        let pairs = match spec.layout {
            Layout::Half => kernels::Pairs::Half,
            Layout::Interleaved => kernels::Pairs::Interleaved,
        };
        let inverse = spec.direction == Direction::Inverse;
        let shape = kernels::Shape { tokens, num_heads, num_kv_heads, head_dim, num_positions, pairs, inverse };
        let args = kernels::Args {
            q: handle_mut("rope", "q", &mut q)?,
            k: handle_mut("rope", "k", &mut k)?,
            cos: handle(angles.cos),
            sin: handle(angles.sin),
            positions: handle(angles.positions),
        };
        self.launch("rope", |client| dispatch_float!(spec.dtype, E => kernels::apply::<R, E>(client, shape, args)))?;
        Ok((q, k))
    }
}
