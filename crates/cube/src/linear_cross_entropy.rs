//! Linear cross entropy on the kernels of `unsloth-loss`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    DType, Memory, Result, Tensor, Weight,
    ops::linear_cross_entropy::{Forward, LinearCrossEntropy, Spec},
};
use unsloth_loss::linear_cross_entropy as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut, output, workspace},
    backend::CubeBackend,
    cross_entropy::loss,
};

/// Whether the gradient of the logits is rounded to the type of `x`. Not where the matrix is of the other half-precision type: no
/// tensor core multiplies the two, while it takes f32 with bf16.
fn rounds_dlogits(spec: &Spec) -> bool {
    spec.dtype != DType::F32 && (spec.weight_dtype == spec.dtype || spec.weight_dtype == DType::F32)
}

impl<R: Runtime> LinearCrossEntropy for CubeBackend<R> {
    fn linear_cross_entropy(
        &self,
        spec: &Spec,
        x: &Tensor,
        weight: &Weight,
        targets: &Tensor,
        dweight: Option<&mut Tensor>,
    ) -> Result<Forward> {
        const OP: &str = "linear_cross_entropy";
        let &Spec { tokens, hidden_size, vocab_size, .. } = spec;
        let chunk_bytes = kernels::chunk_bytes(self.memory_bytes()).min(self.properties().memory.max_page_size);
        let shape = kernels::Shape { tokens, hidden_size, vocab_size, chunk_bytes, loss: loss(&spec.loss) };
        let dweight = dweight.map(|dweight| handle_mut(OP, "dweight", dweight)).transpose()?;
        let weight = weight.to_dense()?;
        let mut dx = spec.needs_dx.then(|| output(OP, x, spec.dtype, *x.shape())).transpose()?;
        let mut loss = output(OP, x, DType::F32, [1])?;
        let workspace = |dtype, len: usize| workspace(OP, x, dtype, [len]);
        let (mut nll, mut lse) = (workspace(DType::F32, tokens)?, workspace(DType::F32, tokens)?);
        let chunk_len = shape.chunk_rows() * vocab_size;
        let mut logits = workspace(DType::F32, chunk_len)?;
        let has_gradient = spec.needs_dx || dweight.is_some();
        let mut dlogits =
            (has_gradient && rounds_dlogits(spec)).then(|| workspace(spec.dtype, chunk_len)).transpose()?;
        let args = kernels::Args {
            x: handle(x),
            weight: handle(&weight),
            targets: handle(targets),
            logits: handle_mut(OP, "logits", &mut logits)?,
            dlogits: dlogits.as_mut().map(|dlogits| handle_mut(OP, "dlogits", dlogits)).transpose()?,
            nll: handle_mut(OP, "nll", &mut nll)?,
            lse: handle_mut(OP, "lse", &mut lse)?,
            loss: handle_mut(OP, "loss", &mut loss)?,
            dx: dx.as_mut().map(|dx| handle_mut(OP, "dx", dx)).transpose()?,
            dweight,
        };
        self.launch(OP, |client| {
            dispatch_float!(spec.dtype, X => dispatch_float!(spec.weight_dtype, W =>
                kernels::forward::<R, X, W>(self.target(client), shape, args)))
        })?;
        Ok(Forward { loss, dx })
    }
}
