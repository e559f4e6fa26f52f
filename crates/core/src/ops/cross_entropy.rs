//! Softmax cross entropy over a vocabulary.
//!
//! For a row of logits, first `z = softcap * tanh(logit_scale * logits / softcap)` (or `z = logit_scale * logits`), then with
//! `lse = ln sum exp z`, target `y`, smoothing `s` and `V` classes:
//! - `nll = lse - (1 - s) * z[y] - s * mean(z) + z_loss * lse^2`
//! - `loss = sum over rows with a target of nll / num_targets`
//! - `dz = (softmax(z) * (1 + 2 * z_loss * lse) - (1 - s) * onehot(y) - s / V) * loss_scale / num_targets`,
//!   `dlogits = dz * logit_scale * (1 - (z / softcap)^2)`
//!
//! Rows whose target is [`IGNORE_INDEX`] give neither loss nor gradient.   Softcap: Gemma 2, arXiv:2408.00118; z-loss: PaLM,
//! arXiv:2204.02311; smoothing: Szegedy et al. 2015, arXiv:1512.00567.

use super::{
    check,
    cost::{Cost, stored},
};
use crate::{DType, Result, Tensor};

/// Target of a row that takes no part in the loss.
pub const IGNORE_INDEX: i32 = -100;

/// Everything about the loss that is the same for all rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossSpec {
    /// Divisor of the loss: the number of targets in the whole (accumulated, all-ranks) batch; at least 1.
    pub num_targets: usize,
    /// Multiplies gradients, not the loss: the loss scale of f16 training, else 1.
    pub loss_scale: f32,
    /// Multiplies the logits (Cohere), else 1.
    pub logit_scale: f32,
    /// Bounds the logits smoothly to `(-softcap, softcap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// Probability mass spread over all classes, in `[0, 1)`.
    pub label_smoothing: f32,
    /// Weight of `lse^2`, 0 or more.
    pub z_loss: f32,
}

impl LossSpec {
    /// Plain cross entropy averaged over `num_targets`.
    pub fn mean(num_targets: usize) -> Self {
        Self { num_targets, loss_scale: 1.0, logit_scale: 1.0, softcap: None, label_smoothing: 0.0, z_loss: 0.0 }
    }

    pub(super) fn validate(&self, op: &'static str) -> Result<()> {
        if self.num_targets == 0 {
            return check::invalid(op, "num_targets", 0, "at least 1");
        }
        check::positive(op, "loss_scale", self.loss_scale)?;
        check::positive(op, "logit_scale", self.logit_scale)?;
        if let Some(softcap) = self.softcap {
            check::positive(op, "softcap", softcap)?;
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return check::invalid(op, "label_smoothing", self.label_smoothing, "in [0, 1)");
        }
        if !(self.z_loss >= 0.0 && self.z_loss.is_finite()) {
            return check::invalid(op, "z_loss", self.z_loss, "0 or more");
        }
        Ok(())
    }
}

/// What defines one loss over given logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Number of rows.
    pub tokens: usize,
    /// Number of classes, at least 1.
    pub vocab_size: usize,
    /// The loss.
    pub loss: LossSpec,
    /// Storage type of the logits; arithmetic is f32.
    pub dtype: DType,
}

impl Spec {
    /// Logits and targets in, lse out.
    pub fn forward_cost(&self) -> Cost {
        Cost::read(self.logits() + stored(self.tokens, DType::I32)) + Cost::written(stored(self.tokens, DType::F32))
    }

    /// Logits, targets and lse in, dlogits out.
    pub fn backward_cost(&self) -> Cost {
        let rows = stored(self.tokens, DType::I32) + stored(self.tokens, DType::F32);
        Cost::read(self.logits() + rows) + Cost::written(self.logits())
    }

    /// Bytes of the logits.
    fn logits(&self) -> usize {
        stored(self.tokens * self.vocab_size, self.dtype)
    }
}

/// Results of the forward pass.
#[derive(Debug)]
pub struct Forward {
    /// f32 `[1]`
    pub loss: Tensor,
    /// f32 `[tokens]`: natural-log sum of exponentials of each row of `z`; 0 for rows without a target.
    pub lse: Tensor,
}

/// Cross entropy of a backend.
pub trait CrossEntropy {
    /// Loss and LSE. A target outside `0 .. vocab_size` other than [`IGNORE_INDEX`] is never used as an index; where the
    /// host can see the targets it is an [`crate::Error::InvalidSpec`].
    fn cross_entropy_forward(&self, spec: &Spec, logits: &Tensor, targets: &Tensor) -> Result<Forward>;
    /// `dlogits`, written over `logits` where unique; rows without a target get 0.
    fn cross_entropy_backward(&self, spec: &Spec, logits: Tensor, targets: &Tensor, lse: &Tensor) -> Result<Tensor>;
}

fn spec(logits: &Tensor, targets: &Tensor, loss: LossSpec) -> Result<Spec> {
    check::float("cross_entropy", "logits", logits.dtype())?;
    check::rank("cross_entropy", "logits", logits, 2, "[tokens, vocab_size]")?;
    let (tokens, vocab_size) = (logits.shape()[0], logits.shape()[1]);
    if vocab_size == 0 {
        return check::invalid("cross_entropy", "vocab_size", 0, "at least 1");
    }
    check::tensor("cross_entropy", "targets", targets, (&[tokens], DType::I32, logits.device()))?;
    loss.validate("cross_entropy")?;
    Ok(Spec { tokens, vocab_size, loss, dtype: logits.dtype() })
}

/// Loss of logits `[tokens, vocab_size]` against targets i32 `[tokens]`.
///
/// # Errors
/// Shape, dtype or device mismatch; a field of `loss` out of its range; a target outside the vocabulary.
pub fn forward(logits: &Tensor, targets: &Tensor, loss: LossSpec) -> Result<Forward> {
    let spec = spec(logits, targets, loss)?;
    logits.device().backend().cross_entropy_forward(&spec, logits, targets)
}

/// Gradient of the loss with respect to the logits, written over them where their buffer is unique.
///
/// # Errors
/// As [`forward`].
pub fn backward(logits: Tensor, targets: &Tensor, lse: &Tensor, loss: LossSpec) -> Result<Tensor> {
    let spec = spec(&logits, targets, loss)?;
    check::tensor("cross_entropy", "lse", lse, (&[spec.tokens], DType::F32, logits.device()))?;
    let device = logits.device().clone();
    device.backend().cross_entropy_backward(&spec, logits, targets, lse)
}
