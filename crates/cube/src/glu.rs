//! Gated linear units on the kernels of `unsloth-glu`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Result, Tensor,
    ops::glu::{Activation, Glu, Gradients, Spec},
};
use unsloth_glu::glu as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut, output},
    backend::CubeBackend,
};

fn activation(spec: &Spec) -> kernels::Activation {
    match spec.activation {
        Activation::Silu => kernels::Activation::Silu,
        Activation::GeluTanh => kernels::Activation::GeluTanh,
        Activation::GeluErf => kernels::Activation::GeluErf,
    }
}

impl<R: Runtime> Glu for CubeBackend<R> {
    fn glu_forward(&self, spec: &Spec, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let mut out = output("glu_forward", gate, spec.dtype, *gate.shape())?;
        let to_out = handle_mut("glu_forward", "out", &mut out)?;
        let args = kernels::Forward { gate: handle(gate), up: handle(up), out: to_out };
        let (activation, len) = (activation(spec), spec.elements);
        self.launch(
            "glu_forward",
            |client| dispatch_float!(spec.dtype, E => kernels::forward::<R, E>(client, activation, len, args)),
        )?;
        Ok(out)
    }

    fn glu_backward(&self, spec: &Spec, dout: &Tensor, gate: Tensor, up: Tensor) -> Result<Gradients> {
        let (mut dgate, mut dup) = (self.reusable(gate)?, self.reusable(up)?);
        let args = kernels::Backward {
            dout: handle(dout),
            gate: handle_mut("glu_backward", "gate", &mut dgate)?,
            up: handle_mut("glu_backward", "up", &mut dup)?,
        };
        let (activation, len) = (activation(spec), spec.elements);
        self.launch(
            "glu_backward",
            |client| dispatch_float!(spec.dtype, E => kernels::backward::<R, E>(client, activation, len, args)),
        )?;
        Ok(Gradients { dgate, dup })
    }
}
