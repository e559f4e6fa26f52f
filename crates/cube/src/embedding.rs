//! Embedding on the kernels of `unsloth-pointwise`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    DType, Result, Tensor, Weight,
    ops::embedding::{Embedding, Spec},
};
use unsloth_pointwise::embedding as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut, output, workspace},
    backend::CubeBackend,
};

fn shape(spec: &Spec) -> kernels::Shape {
    let &Spec { tokens, vocab_size, hidden_size, .. } = spec;
    kernels::Shape { tokens, vocab_size, hidden_size }
}

impl<R: Runtime> Embedding for CubeBackend<R> {
    fn embedding_forward(&self, spec: &Spec, weight: &Weight, ids: &Tensor) -> Result<Tensor> {
        const OP: &str = "embedding_forward";
        let mut out = output(OP, ids, spec.dtype, [spec.tokens, spec.hidden_size])?;
        let weight = weight.to_dense()?;
        let to_out = handle_mut(OP, "out", &mut out)?;
        let args = kernels::Forward { weight: handle(&weight), ids: handle(ids), out: to_out };
        self.launch(OP, |client| {
            dispatch_float!(spec.weight_dtype, W => dispatch_float!(spec.dtype, E =>
                kernels::forward::<R, W, E>(client, shape(spec), args)))
        })?;
        Ok(out)
    }

    fn embedding_backward(&self, spec: &Spec, ids: &Tensor, dout: &Tensor, dweight: &mut Tensor) -> Result<()> {
        const OP: &str = "embedding_backward";
        let dweight = handle_mut(OP, "dweight", dweight)?;
        let order = workspace(OP, ids, DType::I32, [spec.tokens])?;
        let (ids, order) = (handle(ids), handle(&order));
        self.launch(OP, |client| {
            kernels::sort(client, shape(spec), kernels::Sort { ids, order })?;
            let args = kernels::Backward { ids, order, dout: handle(dout), dweight };
            dispatch_float!(spec.dtype, E => kernels::backward::<R, E>(client, shape(spec), args))
        })
    }
}
