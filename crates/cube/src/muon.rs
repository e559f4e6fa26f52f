//! Muon on the kernels of `unsloth-pointwise`, and the norm of `reduce`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    DType, Result, Tensor,
    ops::{
        muon::{Muon, Spec},
        reduce::Reduce,
    },
};
use unsloth_pointwise::muon as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut, output},
    backend::CubeBackend,
};

const OP: &str = "muon";

impl<R: Runtime> Muon for CubeBackend<R> {
    fn muon_direction(&self, spec: &Spec, grad: &Tensor, buf: &mut Tensor, state: &Tensor) -> Result<Tensor> {
        let (len, eps) = (grad.num_elements(), spec.eps);
        let mut direction = output(OP, grad, DType::F32, *grad.shape())?;
        let out = handle_mut(OP, "direction", &mut direction)?;
        let options = kernels::Momentum { momentum: spec.momentum, nesterov: spec.nesterov };
        let (grad, buf) = (handle(grad), handle_mut(OP, "buf", buf)?);
        let args = kernels::Direction { grad, buf, out, state: handle(state) };
        self.launch(OP, |client| kernels::direction(client, options, len, args))?;
        let norm = self.grad_norm(&[&direction])?;
        let args = (handle_mut(OP, "direction", &mut direction)?, handle(&norm));
        self.launch(OP, |client| kernels::normalize(client, eps, len, args))?;
        Ok(direction)
    }

    fn muon_apply(&self, spec: &Spec, param: &mut Tensor, direction: &Tensor, state: &Tensor) -> Result<()> {
        let (len, dtype) = (direction.num_elements(), param.dtype());
        let [rate, adjustment, decay] = [spec.learning_rate, spec.adjustment, spec.weight_decay].map(f64::from);
        let factors = ((1.0 - rate * decay) as f32, (rate * adjustment) as f32);
        let param = handle_mut(OP, "param", param)?;
        let args = kernels::Apply { param, direction: handle(direction), state: handle(state) };
        self.launch(OP, |client| dispatch_float!(dtype, E => kernels::apply::<R, E>(client, factors, len, args)))
    }
}
