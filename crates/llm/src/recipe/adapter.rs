//! What a run is told about its adapters.

use std::path::Path;

use unsloth_train::{LoraConfig, LoraInit};

use super::config::invalid;
use crate::{
    Error, Result,
    adapter::{AdapterConfig, BiasTraining, Pattern, SavedModule},
    decoder::{Decoder, Targets},
};

/// Inner dimension of a new adapter where none is asked for.
const DEFAULT_RANK: usize = 16;
/// Scale numerator of a new adapter where none is asked for.
const DEFAULT_ALPHA: f32 = 16.0;

/// Settings of adapters. What is `None` is as in the adapter to go on from, or, for a new one, has the default that stands
/// here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterSettings {
    /// Inner dimension; 16.
    pub rank: Option<usize>,
    /// Scale numerator; 16.
    pub alpha: Option<f32>,
    /// Share of the input that is zero in training, in `[0, 1)`; 0. One to go on from may get another.
    pub dropout: Option<f32>,
    /// Whether the update is multiplied by `alpha / sqrt(rank)` instead of `alpha / rank`; it is not.
    pub rslora: Option<bool>,
    /// Whether the rows of the adapted weights have trained lengths; they have not.
    pub dora: Option<bool>,
    /// What the matrices are before training; as PEFT has it.
    pub lora_init: Option<LoraInit>,
    /// Layers that have adapters; every linear layer.
    pub targets: Option<Targets>,
    /// Decoder layers, from 0, in which targets have adapters; all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Other ranks of layers that a pattern means; none.
    pub rank_pattern: Option<Vec<(Pattern, usize)>>,
    /// Other scale numerators of layers that a pattern means; none.
    pub alpha_pattern: Option<Vec<(Pattern, f32)>>,
    /// What is trained whole besides; nothing.
    pub modules_to_save: Option<Vec<SavedModule>>,
    /// Biases that are trained besides; none.
    pub bias: Option<BiasTraining>,
}

