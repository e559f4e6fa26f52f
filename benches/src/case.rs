//! One thing that is timed: an operator's call at a model's shape, or a whole step.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use unsloth_rs::{
    Category, DType, Device, Shape, Tensor,
    core::{ops::elementwise, rng::Philox},
};

use crate::recorder::Recording;

/// What is timed. Two results are about the same thing if their ids are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Id {
    /// Operator, or `train_step` or `decode`.
    pub op: String,
    /// Which of its calls.
    pub part: String,
    /// Whose shape.
    pub model: String,
    /// Sizes.
    pub shape: String,
    /// Storage type of activations.
    pub dtype: String,
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { op, part, model, shape, dtype } = self;
        write!(f, "{op} {part}, {model}, {shape}, {dtype}")
    }
}

type Prepare = dyn Fn(&Context<'_>) -> Result<Prepared>;

/// A thing to time that has not been built yet: its inputs may be large.
pub struct Case {
    /// What it is.
    pub id: Id,
    /// Tokens that one run is about, where tokens per second are of interest.
    pub tokens: Option<usize>,
    prepare: Box<Prepare>,
}

impl Case {
    pub(crate) fn new(
        (op, part): (&str, &str),
        (model, shape): (&str, String),
        dtype: DType,
        prepare: impl Fn(&Context<'_>) -> Result<Prepared> + 'static,
    ) -> Self {
        let (op, part, model) = (op.to_owned(), part.to_owned(), model.to_owned());
        let id = Id { op, part, model, shape, dtype: dtype.name().to_owned() };
        Self { id, tokens: None, prepare: Box::new(prepare) }
    }

    pub(crate) fn with_tokens(self, tokens: usize) -> Self {
        Self { tokens: Some(tokens), ..self }
    }

    /// Makes the inputs.
    ///
    /// # Errors
    /// [`unsloth_rs::Error::OutOfMemory`], or what the operator refuses.
    pub fn prepare(&self, context: &Context<'_>) -> Result<Prepared> {
        (self.prepare)(context)
    }
}

/// Where a case runs.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The device, recorded.
    pub device: &'a Device,
    /// Its record.
    pub recording: &'a Arc<Recording>,
    /// Whether the tensors lie in this process, where candle can read them.
    pub with_candle: bool,
}

/// Something to time.
pub enum Run {
    /// Timed from outside; may leave work on the device.
    Call(Box<dyn FnMut() -> Result<()>>),
    /// Times a part of itself, and has waited for the device.
    Clocked(Box<dyn FnMut() -> Result<Duration>>),
}

impl Run {
    pub(crate) fn call<T, E: Into<anyhow::Error>>(mut call: impl FnMut() -> Result<T, E> + 'static) -> Self {
        Self::Call(Box::new(move || call().map(drop).map_err(Into::into)))
    }

    /// Calls of an operator that writes over its input, as a training step makes them: each owns what the one before gave back,
    /// so that no buffer is shared and none has to be copied first.
    pub(crate) fn in_place<T: 'static, E: Into<anyhow::Error>>(
        first: T,
        mut call: impl FnMut(T) -> Result<T, E> + 'static,
    ) -> Self {
        let mut state = Some(first);
        Self::Call(Box::new(move || {
            let input = state.take().context("an earlier call failed")?;
            state = Some(call(input).map_err(Into::into)?);
            Ok(())
        }))
    }
}

/// A case with its inputs.
pub struct Prepared {
    /// Refuses to go on if the result is wrong.
    pub check: Box<dyn FnMut() -> Result<()>>,
    /// What is timed.
    pub run: Run,
    /// candle's way to the same result, where it has one.
    pub candle: Option<Run>,
    /// The same task for PyTorch, as `benches/peers/torch_peer.py` reads it, in each way that it is compared with, by the peer's name.
    pub torch: Vec<(&'static str, Value)>,
}

impl Prepared {
    pub(crate) fn new(check: impl FnMut() -> Result<()> + 'static, run: Run) -> Self {
        Self { check: Box::new(check), run, candle: None, torch: Vec::new() }
    }

    pub(crate) fn with_candle(self, candle: Option<Run>) -> Self {
        Self { candle, ..self }
    }

    pub(crate) fn with_torch(self, torch: Value) -> Self {
        self.with_torch_as([("torch", torch)])
    }

    pub(crate) fn with_torch_as(self, torch: impl Into<Vec<(&'static str, Value)>>) -> Self {
        Self { torch: torch.into(), ..self }
    }
}

/// Random numbers in `(-0.5, 0.5)` times `scale`, the same for the same seed.
///
/// # Errors
/// [`unsloth_rs::Error::OutOfMemory`]; a type that the device lacks.
pub(crate) fn random_scaled(
    device: &Device,
    shape: impl Into<Shape>,
    dtype: DType,
    (seed, scale): (u64, f32),
) -> Result<Tensor> {
    let shape = shape.into();
    let stream = Philox::new(seed, 0);
    let mut values = vec![0f32; shape.num_elements()];
    // Four numbers a block; a task makes many.
    const TASK: usize = 1 << 16;
    values.par_chunks_mut(TASK).enumerate().for_each(|(task, values)| {
        for (i, four) in values.chunks_mut(4).enumerate() {
            let block = task * TASK / 4 + i;
            let words = stream.block([block as u32, (block >> 32) as u32, 0, 0]);
            four.iter_mut().zip(words).for_each(|(value, word)| {
                *value = ((word >> 8) as f32 / 16_777_216.0 - 0.5) * scale;
            });
        }
    });
    Ok(elementwise::cast(&device.from_slice(&values, shape, Category::Activations)?, dtype)?)
}

/// The same number everywhere.
///
/// # Errors
/// As [`random_scaled`].
pub(crate) fn constant(device: &Device, shape: impl Into<Shape>, dtype: DType, value: f32) -> Result<Tensor> {
    let shape = shape.into();
    let values = vec![value; shape.num_elements()];
    Ok(elementwise::cast(&device.from_slice(&values, shape, Category::Activations)?, dtype)?)
}

/// The scale of [`random_scaled`] that gives numbers of variance 1.
pub(crate) const UNIFORM_TO_UNIT: f32 = 3.464_101_6;

/// [`random_scaled`] by 1.
pub(crate) fn random(device: &Device, shape: impl Into<Shape>, dtype: DType, seed: u64) -> Result<Tensor> {
    random_scaled(device, shape, dtype, (seed, 1.0))
}
