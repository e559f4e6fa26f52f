//! Dynamic scaling of the loss, so that gradients in f16 neither vanish nor overflow. Micikevicius et al. 2017, arXiv:1710.03740
//!
//! The states, the errors and the saved form are those of `torch.amp.GradScaler`. In a step, for each optimiser:
//! [`LossScaler::scale_loss`] before the backward passes, [`LossScaler::unscale`] behind the last of them, then
//! [`LossScaler::step`]; once for all optimisers [`LossScaler::update`]. Gradients are not divided in place: an optimiser's step
//! divides them on the way, and whether it changes anything is decided on the device, where the one check of a step leaves its
//! result. [`LossScaler::update`] reads that result, so it waits for the device.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use unsloth_core::{
    DType, Tensor,
    ops::{cross_entropy::LossSpec, reduce},
};

use crate::{Result, error::invalid};

/// How the scale changes; the defaults are those of PyTorch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScaleConfig {
    /// Scale of the first step, positive; 2^16.
    pub initial_scale: f32,
    /// The scale is multiplied by this behind `growth_interval` good steps in a row; above 1; 2.
    pub growth_factor: f64,
    /// The scale is multiplied by this behind a step with a gradient that is not finite; above 0 and below 1; 0.5.
    pub backoff_factor: f64,
    /// Good steps in a row before the scale grows; at least 1; 2000.
    pub growth_interval: u32,
    /// Without, every call does nothing: the scale is 1.
    pub enabled: bool,
}

impl Default for LossScaleConfig {
    fn default() -> Self {
        Self { initial_scale: 65_536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000, enabled: true }
    }
}

impl LossScaleConfig {
    /// # Errors
    /// [`crate::Error::InvalidConfig`] for a field out of its range.
    pub fn validate(&self) -> Result<()> {
        if !(self.initial_scale > 0.0 && self.initial_scale.is_finite()) {
            return invalid("initial_scale", self.initial_scale, "positive and finite");
        }
        if !(self.growth_factor > 1.0 && self.growth_factor.is_finite()) {
            return invalid("growth_factor", self.growth_factor, "above 1 and finite");
        }
        if !(self.backoff_factor > 0.0 && self.backoff_factor < 1.0) {
            return invalid("backoff_factor", self.backoff_factor, "above 0 and below 1");
        }
        if self.growth_interval == 0 {
            return invalid("growth_interval", self.growth_interval, "at least 1");
        }
        Ok(())
    }
}

/// A call that does not fit what has been called before.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LossScaleError {
    /// Nothing has been scaled yet.
    #[error("{call} without a scale: scale the loss first")]
    NotScaled {
        /// What was called.
        call: &'static str,
    },
    /// A second `unscale` of one optimiser in one step.
    #[error("optimiser {optimizer}: unscale has been called since the last update")]
    AlreadyUnscaled {
        /// Number of the optimiser.
        optimizer: usize,
    },
    /// An `unscale` behind the step of the optimiser.
    #[error("optimiser {optimizer}: unscale is called behind its step")]
    UnscaledAfterStep {
        /// Number of the optimiser.
        optimizer: usize,
    },
    /// A second `step` of one optimiser before an `update`.
    #[error("optimiser {optimizer}: step has been called since the last update")]
    AlreadyStepped {
        /// Number of the optimiser.
        optimizer: usize,
    },
    /// A step of an optimiser that has no gradients.
    #[error("optimiser {optimizer}: has no gradients to check")]
    NothingToCheck {
        /// Number of the optimiser.
        optimizer: usize,
    },
    /// An `update` where no optimiser has checked its gradients.
    #[error("update without any check of gradients since the last one")]
    NothingChecked,
    /// Gradients of parameters are to be f32: in f16 they could overflow before they are divided.
    #[error("optimiser {optimizer}: gradients in f16 cannot be unscaled")]
    HalfGradients {
        /// Number of the optimiser.
        optimizer: usize,
    },
    /// The saved state is that of a scaler that was not enabled.
    #[error("the saved state is empty: it is of a loss scaler that was not enabled")]
    EmptyState,
}

