//! Lion on the kernel of `unsloth-pointwise`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Result, Tensor,
    ops::lion::{Buffers, Lion, Spec},
};
use unsloth_pointwise::lion as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut},
    backend::CubeBackend,
};

impl<R: Runtime> Lion for CubeBackend<R> {
    fn lion(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()> {
        let (len, dtype) = (buffers.grad.num_elements(), buffers.param.dtype());
        let &Spec { learning_rate, beta1, beta2, weight_decay } = spec;
        let options = kernels::Options { learning_rate, beta1, beta2, weight_decay };
        let args = kernels::Step {
            param: handle_mut("lion", "param", buffers.param)?,
            grad: handle(buffers.grad),
            m: handle_mut("lion", "m", buffers.m)?,
            state: handle(state),
        };
        self.launch("lion", |client| dispatch_float!(dtype, E => kernels::step::<R, E>(client, &options, len, args)))
    }
}
