//! What a run tells while it works, and when it is over.

use std::{path::PathBuf, time::Duration};

use unsloth_core::StoreUsage;
use unsloth_train::Origin;

use crate::{
    dataset::{Report, Sample},
    recipe::{Best, Damage, EvalRecord, Fitted, StepRecord},
};

/// What a run tells while it works.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The run fits the limit on memory that it was given.
    Fitted(Box<Fitted>),
    /// Model and data are loaded; training begins.
    Prepared(Prepared),
    /// The run goes on from a checkpoint; follows [`Event::Prepared`].
    Resumed(Resumed),
    /// A step is done.
    Step(StepRecord),
    /// Where the first infinity or NaN of the step came from that is told next; if it reached a gradient, that step was skipped, and the
    /// loss scale is lowered.
    Overflow(Origin),
    /// The model was evaluated.
    Evaluated(EvalRecord),
    /// A checkpoint was saved, in this folder.
    Saved(PathBuf),
}

/// A run before its first step.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// What was read to train on.
    pub data: Report,
    /// What was read, or held out, to evaluate on.
    pub eval: Option<EvalReport>,
    /// The beginning of the first example; `None` for a model without a tokenizer.
    pub sample: Option<Sample>,
    /// Limit that examples were cut to, in tokens.
    pub max_seq_len: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Elements of all trained tensors.
    pub num_trained: usize,
    /// Tensors of the checkpoint that the model has no place for.
    pub unused_tensors: Vec<String>,
}

/// Data to evaluate on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalReport {
    /// What it is.
    pub data: Report,
    /// Examples of it that are trained on too, so that its loss says little about other texts.
    pub num_trained_on: usize,
}

/// Where a run goes on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// Steps done before.
    pub step: usize,
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// Newer ones that are not whole, the newest first.
    pub damaged: Vec<Damage>,
    /// What is wrong with the best one, in a run that keeps it: the best from now on will be taken for it.
    pub damaged_best: Option<Damage>,
    /// Steps before it that `metrics.jsonl` says nothing about any more.
    pub num_missing_records: usize,
    /// The version that saved it, if it is not this one; another version need not compute the same bits.
    pub other_version: Option<String>,
}

/// A run that is over.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Steps taken, before an interruption too.
    pub steps: usize,
    /// Loss of the first step.
    pub first_loss: f32,
    /// Loss of the last step.
    pub last_loss: f32,
    /// The last evaluation.
    pub evaluation: Option<EvalRecord>,
    /// The best evaluation and its checkpoint, in a run that keeps it: what the output folder holds of a run that is done.
    pub best: Option<(Best, PathBuf)>,
    /// Tokens trained on.
    pub tokens: usize,
    /// Time of all steps.
    pub elapsed: Duration,
    /// Most bytes held at once since this process began, by the ledger of the device.
    pub peak_bytes: u64,
    /// Bytes that the device had taken from the system or driver at the end, for buffers and for their reuse.
    pub reserved_bytes: u64,
    /// What waited outside the device, if anything was to.
    pub offloaded: Option<StoreUsage>,
    /// Folder of the adapter.
    pub output: PathBuf,
    /// How it ended.
    pub end: End,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// All steps are done.
    Done,
    /// It was stopped after a step, which this checkpoint holds. `None`: before it took a step; the output folder is as it was.
    Stopped(Option<PathBuf>),
}