/// What of a scaler is saved: the keys are those of `GradScaler.state_dict()`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScaleState {
    /// The scale.
    pub scale: f32,
    /// See [`LossScaleConfig::growth_factor`].
    pub growth_factor: f64,
    /// See [`LossScaleConfig::backoff_factor`].
    pub backoff_factor: f64,
    /// See [`LossScaleConfig::growth_interval`].
    pub growth_interval: u32,
    /// Good steps since the scale has changed last.
    #[serde(rename = "_growth_tracker")]
    pub growth_tracker: u32,
}

/// How an optimiser is to take its gradients.
#[derive(Clone, Debug)]
pub struct Unscaled {
    /// What the gradients were multiplied by.
    pub loss_scale: f32,
    /// f32 `[1]` on the device: 1 if all of them are finite, else 0. `None` from a scaler that is not enabled, which leaves
    /// the check to the optimiser.
    pub finite: Option<Tensor>,
}

/// Where an optimiser is in its step.
#[derive(Clone, Debug)]
enum Stage {
    Unscaled(Tensor),
    Stepped(Tensor),
}

/// The scale of a run, and what has been called since the last update.
#[derive(Clone, Debug)]
pub struct LossScaler {
    enabled: bool,
    /// `scale` and `growth_tracker` are those of the first step until the loss has been scaled.
    state: LossScaleState,
    has_scaled: bool,
    /// By the number of the optimiser; one that is not here is ready for its step.
    stages: BTreeMap<usize, Stage>,
}

impl LossScaler {
    /// A scaler before its first step.
    ///
    /// # Errors
    /// As [`LossScaleConfig::validate`].
    pub fn new(config: LossScaleConfig) -> Result<Self> {
        config.validate()?;
        let LossScaleConfig { initial_scale: scale, growth_factor, backoff_factor, growth_interval, enabled } = config;
        let state = LossScaleState { scale, growth_factor, backoff_factor, growth_interval, growth_tracker: 0 };
        Ok(Self { enabled, state, has_scaled: false, stages: BTreeMap::new() })
    }

    /// Whether it does anything.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// What the next step's loss is multiplied by; 1 if not enabled.
    pub fn scale(&self) -> f32 {
        if self.enabled { self.state.scale } else { 1.0 }
    }

    /// The loss whose gradients are multiplied by the scale.
    pub fn scale_loss(&mut self, loss: LossSpec) -> LossSpec {
        if !self.enabled {
            return loss;
        }
        self.has_scaled = true;
        LossSpec { loss_scale: loss.loss_scale * self.state.scale, ..loss }
    }

    /// Checks on the device whether the gradients of an optimiser are finite, once all of them are complete. `optimizer` is a
    /// number by which the caller tells its optimisers apart. Gradients keep their values: [`LossScaler::step`] says what to
    /// divide them by.
    ///
    /// # Errors
    /// [`LossScaleError::NotScaled`], [`LossScaleError::AlreadyUnscaled`], [`LossScaleError::UnscaledAfterStep`],
    /// [`LossScaleError::NothingToCheck`], [`LossScaleError::HalfGradients`]; device mismatch.
    pub fn unscale(&mut self, optimizer: usize, gradients: &[&Tensor]) -> Result<()> {
        if !self.enabled {
            return Ok(());
        }
        self.require_scaled("unscale")?;
        match self.stages.get(&optimizer) {
            Some(Stage::Unscaled(_)) => return Err(LossScaleError::AlreadyUnscaled { optimizer }.into()),
            Some(Stage::Stepped(_)) => return Err(LossScaleError::UnscaledAfterStep { optimizer }.into()),
            None => {}
        }
        if gradients.is_empty() {
            return Err(LossScaleError::NothingToCheck { optimizer }.into());
        }
        if gradients.iter().any(|gradient| gradient.dtype() == DType::F16) {
            return Err(LossScaleError::HalfGradients { optimizer }.into());
        }
        self.stages.insert(optimizer, Stage::Unscaled(reduce::all_finite(gradients)?));
        Ok(())
    }

