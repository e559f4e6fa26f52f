//! AdamW on the kernels of `unsloth-pointwise`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    DType, Result, Tensor,
    ops::adamw::{AdamW, Buffers, ControlSpec, Spec, StepState},
};
use unsloth_pointwise::adamw as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut},
    backend::CubeBackend,
};

// The kernels know the slots of the state by number.
const _: () = assert!(
    StepState::GRAD_NORM == 0 && StepState::GRADIENT_SCALE == 1 && StepState::SKIP == 2 && StepState::STEPS == 3
);

pub(crate) fn options(spec: &Spec) -> kernels::Options {
    let &Spec { learning_rate, beta1, beta2, eps, weight_decay } = spec;
    kernels::Options { learning_rate, beta1, beta2, eps, weight_decay }
}

fn parameter<'a>(buffers: &'a mut Buffers<'_>) -> Result<kernels::Parameter<'a>> {
    Ok(kernels::Parameter {
        len: buffers.grad.num_elements(),
        param: handle_mut("adamw", "param", buffers.param)?,
        grad: handle(buffers.grad),
        m: handle_mut("adamw", "m", buffers.m)?,
        v: handle_mut("adamw", "v", buffers.v)?,
    })
}

impl<R: Runtime> AdamW for CubeBackend<R> {
    fn step_control(&self, spec: &ControlSpec, norm: &Tensor, finite: &Tensor, state: &mut Tensor) -> Result<()> {
        let &ControlSpec { max_grad_norm, loss_scale, sticky } = spec;
        let options = kernels::ControlOptions { max_grad_norm, loss_scale, sticky };
        let state = handle_mut("step_control", "state", state)?;
        let args = kernels::Control { norm: handle(norm), finite: handle(finite), state };
        self.launch("step_control", |client| kernels::control(client, options, args))
    }

    fn adamw(&self, spec: &Spec, parameters: &mut [Buffers<'_>], state: &Tensor) -> Result<()> {
        let options = options(spec);
        for dtype in DType::FLOATS {
            let of_dtype = parameters.iter_mut().filter(|buffers| buffers.param.dtype() == dtype);
            let of_dtype = of_dtype.map(parameter).collect::<Result<Vec<_>>>()?;
            if !of_dtype.is_empty() {
                let state = handle(state);
                self.launch(
                    "adamw",
                    |client| dispatch_float!(dtype, E => kernels::step::<R, E>(client, &options, &of_dtype, state)),
                )?;
            }
        }
        Ok(())
    }
}
