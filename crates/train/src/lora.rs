//! Low-rank adapters: configuration, and what a layer has of one.

use std::{fmt, str::FromStr};

use unsloth_autograd::{
    Parameter,
    ops::{LoraAdapter, LoraDropout},
};
use unsloth_core::{ops::lora_linear::Dropout, rng::Philox};

use crate::{DrawRows, Error, Result, error::invalid};

/// What the two matrices of an adapter are before training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoraInit {
    /// `A` uniform in `(-1 / sqrt(in_features), 1 / sqrt(in_features))` (`kaiming_uniform_(a=sqrt(5))`, as PEFT), `B` zero.
    #[default]
    Kaiming,
    /// `A` normal with the deviation `1 / rank`, `B` zero.
    Gaussian,
    /// The largest singular values of the weight, which is left without them.   Meng, Wang & Zhang 2024, arXiv:2404.02948
    Pissa {
        /// Power iterations that look for them. `None`: as many as it takes.
        num_iterations: Option<usize>,
    },
}

/// `kaiming`, or `gaussian`, `pissa` and `pissa_niter_N` as PEFT spells them.
impl fmt::Display for LoraInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoraInit::Kaiming => f.write_str("kaiming"),
            LoraInit::Gaussian => f.write_str("gaussian"),
            LoraInit::Pissa { num_iterations: None } => f.write_str("pissa"),
            LoraInit::Pissa { num_iterations: Some(count) } => write!(f, "pissa_niter_{count}"),
        }
    }
}

impl FromStr for LoraInit {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidConfig`] for another name.
    fn from_str(text: &str) -> Result<Self> {
        let iterations = |count: &str| count.parse().ok().map(|count| LoraInit::Pissa { num_iterations: Some(count) });
        match text {
            "kaiming" => Ok(LoraInit::Kaiming),
            "gaussian" => Ok(LoraInit::Gaussian),
            "pissa" => Ok(LoraInit::Pissa { num_iterations: None }),
            _ => match text.strip_prefix("pissa_niter_").and_then(iterations) {
                Some(init) => Ok(init),
                None => invalid("lora_init", text, "kaiming, gaussian, pissa or pissa_niter_N"),
            },
        }
    }
}

/// Low-rank adapters: `y = x W^T + scale * (drop(x) A^T) B^T`.   Hu et al. 2021, arXiv:2106.09685
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraConfig {
    /// Inner dimension, 1 to the smaller dimension of each adapted layer.
    pub rank: usize,
    /// Scale numerator, finite.
    pub alpha: f32,
    /// Share of the update's input that is zero in training, in `[0, 1)`; what is left is scaled up by `1 / (1 - dropout)`.
    pub dropout: f32,
    /// Whether the update is multiplied by `alpha / sqrt(rank)` instead of `alpha / rank`, so that its size does not depend on
    /// the rank.    Kalajdzievski 2023, arXiv:2312.03732
    pub rslora: bool,
    /// Whether the rows of the adapted weight have trained lengths.    Liu et al. 2024, arXiv:2402.09353
    pub dora: bool,
    /// What it is before training.
    pub init: LoraInit,
}

impl LoraConfig {
    /// An adapter without dropout whose update is multiplied by `alpha / rank`.
    pub const fn new(rank: usize, alpha: f32) -> Self {
        Self { rank, alpha, dropout: 0.0, rslora: false, dora: false, init: LoraInit::Kaiming }
    }

    /// Checks what can be checked without a layer; [`crate::Linear::add_adapter`] checks the rank against its layer.
    ///
    /// # Errors
    /// [`crate::Error::InvalidConfig`] for rank 0, an alpha that is not finite, or a dropout outside `[0, 1)`.
    pub fn validate(&self) -> Result<()> {
        if self.rank == 0 {
            return invalid("rank", self.rank, "at least 1");
        }
        if !self.alpha.is_finite() {
            return invalid("alpha", self.alpha, "finite");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return invalid("dropout", self.dropout, "in [0, 1)");
        }
        if matches!(self.init, LoraInit::Pissa { .. }) && self.alpha <= 0.0 {
            return invalid("alpha", self.alpha, "above 0 with pissa, which divides by it");
        }
        Ok(())
    }

    /// Factor of the update.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (f64::from(self.alpha) / if self.rslora { rank.sqrt() } else { rank }) as f32
    }
}

/// Streams of other purposes have other ids: "drop" in ASCII, counted up by layer.
const DROPOUT_STREAM: u32 = 0x6472_6f70;

/// A low-rank adapter of one layer.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// f32 `[rank, in_features]`
    pub lora_a: Parameter,
    /// f32 `[out_features, rank]`
    pub lora_b: Parameter,
    /// f32 `[out_features]`: lengths of the rows of the adapted weight, with [`LoraConfig::dora`].
    pub magnitude: Option<Parameter>,
    /// What it was made by.
    pub config: LoraConfig,
    /// Number of its layer in the model, of its own: which random numbers it draws.
    pub index: u32,
}

impl Adapter {
    /// What is trained of it.
    pub fn parameters(&self) -> Vec<Parameter> {
        [Some(&self.lora_a), Some(&self.lora_b), self.magnitude.as_ref()].into_iter().flatten().cloned().collect()
    }

    /// As the operator takes it. Nothing is dropped without `rows`.
    pub(crate) fn with(&self, rows: Option<&DrawRows>) -> LoraAdapter {
        let probability = self.config.dropout;
        let dropout = rows.filter(|_| probability > 0.0).map(|rows| {
            let stream = Philox::new(rows.seed, DROPOUT_STREAM.wrapping_add(self.index));
            let dropout = Dropout { probability, stream, step: rows.step };
            LoraDropout { dropout, sequences: rows.sequences.clone(), positions: rows.positions.clone() }
        });
        let (lora_a, lora_b) = (self.lora_a.clone(), self.lora_b.clone());
        LoraAdapter { lora_a, lora_b, scale: self.config.scale(), dropout }
    }
}
