//! Stochastic rounding on the kernel of `unsloth-pointwise`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Result, Tensor,
    ops::stochastic_rounding::{Spec, StochasticRounding},
};
use unsloth_pointwise::stochastic_rounding as kernels;

use crate::{
    access::{handle, handle_mut},
    backend::CubeBackend,
};

const OP: &str = "stochastic_rounding";

impl<R: Runtime> StochasticRounding for CubeBackend<R> {
    fn round_stochastically(&self, spec: &Spec, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let &Spec { stream, step, tensor } = spec;
        let draw = kernels::Draw { key: stream.key(), step, tensor };
        let buffers = (handle(x), handle_mut(OP, "out", out)?);
        self.launch(OP, |client| kernels::round(client, draw, x.num_elements(), buffers))
    }
}
