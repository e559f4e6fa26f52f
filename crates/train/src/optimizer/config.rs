//! Which optimiser, and its hyper-parameters.

use std::{fmt, str::FromStr};

use super::{AdafactorConfig, AdamWConfig, LionConfig, MuonConfig, Rule, SgdConfig, adamw::EightBit};
use crate::{Error, Result, error::invalid};

/// Name of an optimiser.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// [`OptimizerConfig::AdamW`]
    #[default]
    AdamW,
    /// [`OptimizerConfig::AdamW8bit`]
    AdamW8bit,
    /// [`OptimizerConfig::Sgd`]
    Sgd,
    /// [`OptimizerConfig::Lion`]
    Lion,
    /// [`OptimizerConfig::Adafactor`]
    Adafactor,
    /// [`OptimizerConfig::Muon`]
    Muon,
}

impl OptimizerKind {
    /// The optimiser with the hyper-parameters that it has where none are given.
    pub fn with_defaults(self) -> OptimizerConfig {
        match self {
            OptimizerKind::AdamW => OptimizerConfig::AdamW(AdamWConfig::default()),
            OptimizerKind::AdamW8bit => OptimizerConfig::AdamW8bit(AdamWConfig::default()),
            OptimizerKind::Sgd => OptimizerConfig::Sgd(SgdConfig::default()),
            OptimizerKind::Lion => OptimizerConfig::Lion(LionConfig::default()),
            OptimizerKind::Adafactor => OptimizerConfig::Adafactor(AdafactorConfig::default()),
            OptimizerKind::Muon => OptimizerConfig::Muon(MuonConfig::default()),
        }
    }

    /// Every optimiser.
    pub const ALL: [OptimizerKind; 6] = [
        OptimizerKind::AdamW,
        OptimizerKind::AdamW8bit,
        OptimizerKind::Sgd,
        OptimizerKind::Lion,
        OptimizerKind::Adafactor,
        OptimizerKind::Muon,
    ];
}

/// `adamw`, `adamw8bit`, `sgd`, `lion`, `adafactor` or `muon`.
impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OptimizerKind::AdamW => "adamw",
            OptimizerKind::AdamW8bit => "adamw8bit",
            OptimizerKind::Sgd => "sgd",
            OptimizerKind::Lion => "lion",
            OptimizerKind::Adafactor => "adafactor",
            OptimizerKind::Muon => "muon",
        })
    }
}

impl FromStr for OptimizerKind {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidConfig`] for another name.
    fn from_str(text: &str) -> Result<Self> {
        let kind = OptimizerKind::ALL.into_iter().find(|kind| kind.to_string() == text);
        kind.map_or_else(|| invalid("optimizer", text, "adamw, adamw8bit, sgd, lion, adafactor or muon"), Ok)
    }
}

/// How parameters change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay; two moments in f32.
    AdamW(AdamWConfig),
    /// The same with moments in 8 bits for parameters of at least [`super::MIN_8BIT_SIZE`] elements.
    AdamW8bit(AdamWConfig),
    /// Gradient descent with momentum.
    Sgd(SgdConfig),
    /// Steps of one size in the direction of a sign; one momentum in f32.
    Lion(LionConfig),
    /// Averages of squared gradients by rows and columns, in f32. CPU only.
    Adafactor(AdafactorConfig),
    /// Momentum of matrices made orthogonal, in f32; AdamW for everything else.
    Muon(MuonConfig),
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self::AdamW(AdamWConfig::default())
    }
}

impl From<AdamWConfig> for OptimizerConfig {
    fn from(config: AdamWConfig) -> Self {
        Self::AdamW(config)
    }
}

impl OptimizerConfig {
    /// Its name.
    pub fn kind(&self) -> OptimizerKind {
        match self {
            Self::AdamW(_) => OptimizerKind::AdamW,
            Self::AdamW8bit(_) => OptimizerKind::AdamW8bit,
            Self::Sgd(_) => OptimizerKind::Sgd,
            Self::Lion(_) => OptimizerKind::Lion,
            Self::Adafactor(_) => OptimizerKind::Adafactor,
            Self::Muon(_) => OptimizerKind::Muon,
        }
    }

    /// # Errors
    /// [`Error::InvalidConfig`] for a field out of its range.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::AdamW(config) | Self::AdamW8bit(config) => config.validate(),
            Self::Sgd(config) => config.validate(),
            Self::Lion(config) => config.validate(),
            Self::Adafactor(config) => config.validate(),
            Self::Muon(config) => config.validate(),
        }
    }

    pub(super) fn rule(&self) -> Box<dyn Rule + '_> {
        match self {
            Self::AdamW(config) => Box::new(*config),
            Self::AdamW8bit(config) => Box::new(EightBit(config)),
            Self::Sgd(config) => Box::new(*config),
            Self::Lion(config) => Box::new(*config),
            Self::Adafactor(config) => Box::new(*config),
            Self::Muon(config) => Box::new(*config),
        }
    }
}

pub(super) fn check_betas(beta1: f32, beta2: f32) -> Result<()> {
    for (field, value) in [("beta1", beta1), ("beta2", beta2)] {
        if !(0.0..1.0).contains(&value) {
            return invalid(field, value, "in [0, 1)");
        }
    }
    Ok(())
}

pub(super) fn check_decay(weight_decay: f32) -> Result<()> {
    if weight_decay >= 0.0 && weight_decay.is_finite() {
        return Ok(());
    }
    invalid("weight_decay", weight_decay, "0 or more and finite")
}
