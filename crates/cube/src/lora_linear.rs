//! LoRA linear on the kernels of `unsloth-linear`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    DType, Result, Tensor, Weight,
    ops::lora_linear::{Adapter, Backward, Dropout, Forward, LoraLinear, ParameterGradients, RowDropout, Spec},
};
use unsloth_linear::{dropout, linear, lora_linear as kernels};

use crate::{
    access::{dispatch_float, handle, handle_mut, output, workspace},
    backend::CubeBackend,
    linear::shape as base_shape,
};

const BACKWARD: &str = "lora_linear_backward";

fn shape(spec: &Spec) -> kernels::Shape {
    kernels::Shape { base: base_shape(&spec.base), rank: spec.rank, scale: spec.scale }
}

fn dropout<'a>(rows: &RowDropout<'a>) -> dropout::RowDropout<'a> {
    let &RowDropout { dropout: Dropout { probability, stream, step }, sequences, positions } = rows;
    let dropout = dropout::Dropout { probability, key: stream.key(), step };
    dropout::RowDropout { dropout, sequences: handle(sequences), positions: handle(positions) }
}

/// Scratch of a call on rows of the type of `like`.
fn rows_at_work(op: &'static str, spec: &Spec, like: &Tensor) -> Result<Tensor> {
    let dropped = spec.dropout.is_some();
    let len = dispatch_float!(spec.base.dtype, X => shape(spec).workspace_len::<X>(dropped));
    workspace(op, like, DType::F32, [len])
}

impl<R: Runtime> CubeBackend<R> {
    /// `scale * dy B`, f32 `[rows, rank]`.
    fn rank_gradient(&self, spec: &Spec, dy: &Tensor, lora_b: &Tensor) -> Result<Tensor> {
        let mut dh = workspace(BACKWARD, dy, DType::F32, [spec.base.rows, spec.rank])?;
        let to_dh = handle_mut(BACKWARD, "dh", &mut dh)?;
        let args = kernels::RankGradient { dy: handle(dy), lora_b: handle(lora_b), dh: to_dh };
        self.launch(BACKWARD, |client| {
            dispatch_float!(spec.base.dtype, X => dispatch_float!(spec.adapter_dtype, L =>
                kernels::rank_gradient::<R, X, L>(self.target(client), shape(spec), args)))
        })?;
        Ok(dh)
    }

    fn adapted_input_gradient(&self, spec: &Spec, inputs: Backward<'_>, dh: &Tensor) -> Result<Tensor> {
        let mut dx = output(BACKWARD, inputs.dy, spec.base.dtype, [spec.base.rows, spec.base.in_features])?;
        let weight = inputs.weight.to_dense()?;
        let to_dx = handle_mut(BACKWARD, "dx", &mut dx)?;
        let base = linear::InputGradient { dy: handle(inputs.dy), weight: handle(&weight), dx: to_dx };
        let workspace = rows_at_work(BACKWARD, spec, inputs.dy)?;
        let args = kernels::InputGradient {
            base,
            dh: handle(dh),
            lora_a: handle(inputs.adapter.lora_a),
            dropout: inputs.adapter.dropout.as_ref().map(dropout),
            workspace: handle(&workspace),
        };
        self.launch(BACKWARD, |client| {
            dispatch_float!(spec.base.dtype, X => dispatch_float!(spec.base.weight_dtype, W =>
                dispatch_float!(spec.adapter_dtype, L =>
                    kernels::input_gradient::<R, X, W, L>(self.target(client), shape(spec), args))))
        })?;
        Ok(dx)
    }
}

impl<R: Runtime> LoraLinear for CubeBackend<R> {
    fn lora_linear_hidden(&self, spec: &Spec, x: &Tensor, adapter: Adapter<'_>) -> Result<Tensor> {
        const OP: &str = "lora_linear_hidden";
        let mut h = output(OP, x, DType::F32, [spec.base.rows, spec.rank])?;
        let workspace = rows_at_work(OP, spec, x)?;
        let args = kernels::Hidden {
            x: handle(x),
            lora_a: handle(adapter.lora_a),
            dropout: adapter.dropout.as_ref().map(dropout),
            h: handle_mut(OP, "h", &mut h)?,
            workspace: handle(&workspace),
        };
        self.launch(OP, |client| {
            dispatch_float!(spec.base.dtype, X => dispatch_float!(spec.adapter_dtype, L =>
                kernels::hidden::<R, X, L>(self.target(client), shape(spec), args)))
        })?;
        Ok(h)
    }

    fn lora_linear_forward(
        &self,
        spec: &Spec,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        adapter: Adapter<'_>,
    ) -> Result<Forward> {
        const OP: &str = "lora_linear_forward";
        let mut h = output(OP, x, DType::F32, [spec.base.rows, spec.rank])?;
        let mut y = output(OP, x, spec.base.dtype, [spec.base.rows, spec.base.out_features])?;
        let weight = weight.to_dense()?;
        let bias_dtype = bias.map_or(spec.base.dtype, Tensor::dtype);
        let to_y = handle_mut(OP, "y", &mut y)?;
        let base = linear::Forward { x: handle(x), weight: handle(&weight), bias: bias.map(handle), y: to_y };
        let workspace = rows_at_work(OP, spec, x)?;
        let args = kernels::Forward {
            base,
            lora_a: handle(adapter.lora_a),
            lora_b: handle(adapter.lora_b),
            dropout: adapter.dropout.as_ref().map(dropout),
            h: handle_mut(OP, "h", &mut h)?,
            workspace: handle(&workspace),
        };
        self.launch(OP, |client| {
            dispatch_float!(spec.base.dtype, X => dispatch_float!(spec.base.weight_dtype, W =>
                dispatch_float!(bias_dtype, B => dispatch_float!(spec.adapter_dtype, L =>
                    kernels::forward::<R, X, W, B, L>(self.target(client), shape(spec), args)))))
        })?;
        Ok(Forward { y, h })
    }

    fn lora_linear_backward(
        &self,
        spec: &Spec,
        inputs: Backward<'_>,
        gradients: ParameterGradients<'_>,
    ) -> Result<Option<Tensor>> {
        let Backward { dy, x, h, adapter, needs_dx, .. } = inputs;
        let dtype = spec.base.dtype;
        if let Some(dlora_b) = gradients.dlora_b {
            let dlora_b = handle_mut(BACKWARD, "dlora_b", dlora_b)?;
            let args = kernels::GradientOfB { dy: handle(dy), h: handle(h), dlora_b };
            self.launch(
                BACKWARD,
                |client| dispatch_float!(dtype, X => kernels::gradient_of_b::<R, X>(self.target(client), shape(spec), args)),
            )?;
        }
        if gradients.dlora_a.is_none() && !needs_dx {
            return Ok(None);
        }
        let dh = self.rank_gradient(spec, dy, adapter.lora_b)?;
        if let Some(dlora_a) = gradients.dlora_a {
            let dlora_a = handle_mut(BACKWARD, "dlora_a", dlora_a)?;
            let workspace = rows_at_work(BACKWARD, spec, x)?;
            let dropout = adapter.dropout.as_ref().map(dropout);
            let args =
                kernels::GradientOfA { dh: handle(&dh), x: handle(x), dropout, dlora_a, workspace: handle(&workspace) };
            self.launch(
                BACKWARD,
                |client| dispatch_float!(dtype, X => kernels::gradient_of_a::<R, X>(self.target(client), shape(spec), args)),
            )?;
        }
        if !needs_dx {
            return Ok(None);
        }
        self.adapted_input_gradient(spec, inputs, &dh).map(Some)
    }
}