impl AdapterSettings {
    /// Names of all settings, and whether each was given.
    pub(super) fn given(&self) -> [(&'static str, bool); 12] {
        [
            ("rank", self.rank.is_some()),
            ("alpha", self.alpha.is_some()),
            ("dropout", self.dropout.is_some()),
            ("rslora", self.rslora.is_some()),
            ("dora", self.dora.is_some()),
            ("lora_init", self.lora_init.is_some()),
            ("targets", self.targets.is_some()),
            ("layers_to_transform", self.layers_to_transform.is_some()),
            ("rank_pattern", self.rank_pattern.is_some()),
            ("alpha_pattern", self.alpha_pattern.is_some()),
            ("modules_to_save", self.modules_to_save.is_some()),
            ("bias", self.bias.is_some()),
        ]
    }

    /// The adapter to make where none is loaded.
    pub(super) fn new_adapter(&self) -> AdapterConfig {
        let lora = LoraConfig {
            rank: self.rank.unwrap_or(DEFAULT_RANK),
            alpha: self.alpha.unwrap_or(DEFAULT_ALPHA),
            dropout: self.dropout.unwrap_or(0.0),
            rslora: self.rslora.unwrap_or(false),
            dora: self.dora.unwrap_or(false),
            init: self.lora_init.unwrap_or_default(),
        };
        AdapterConfig {
            layers_to_transform: self.layers_to_transform.clone(),
            rank_pattern: self.rank_pattern.clone().unwrap_or_default(),
            alpha_pattern: self.alpha_pattern.clone().unwrap_or_default(),
            modules_to_save: self.modules_to_save.clone().unwrap_or_default(),
            bias: self.bias.unwrap_or_default(),
            ..AdapterConfig::new(lora, self.targets.clone().unwrap_or(Targets::AllLinear))
        }
    }

    /// Holds what was given to the adapter that the model has from `folder`.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a setting that it has otherwise.
    pub(super) fn check_loaded(&self, model: &Decoder, loaded: &AdapterConfig, folder: &Path) -> Result<()> {
        let differs = |field, value: String, has: String| {
            invalid(field, value, &format!("{has}, as the adapter in `{}` has it", folder.display()))
        };
        let LoraConfig { rank, alpha, rslora, dora, init, .. } = loaded.lora;
        if let Some(own) = self.rank.filter(|&own| own != rank) {
            return differs("rank", own.to_string(), rank.to_string());
        }
        if let Some(own) = self.alpha.filter(|&own| own != alpha) {
            return differs("alpha", own.to_string(), alpha.to_string());
        }
        if let Some(own) = self.rslora.filter(|&own| own != rslora) {
            return differs("rslora", own.to_string(), rslora.to_string());
        }
        if let Some(own) = self.dora.filter(|&own| own != dora) {
            return differs("dora", own.to_string(), dora.to_string());
        }
        if let Some(own) = self.lora_init.filter(|&own| own != init) {
            return differs("lora_init", own.to_string(), init.to_string());
        }
        if let Some(own) = self.rank_pattern.as_ref().filter(|&own| *own != loaded.rank_pattern) {
            return differs("rank_pattern", shown(own), shown(&loaded.rank_pattern));
        }
        if let Some(own) = self.alpha_pattern.as_ref().filter(|&own| *own != loaded.alpha_pattern) {
            return differs("alpha_pattern", shown(own), shown(&loaded.alpha_pattern));
        }
        if let Some(own) = self.modules_to_save.as_ref().filter(|&own| *own != loaded.modules_to_save) {
            return differs("modules_to_save", list(own), list(&loaded.modules_to_save));
        }
        if let Some(own) = self.bias.filter(|&own| own != loaded.bias) {
            return differs("bias", own.to_string(), loaded.bias.to_string());
        }
        self.check_layers(model, loaded, folder)
    }

    /// Names may be others, as long as they mean the same layers.
    fn check_layers(&self, model: &Decoder, loaded: &AdapterConfig, folder: &Path) -> Result<()> {
        let (field, value) = match (&self.targets, &self.layers_to_transform) {
            (Some(targets), _) => ("targets", targets.to_string()),
            (None, Some(layers)) => ("layers_to_transform", list(layers)),
            (None, None) => return Ok(()),
        };
        let asked = AdapterConfig {
            targets: self.targets.clone().unwrap_or_else(|| loaded.targets.clone()),
            layers_to_transform: self.layers_to_transform.clone().or_else(|| loaded.layers_to_transform.clone()),
            ..loaded.clone()
        };
        let selected = model.select(&asked)?;
        match model.linears().zip(selected).find(|(linear, on)| linear.adapter.is_some() != *on) {
            Some((linear, _)) => {
                let has =
                    format!("the layers that the adapter in `{}` has; `{}` differs", folder.display(), linear.name);
                invalid(field, value, &has)
            }
            None => Ok(()),
        }
    }
}

/// Things separated by commas, as the options take them.
pub(super) fn list(items: &[impl ToString]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// `PATTERN=VALUE` separated by commas; `none` where there are none.
fn shown<T: ToString>(patterns: &[(Pattern, T)]) -> String {
    if patterns.is_empty() { "none".to_owned() } else { pairs(patterns).join(",") }
}

/// `PATTERN=VALUE` each.
pub(super) fn pairs<T: ToString>(patterns: &[(Pattern, T)]) -> Vec<String> {
    patterns.iter().map(|(pattern, value)| format!("{}={}", pattern.as_str(), value.to_string())).collect()
}

/// Reads `PATTERN=VALUE`.
///
/// # Errors
/// [`Error::InvalidOption`] for another form, a pattern that is none or a value that is no number.
pub(super) fn parse_pair<T: std::str::FromStr>(field: &'static str, text: &str) -> Result<(Pattern, T)> {
    let wrong = || Error::InvalidOption {
        field,
        value: format!("`{text}`"),
        rule: "PATTERN=NUMBER, the pattern being a regular expression".to_owned(),
    };
    let (pattern, value) = text.rsplit_once('=').ok_or_else(wrong)?;
    Ok((pattern.parse().map_err(|_| wrong())?, value.trim().parse().map_err(|_| wrong())?))
}
