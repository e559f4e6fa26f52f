//! Embedding on the kernels of `unsloth-pointwise`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Category, DType, Result, Tensor, Weight,
    ops::embedding::{Embedding, Spec},
};
use unsloth_pointwise::embedding as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut},
    backend::{CubeBackend, output},
};

fn shape(spec: &Spec) -> kernels::Shape {
    let &Spec { tokens, vocab_size, hidden_size, .. } = spec;
    kernels::Shape { tokens, vocab_size, hidden_size }
}

impl<R: Runtime> Embedding for CubeBackend<R> {
    fn embedding_forward(&self, spec: &Spec, weight: &Weight, ids: &Tensor) -> Result<Tensor> {
        let mut out = output(ids, spec.dtype, [spec.tokens, spec.hidden_size])?;
        let weight = weight.to_dense()?;
        let to_out = handle_mut("embedding_forward", "out", &mut out)?;
        let args = kernels::Forward { weight: handle(&weight), ids: handle(ids), out: to_out };
        self.launch("embedding_forward", |client| {
            dispatch_float!(spec.weight_dtype, W => dispatch_float!(spec.dtype, E =>
                kernels::forward::<R, W, E>(client, shape(spec), args)))
        })?;
        Ok(out)
    }

    fn embedding_backward(&self, spec: &Spec, ids: &Tensor, dout: &Tensor, dweight: &mut Tensor) -> Result<()> {
        const OP: &str = "embedding_backward";
        let dweight = handle_mut(OP, "dweight", dweight)?;
        let order = || ids.device().empty([spec.tokens], DType::I32, Category::Workspace);
        let orders = [order()?, order()?];
        let ids = handle(ids);
        self.launch(OP, |client| {
            let sorted = kernels::sort(
                client,
                shape(spec),
                kernels::Sort { ids, orders: [&orders[0], &orders[1]].map(handle) },
            )?;
            let args = kernels::Backward { ids, order: handle(&orders[sorted]), dout: handle(dout), dweight };
            dispatch_float!(spec.dtype, E => kernels::backward::<R, E>(client, shape(spec), args))
        })
    }
}