    /// Lets an optimiser take its step, which changes nothing where a gradient is not finite: `step` gets what it needs to
    /// divide and to decide. Unscales first unless that has been done.
    ///
    /// # Errors
    /// [`LossScaleError::AlreadyStepped`]; as [`LossScaler::unscale`]; those of `step`.
    pub fn step<T>(
        &mut self,
        optimizer: usize,
        gradients: &[&Tensor],
        step: impl FnOnce(Unscaled) -> unsloth_core::Result<T>,
    ) -> Result<T> {
        if !self.enabled {
            return Ok(step(Unscaled { loss_scale: 1.0, finite: None })?);
        }
        self.require_scaled("step")?;
        if let Some(Stage::Stepped(_)) = self.stages.get(&optimizer) {
            return Err(LossScaleError::AlreadyStepped { optimizer }.into());
        }
        if !self.stages.contains_key(&optimizer) {
            self.unscale(optimizer, gradients)?;
        }
        let Some(Stage::Unscaled(finite)) = self.stages.remove(&optimizer) else {
            unreachable!("an optimiser is unscaled before it takes its step");
        };
        let result = step(Unscaled { loss_scale: self.state.scale, finite: Some(finite.clone()) });
        self.stages.insert(optimizer, Stage::Stepped(finite));
        Ok(result?)
    }

    /// Ends the step of all optimisers: shrinks the scale if a gradient of any was not finite, else grows it if enough steps
    /// in a row were good and the larger scale is finite. Waits for the device.
    ///
    /// # Errors
    /// [`LossScaleError::NotScaled`], [`LossScaleError::NothingChecked`]; [`unsloth_core::Error::Launch`].
    pub fn update(&mut self) -> Result<()> {
        if !self.enabled {
            return Ok(());
        }
        self.require_scaled("update")?;
        if self.stages.is_empty() {
            return Err(LossScaleError::NothingChecked.into());
        }
        let mut all_finite = true;
        for Stage::Unscaled(finite) | Stage::Stepped(finite) in self.stages.values() {
            all_finite &= finite.to_vec::<f32>()? == [1.0];
        }
        self.stages.clear();
        self.state.advance(all_finite);
        Ok(())
    }

    /// Ends the step of all optimisers with a scale of the caller's choice.
    ///
    /// # Errors
    /// [`LossScaleError::NotScaled`].
    pub fn update_to(&mut self, scale: f32) -> Result<()> {
        if !self.enabled {
            return Ok(());
        }
        self.require_scaled("update")?;
        self.stages.clear();
        self.state.scale = scale;
        Ok(())
    }

    /// What is to be saved; `None` if not enabled.
    pub fn state(&self) -> Option<LossScaleState> {
        self.enabled.then_some(self.state)
    }

    /// Goes on from a saved state; does nothing if not enabled.
    ///
    /// # Errors
    /// [`LossScaleError::EmptyState`].
    pub fn load(&mut self, state: Option<LossScaleState>) -> Result<()> {
        if self.enabled {
            self.state = state.ok_or(LossScaleError::EmptyState)?;
        }
        Ok(())
    }

    fn require_scaled(&self, call: &'static str) -> Result<(), LossScaleError> {
        if self.has_scaled { Ok(()) } else { Err(LossScaleError::NotScaled { call }) }
    }
}

impl LossScaleState {
    /// As PyTorch: factors are f64, the scale is rounded to f32.
    fn advance(&mut self, all_finite: bool) {
        if !all_finite {
            self.scale = (f64::from(self.scale) * self.backoff_factor) as f32;
            self.growth_tracker = 0;
            return;
        }
        self.growth_tracker += 1;
        if self.growth_tracker == self.growth_interval {
            let grown = (f64::from(self.scale) * self.growth_factor) as f32;
            if grown.is_finite() {
                self.scale = grown;
            }
            self.growth_tracker = 0;
        }
    }
}
