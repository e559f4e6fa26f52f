//! Learning rate by step, as transformers' `get_*_schedule_with_warmup`.

use std::{f64::consts::PI, fmt, str::FromStr};

use crate::{Error, Result, error::invalid};

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine from the full rate to 0 at `total_steps`.      Loshchilov & Hutter 2016, arXiv:1608.03983
    #[default]
    Cosine,
    /// A straight line from the full rate to 0 at `total_steps`.
    Linear,
    /// The full rate.
    Constant,
}

/// `cosine`, `linear` or `constant`.
impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ScheduleKind::Cosine => "cosine",
            ScheduleKind::Linear => "linear",
            ScheduleKind::Constant => "constant",
        })
    }
}

impl FromStr for ScheduleKind {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidConfig`] for another name.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "cosine" => Ok(ScheduleKind::Cosine),
            "linear" => Ok(ScheduleKind::Linear),
            "constant" => Ok(ScheduleKind::Constant),
            _ => invalid("schedule", text, "cosine, linear or constant"),
        }
    }
}

/// Learning rate of every step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// What follows the warm-up.
    pub kind: ScheduleKind,
    /// The full rate, 0 or more.
    pub learning_rate: f64,
    /// Steps during which the rate rises from 0 to the full rate.
    pub warmup_steps: usize,
    /// Steps of the whole run, warm-up included; at least 1.
    pub total_steps: usize,
}

impl Schedule {
    /// # Errors
    /// [`Error::InvalidConfig`] for a negative or non-finite rate, or a run of no steps.
    pub fn validate(&self) -> Result<()> {
        // Also refuses what overflows or becomes NaN when the rate of a step is handed to the optimiser in f32.
        if !(self.learning_rate >= 0.0 && (self.learning_rate as f32).is_finite()) {
            return invalid("learning_rate", self.learning_rate, "0 or more and finite");
        }
        if self.total_steps == 0 {
            return invalid("total_steps", self.total_steps, "at least 1");
        }
        Ok(())
    }

    /// Learning rate of step `step`, counted from 0: the first step of a warm-up has rate 0.
    pub fn rate(&self, step: usize) -> f32 {
        (self.learning_rate * self.factor(step)) as f32
    }

    fn factor(&self, step: usize) -> f64 {
        let (step, warmup) = (step as f64, self.warmup_steps as f64);
        if step < warmup {
            return step / warmup.max(1.0);
        }
        let total = self.total_steps as f64;
        let decay_steps = (total - warmup).max(1.0);
        match self.kind {
            ScheduleKind::Cosine => (0.5 * (1.0 + (PI * ((step - warmup) / decay_steps)).cos())).max(0.0),
            ScheduleKind::Linear => ((total - step) / decay_steps).max(0.0),
            ScheduleKind::Constant => 1.0,
        }
    }
}
