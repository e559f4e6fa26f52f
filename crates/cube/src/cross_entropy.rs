//! Cross entropy on the kernels of `unsloth-loss`.

use cubecl::prelude::Runtime;
use unsloth_core::{
    DType, Result, Tensor,
    ops::cross_entropy::{CrossEntropy, Forward, LossSpec, Spec},
};
use unsloth_loss::cross_entropy as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut, output, workspace},
    backend::CubeBackend,
};

pub(crate) fn loss(spec: &LossSpec) -> kernels::Loss {
    let &LossSpec { num_targets, loss_scale, logit_scale, softcap, label_smoothing, z_loss } = spec;
    kernels::Loss { num_targets, loss_scale, logit_scale, softcap, label_smoothing, z_loss }
}

fn shape(spec: &Spec) -> kernels::Shape {
    kernels::Shape { tokens: spec.tokens, vocab_size: spec.vocab_size, loss: loss(&spec.loss) }
}

impl<R: Runtime> CrossEntropy for CubeBackend<R> {
    fn cross_entropy_forward(&self, spec: &Spec, logits: &Tensor, targets: &Tensor) -> Result<Forward> {
        const OP: &str = "cross_entropy_forward";
        let mut lse = output(OP, logits, DType::F32, [spec.tokens])?;
        let mut loss = output(OP, logits, DType::F32, [1])?;
        let mut nll = workspace(OP, logits, DType::F32, [spec.tokens])?;
        let nll = handle_mut(OP, "nll", &mut nll)?;
        let lse_out = handle_mut(OP, "lse", &mut lse)?;
        let args = kernels::Forward { logits: handle(logits), targets: handle(targets), nll, lse: lse_out };
        let mean = kernels::Mean { nll, loss: handle_mut(OP, "loss", &mut loss)? };
        self.launch(OP, |client| {
            dispatch_float!(spec.dtype, E => kernels::forward::<R, E>(client, shape(spec), args))?;
            kernels::mean(client, shape(spec), mean)
        })?;
        Ok(Forward { loss, lse })
    }

    fn cross_entropy_backward(&self, spec: &Spec, logits: Tensor, targets: &Tensor, lse: &Tensor) -> Result<Tensor> {
        let mut dlogits = self.reusable(logits)?;
        let in_place = handle_mut("cross_entropy_backward", "logits", &mut dlogits)?;
        let args = kernels::Backward { logits: None, dlogits: in_place, targets: handle(targets), lse: handle(lse) };
        self.launch(
            "cross_entropy_backward",
            |client| dispatch_float!(spec.dtype, E => kernels::backward::<R, E, E>(client, shape(spec), args)),
        )?;
        Ok(dlogits)
    }
}
