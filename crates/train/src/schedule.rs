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
    /// A power of a straight line, from the full rate to [`Schedule::end_learning_rate`] at `total_steps`.
    Polynomial,
    /// The full rate, and half a cosine to 0 over the last [`Schedule::decay_steps`].        Hu et al. 2024, arXiv:2404.06395
    Wsd,
}

/// `cosine`, `linear`, `constant`, `polynomial` or `wsd`.
impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ScheduleKind::Cosine => "cosine",
            ScheduleKind::Linear => "linear",
            ScheduleKind::Constant => "constant",
            ScheduleKind::Polynomial => "polynomial",
            ScheduleKind::Wsd => "wsd",
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
            "polynomial" => Ok(ScheduleKind::Polynomial),
            "wsd" => Ok(ScheduleKind::Wsd),
            _ => invalid("schedule", text, "cosine, linear, constant, polynomial or wsd"),
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
    /// Where [`ScheduleKind::Polynomial`] ends, below the full rate; 1e-7.
    pub end_learning_rate: f64,
    /// Power of [`ScheduleKind::Polynomial`], positive; 1.
    pub power: f64,
    /// Steps at the end over which [`ScheduleKind::Wsd`] falls.
    pub decay_steps: usize,
}

/// A cosine over one step from transformers' default ends and powers: for what a caller does not say.
impl Default for Schedule {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::Cosine,
            learning_rate: 0.0,
            warmup_steps: 0,
            total_steps: 1,
            end_learning_rate: 1e-7,
            power: 1.0,
            decay_steps: 0,
        }
    }
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
        if self.kind == ScheduleKind::Polynomial {
            if !(self.end_learning_rate >= 0.0 && self.end_learning_rate < self.learning_rate) {
                return invalid("end_learning_rate", self.end_learning_rate, "0 or more and below the learning rate");
            }
            if !(self.power > 0.0 && self.power.is_finite()) {
                return invalid("power", self.power, "positive and finite");
            }
        }
        Ok(())
    }

    /// Learning rate of step `step`, counted from 0: the first step of a warm-up has rate 0.
    pub fn rate(&self, step: usize) -> f32 {
        self.rate_of(self.learning_rate, step)
    }

    /// The same for parameters with another full rate.
    pub fn rate_of(&self, full: f64, step: usize) -> f32 {
        (full * self.factor(step)) as f32
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
            ScheduleKind::Polynomial => {
                let end = self.end_learning_rate / self.learning_rate;
                let left = (1.0 - (step - warmup) / decay_steps).max(0.0);
                if step > total { end } else { (1.0 - end) * left.powf(self.power) + end }
            }
            ScheduleKind::Wsd => {
                let decay = self.decay_steps as f64;
                let progress = (step - (total - decay)) / decay.max(1.0);
                match progress {
                    _ if step < total - decay => 1.0,
                    _ if step < total => 0.5 * (1.0 + (PI * progress).cos()),
                    _ => 0.0,
                }
            }
        }
    }
}
