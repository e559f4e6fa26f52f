//! Trained lengths of rows on the kernels of `unsloth-linear`.

use cubecl::prelude::Runtime;
use unsloth_common::column_parts;
use unsloth_core::{
    DType, Result, Tensor, Weight,
    ops::{
        dora::{Dora, Lengths, NormSpec, Spec},
        elementwise::Elementwise,
    },
};
use unsloth_linear::dora as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut, output, workspace},
    backend::CubeBackend,
};

const OP: &str = "dora";

fn shape(spec: &Spec) -> kernels::Shape {
    let &Spec { rows, out_features, .. } = spec;
    kernels::Shape { rows, out_features }
}

fn of_rows<'a>(lengths: &Lengths<'a>) -> kernels::Lengths<'a> {
    kernels::Lengths { magnitude: handle(lengths.magnitude), norms: handle(lengths.norms) }
}

impl<R: Runtime> Dora for CubeBackend<R> {
    fn dora_norms(&self, spec: &NormSpec, weight: &Weight, lora_a: &Tensor, lora_b: &Tensor) -> Result<Tensor> {
        let &NormSpec { in_features, out_features, weight_dtype, rank, scale } = spec;
        let shape = kernels::NormShape { in_features, out_features, rank, scale };
        let weight = weight.to_dense()?;
        let mut norms = output(OP, &weight, DType::F32, [out_features])?;
        let args = kernels::Norms {
            weight: handle(&weight),
            lora_a: handle(lora_a),
            lora_b: handle(lora_b),
            norms: handle_mut(OP, "norms", &mut norms)?,
        };
        self.launch(OP, |client| dispatch_float!(weight_dtype, W => kernels::norms::<R, W>(client, shape, args)))?;
        Ok(norms)
    }

    fn dora_forward(&self, spec: &Spec, t: &Tensor, lengths: Lengths<'_>, bias: Option<&Tensor>) -> Result<Tensor> {
        let mut y = output(OP, t, spec.dtype, [spec.rows, spec.out_features])?;
        let (lengths, bias_dtype) = (of_rows(&lengths), bias.map_or(spec.dtype, Tensor::dtype));
        let to_y = handle_mut(OP, "y", &mut y)?;
        let args = kernels::Forward { t: handle(t), lengths, bias: bias.map(handle), y: to_y };
        self.launch(OP, |client| {
            dispatch_float!(spec.dtype, E => dispatch_float!(bias_dtype, B =>
                kernels::forward::<R, E, B>(client, shape(spec), args)))
        })?;
        Ok(y)
    }

    fn dora_backward(
        &self,
        spec: &Spec,
        dy: Tensor,
        t: &Tensor,
        lengths: Lengths<'_>,
        dmagnitude: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let mut dt = if dy.is_unique() { dy } else { self.copy(&dy)? };
        if let Some(dmagnitude) = dmagnitude {
            let workspace =
                workspace(OP, &dt, DType::F32, [column_parts(spec.rows, spec.out_features), spec.out_features])?;
            let args = kernels::MagnitudeGradient {
                dy: handle(&dt),
                t: handle(t),
                norms: handle(lengths.norms),
                workspace: handle(&workspace),
                dmagnitude: handle_mut(OP, "dmagnitude", dmagnitude)?,
            };
            self.launch(
                OP,
                |client| dispatch_float!(spec.dtype, E => kernels::magnitude_gradient::<R, E>(client, shape(spec), args)),
            )?;
        }
        let (lengths, over) = (of_rows(&lengths), handle_mut(OP, "dt", &mut dt)?);
        self.launch(
            OP,
            |client| dispatch_float!(spec.dtype, E => kernels::backward::<R, E>(client, shape(spec), over, lengths)),
        )?;
        Ok(dt)
    }
}
