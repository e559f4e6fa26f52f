//! Gradient descent on the kernels of `unsloth-pointwise`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Result, Tensor,
    ops::sgd::{Buffers, Sgd, Spec},
};
use unsloth_pointwise::sgd as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut},
    backend::CubeBackend,
};

impl<R: Runtime> Sgd for CubeBackend<R> {
    fn sgd(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()> {
        let (len, dtype) = (buffers.grad.num_elements(), buffers.param.dtype());
        let &Spec { learning_rate, momentum, nesterov, weight_decay } = spec;
        let options = kernels::Options { learning_rate, momentum, nesterov, weight_decay };
        let args = kernels::Step {
            param: handle_mut("sgd", "param", buffers.param)?,
            grad: handle(buffers.grad),
            buf: buffers.buf.map(|buf| handle_mut("sgd", "buf", buf)).transpose()?,
            state: handle(state),
        };
        self.launch("sgd", |client| dispatch_float!(dtype, E => kernels::step::<R, E>(client, &options, len, args)))
    }
}
