//! Adafactor on the kernels of `unsloth-pointwise`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    DType, Result, Tensor,
    ops::adafactor::{Adafactor, Averages, Buffers, Spec},
};
use unsloth_pointwise::adafactor as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut, workspace},
    backend::CubeBackend,
};

const OP: &str = "adafactor";

impl<R: Runtime> CubeBackend<R> {
    fn adafactor_step(&self, spec: &Spec, dtype: DType, args: kernels::Step<'_>) -> Result<()> {
        let &Spec { learning_rate, decay_rate, eps, clip_threshold, parameter_scale, weight_decay } = spec;
        let options =
            kernels::Options { learning_rate, decay_rate, eps, clip_threshold, parameter_scale, weight_decay };
        self.launch(OP, |client| dispatch_float!(dtype, E => kernels::step::<R, E>(client, &options, args)))
    }
}

impl<R: Runtime> Adafactor for CubeBackend<R> {
    fn adafactor(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()> {
        let Buffers { param, grad, averages } = buffers;
        let (len, dtype) = (grad.num_elements(), param.dtype());
        let scratch = |len| workspace(OP, grad, DType::F32, [len]);
        let sums = scratch(kernels::workspace_len(len))?;
        let (param, workspace, state) = (handle_mut(OP, "param", param)?, handle(&sums), handle(state));
        let step = |averages| kernels::Step { param, grad: handle(grad), averages, workspace, state };
        match averages {
            Averages::Whole(v) => {
                let v = handle_mut(OP, "v", v)?;
                self.adafactor_step(spec, dtype, step(kernels::Averages::Whole { v, len }))
            }
            Averages::Factored { row, col } => {
                let size = [row.num_elements(), col.num_elements()];
                let (sums, roots) = (scratch(kernels::column_sums(size))?, scratch(size[0])?);
                let (row, col) = (handle_mut(OP, "row", row)?, handle_mut(OP, "col", col)?);
                let factored = kernels::Factored { size, row, col, sums: handle(&sums), roots: handle(&roots) };
                self.adafactor_step(spec, dtype, step(kernels::Averages::Factored(factored)))
            }
        }
    }
}
