//! Errors of the training loop.

use crate::{LossScaleError, Origin};

/// Result of every call that steers a run.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong while a run is set up or under way.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operator or an allocation failed outside a step.
    #[error(transparent)]
    Core(#[from] unsloth_core::Error),
    /// The loss scaler was called out of turn.
    #[error(transparent)]
    LossScale(#[from] LossScaleError),
    /// An operator or an allocation failed within a step.
    #[error("step {step} failed")]
    Step {
        /// The step, from 1.
        step: usize,
        /// What failed.
        #[source]
        source: unsloth_core::Error,
    },
    /// Loss or gradients of a step were infinite or NaN. Parameters and optimiser are those of the step before.
    #[error(
        "step {step}: loss {loss} with gradient norm {grad_norm} is not finite; parameters are kept as the step before left them{}",
        origin.as_ref().map(|origin| format!("; {origin}")).unwrap_or_default()
    )]
    NonFinite {
        /// The step, from 1.
        step: usize,
        /// Its loss.
        loss: f32,
        /// Its gradient norm, before clipping.
        grad_norm: f32,
        /// Where it began, if somebody looked.
        origin: Option<Box<Origin>>,
    },
    /// The trainer has reported an error before and takes no more steps.
    #[error("training stopped with an error at step {step}; the trainer takes no more steps")]
    Stopped {
        /// The step that failed, from 1.
        step: usize,
    },
    /// The state of a run was asked for while the outcome of a step is not known.
    #[error("the outcome of step {step} has not been read; finish first")]
    Unread {
        /// The step, from 1.
        step: usize,
    },
    /// No token of a whole step has a target, so its loss is undefined.
    #[error("step {step}: no token has a target")]
    NoTargets {
        /// The step, from 1.
        step: usize,
    },
    /// No token of an evaluation has a target, so its loss is undefined.
    #[error("evaluation: no token has a target")]
    NothingToEvaluate,
    /// A document has another number of targets than of ids.
    #[error("document {document}: {num_targets} targets for {num_ids} ids")]
    TargetLength {
        /// Position of the document in its batch, from 0.
        document: usize,
        /// Number of ids.
        num_ids: usize,
        /// Number of targets.
        num_targets: usize,
    },
    /// A batch holds no token at all.
    #[error("batch: {num_documents} documents hold no token")]
    EmptyBatch {
        /// Number of documents given.
        num_documents: usize,
    },
    /// A field of a configuration is out of its range.
    #[error("{field} = {value}, must be {rule}")]
    InvalidConfig {
        /// Name of the field.
        field: &'static str,
        /// Value given.
        value: String,
        /// Rule that the value breaks.
        rule: &'static str,
    },
    /// A checkpointing policy does not suit the model.
    #[error("checkpointing = {value}, must be {rule}")]
    Checkpointing {
        /// The policy.
        value: String,
        /// What the model takes.
        rule: String,
    },
    /// An adapter's rank does not suit a layer.
    #[error("{layer}: rank = {rank}, must be 1 to {max_rank}")]
    InvalidRank {
        /// Module path of the layer.
        layer: String,
        /// Rank given.
        rank: usize,
        /// The smaller of the layer's two dimensions.
        max_rank: usize,
    },
    /// A layer that has an adapter was given another one.
    #[error("{layer}: has an adapter already")]
    AdapterExists {
        /// Module path of the layer.
        layer: String,
    },
}

/// An [`Error::InvalidConfig`].
pub(crate) fn invalid<T>(field: &'static str, value: impl std::fmt::Display, rule: &'static str) -> Result<T> {
    Err(Error::InvalidConfig { field, value: value.to_string(), rule })
}
