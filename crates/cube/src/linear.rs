//! Linear layers on the kernels of `unsloth-linear`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Result, Tensor, Weight,
    ops::linear::{Linear, Spec},
};
use unsloth_linear::linear as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut, output},
    backend::CubeBackend,
};

pub(crate) fn shape(spec: &Spec) -> kernels::Shape {
    let &Spec { rows, in_features, out_features, .. } = spec;
    kernels::Shape { rows, in_features, out_features }
}

impl<R: Runtime> Linear for CubeBackend<R> {
    fn linear_forward(&self, spec: &Spec, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
        let mut y = output("linear_forward", x, spec.dtype, [spec.rows, spec.out_features])?;
        let weight = weight.to_dense()?;
        let bias_dtype = bias.map_or(spec.dtype, Tensor::dtype);
        let to_y = handle_mut("linear_forward", "y", &mut y)?;
        let args = kernels::Forward { x: handle(x), weight: handle(&weight), bias: bias.map(handle), y: to_y };
        self.launch("linear_forward", |client| {
            dispatch_float!(spec.dtype, X => dispatch_float!(spec.weight_dtype, W => dispatch_float!(bias_dtype, B =>
                kernels::forward::<R, X, W, B>(self.target(client), shape(spec), args))))
        })?;
        Ok(y)
    }

    fn linear_input_gradient(&self, spec: &Spec, dy: &Tensor, weight: &Weight) -> Result<Tensor> {
        let mut dx = output("linear_input_gradient", dy, spec.dtype, [spec.rows, spec.in_features])?;
        let weight = weight.to_dense()?;
        let to_dx = handle_mut("linear_input_gradient", "dx", &mut dx)?;
        let args = kernels::InputGradient { dy: handle(dy), weight: handle(&weight), dx: to_dx };
        self.launch("linear_input_gradient", |client| {
            dispatch_float!(spec.dtype, X => dispatch_float!(spec.weight_dtype, W =>
                kernels::input_gradient::<R, X, W>(self.target(client), shape(spec), args)))
        })?;
        Ok(dx)
    }

    fn linear_weight_gradient(&self, spec: &Spec, dy: &Tensor, x: &Tensor, dweight: &mut Tensor) -> Result<()> {
        let dweight = handle_mut("linear_weight_gradient", "dweight", dweight)?;
        let args = kernels::WeightGradient { dy: handle(dy), x: handle(x), dweight };
        self.launch(
            "linear_weight_gradient",
            |client| dispatch_float!(spec.dtype, X => kernels::weight_gradient::<R, X>(self.target(client), shape(spec), args)),
        )
    }

    fn linear_bias_gradient(&self, spec: &Spec, dy: &Tensor, dbias: &mut Tensor) -> Result<()> {
        let dbias = handle_mut("linear_bias_gradient", "dbias", dbias)?;
        let args = kernels::BiasGradient { dy: handle(dy), dbias };
        self.launch(
            "linear_bias_gradient",
            |client| dispatch_float!(spec.dtype, X => kernels::bias_gradient::<R, X>(self.target(client), shape(spec), args)),
        )
    }
}
