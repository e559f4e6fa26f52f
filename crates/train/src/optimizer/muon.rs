//! Muon for matrices, AdamW for everything else.

use std::{fmt, str::FromStr};

use unsloth_core::{
    DType, Device, Tensor,
    ops::{
        adamw::StepState,
        muon::{Buffers, Spec, step},
    },
};

use super::{AdamWConfig, Change, Form, Part, Role, Rule, Slot};
use crate::{Error, Result, error::invalid};

/// Least norm that a matrix is divided by, that of PyTorch.
const EPS: f32 = 1e-7;

/// What the rate of a matrix is multiplied by because of its shape, as PyTorch names it. The direction of a step has singular values near
/// 1, whatever the gradient's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdjustLr {
    /// `sqrt(max(1, rows / columns))`
    #[default]
    Original,
    /// `0.2 * sqrt(max(rows, columns))`, which makes steps as large as AdamW's, so that its rates can be used.
    MatchRmsAdamw,
    /// `sqrt(rows / columns)`
    SpectralUnclamped,
}

impl AdjustLr {
    const ALL: [AdjustLr; 3] = [AdjustLr::Original, AdjustLr::MatchRmsAdamw, AdjustLr::SpectralUnclamped];

    fn factor(self, [rows, columns]: [usize; 2]) -> f32 {
        let [rows, columns] = [rows, columns].map(|size| size.max(1) as f64);
        let factor = match self {
            AdjustLr::Original => (rows / columns).max(1.0).sqrt(),
            AdjustLr::MatchRmsAdamw => 0.2 * rows.max(columns).sqrt(),
            AdjustLr::SpectralUnclamped => (rows / columns).sqrt(),
        };
        factor as f32
    }
}

/// `original`, `match_rms_adamw` or `spectral_unclamped`.
impl fmt::Display for AdjustLr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AdjustLr::Original => "original",
            AdjustLr::MatchRmsAdamw => "match_rms_adamw",
            AdjustLr::SpectralUnclamped => "spectral_unclamped",
        })
    }
}

impl FromStr for AdjustLr {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidConfig`] for another name.
    fn from_str(text: &str) -> Result<Self> {
        let found = AdjustLr::ALL.into_iter().find(|rule| rule.to_string() == text);
        found.map_or_else(|| invalid("adjust_lr", text, "original, match_rms_adamw or spectral_unclamped"), Ok)
    }
}

/// Hyper-parameters of Muon, defaults but for the decay those of `torch.optim.Muon`. Embedding table, head and whatever is no matrix take
/// the steps of AdamW at the same rate.                                Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonConfig {
    /// Share of the average of past gradients that is kept, in `[0, 1)`; 0.95.
    pub momentum: f32,
    /// Whether a step looks ahead by one momentum; it does.
    pub nesterov: bool,
    /// How a matrix's rate depends on its shape.
    pub adjust_lr: AdjustLr,
    /// Of everything else, and the decay of matrices too.
    pub adamw: AdamWConfig,
}

impl Default for MuonConfig {
    fn default() -> Self {
        let (adjust_lr, adamw) = (AdjustLr::default(), AdamWConfig::default());
        Self { momentum: 0.95, nesterov: true, adjust_lr, adamw }
    }
}

impl MuonConfig {
    /// # Errors
    /// [`crate::Error::InvalidConfig`] for a field out of its range.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.momentum) {
            return invalid("momentum", self.momentum, "in [0, 1)");
        }
        self.adamw.validate()
    }
}

impl Rule for MuonConfig {
    fn parts(&self, value: &Tensor, role: Role) -> Vec<Form> {
        match (role, &**value.shape()) {
            (Role::Embedding, _) | (_, [] | [_] | [_, _, _, ..]) => self.adamw.parts(value, role),
            (_, [_, _]) => vec![("momentum", *value.shape(), DType::F32)],
        }
    }

    fn step(&self, slot: &mut Slot, grad: &Tensor, (rate, state): (f32, &StepState)) -> unsloth_core::Result<()> {
        let weight_decay = slot.weight_decay(self.adamw.weight_decay);
        let ([Part { tensor: buf, .. }], &[rows, columns]) = (slot.parts.as_mut_slice(), &**grad.shape()) else {
            return self.adamw.step(slot, grad, (rate, state));
        };
        let &Self { momentum, nesterov, adjust_lr, .. } = self;
        let adjustment = adjust_lr.factor([rows, columns]);
        let spec = Spec { learning_rate: rate, adjustment, momentum, nesterov, eps: EPS, weight_decay };
        slot.parameter.update(|param| step(&spec, Buffers { param, grad, buf }, state))
    }

    /// Together, what takes a step of AdamW.
    fn step_all(&self, changes: Vec<Change<'_>>, state: &StepState) -> unsloth_core::Result<()> {
        let (matrices, others): (Vec<_>, Vec<_>) = changes.into_iter().partition(|change| change.slot.parts.len() == 1);
        self.adamw.step_all(others, state)?;
        matrices.into_iter().try_for_each(|Change { slot, grad, rate }| self.step(slot, grad, (rate, state)))
    }

    fn check_device(&self, _device: &Device) -> unsloth_core::Result<()> {
        Ok(())
    }
}
