//! Linear cross entropy on the kernels of `unsloth-loss`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    DType, Result, Tensor, Weight,
    ops::linear_cross_entropy::{Forward, LinearCrossEntropy, Spec},
};
use unsloth_loss::linear_cross_entropy as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut, output, workspace},
    backend::CubeBackend,
    cross_entropy::loss,
};

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
        let shape = kernels::Shape { tokens, hidden_size, vocab_size, loss: loss(&spec.loss) };
        let dweight = dweight.map(|dweight| handle_mut(OP, "dweight", dweight)).transpose()?;
        let weight = weight.to_dense()?;
        let mut dx = spec.needs_dx.then(|| output(OP, x, spec.dtype, *x.shape())).transpose()?;
        let mut loss = output(OP, x, DType::F32, [1])?;
        let workspace = |len: usize| workspace(OP, x, DType::F32, [len]);
        let (mut nll, mut lse) = (workspace(tokens)?, workspace(tokens)?);
        let mut logits = workspace(shape.chunk_rows() * vocab_size)?;
        let args = kernels::Args {
            x: handle(x),
            weight: handle(&weight),
            targets: handle(targets),
            logits: handle_mut(OP, "logits", &mut logits)?,
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
