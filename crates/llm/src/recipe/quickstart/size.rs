//! How much a quickstart makes and learns.

use std::path::PathBuf;

use unsloth_train::{AdamWConfig, ScheduleKind};

use super::QuickstartConfig;
use crate::{
    Error, Result,
    packing::at_least,
    recipe::{Start, TrainConfig, Warmup},
};

/// Sizes of data, model and trainings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Size {
    /// Stories of the corpus; each is seen once.
    pub num_stories: usize,
    /// Chats to learn from, of three questions each; each is seen once.
    pub num_lessons: usize,
    /// Questions to be asked.
    pub num_held_out: usize,
    /// Width of the model.
    pub hidden_size: usize,
    /// Width between the matrices of its feed-forward parts.
    pub intermediate_size: usize,
    /// Layers.
    pub num_layers: usize,
    /// Heads, of queries and of keys and values alike.
    pub num_heads: usize,
    /// Standard deviation of the random weights.
    pub initializer_range: f64,
    /// Inner dimension of the adapter.
    pub rank: usize,
    /// From random weights.
    pub pretraining: TrainingSize,
    /// Of the adapter.
    pub fine_tuning: TrainingSize,
}

/// Sizes of a training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainingSize {
    /// Sequences of a step, each of up to 256 tokens.
    pub batch_size: usize,
    /// The full learning rate.
    pub learning_rate: f64,
}

/// Longest sequence, in tokens: of the model, and of packed examples.
pub(super) const MAX_SEQ_LEN: usize = 256;

impl Size {
    /// Some minutes on two cores.
    pub const FULL: Self = Self {
        num_stories: 5600,
        num_lessons: 1200,
        num_held_out: 200,
        hidden_size: 256,
        intermediate_size: 704,
        num_layers: 4,
        num_heads: 4,
        initializer_range: 0.06,
        rank: 16,
        pretraining: TrainingSize { batch_size: 4, learning_rate: 1e-3 },
        fine_tuning: TrainingSize { batch_size: 4, learning_rate: 2e-3 },
    };

    /// Seconds, even without optimisation: enough to see the parts work together, too little to learn to read.
    pub const TINY: Self = Self {
        num_stories: 120,
        num_lessons: 60,
        num_held_out: 10,
        hidden_size: 32,
        intermediate_size: 64,
        num_layers: 2,
        num_heads: 2,
        initializer_range: 0.06,
        rank: 4,
        pretraining: TrainingSize { batch_size: 1, learning_rate: 1e-2 },
        fine_tuning: TrainingSize { batch_size: 1, learning_rate: 1e-2 },
    };

    /// # Errors
    /// [`Error::InvalidOption`], naming the field, for a count of 0 or a width that the heads do not share evenly. What concerns
    /// the trainings is checked where they begin.
    pub fn validate(&self) -> Result<()> {
        at_least("num_stories", self.num_stories, 1)?;
        at_least("num_lessons", self.num_lessons, 1)?;
        at_least("num_held_out", self.num_held_out, 1)?;
        at_least("num_heads", self.num_heads, 1)?;
        if !self.hidden_size.is_multiple_of(2 * self.num_heads) {
            let rule = format!("a multiple of twice num_heads, which is {}", self.num_heads);
            return Err(Error::InvalidOption { field: "hidden_size", value: self.hidden_size.to_string(), rule });
        }
        Ok(())
    }
}

impl TrainingSize {
    /// One pass over `data`, from the model in one folder to another one.
    pub(super) fn config(&self, config: &QuickstartConfig, [model, data, output]: [PathBuf; 3]) -> TrainConfig {
        TrainConfig {
            // An earlier quickstart may be there.
            start: Start::Overwrite,
            seed: config.seed,
            max_seq_len: Some(MAX_SEQ_LEN),
            batch_size: self.batch_size,
            learning_rate: self.learning_rate,
            schedule: ScheduleKind::Linear,
            warmup: Warmup::Ratio(0.05),
            // A short run cannot wait for the average of a thousand steps.
            optimizer: AdamWConfig { beta2: 0.95, ..AdamWConfig::default() }.into(),
            ..TrainConfig::new(model, vec![data], output)
        }
    }
}
