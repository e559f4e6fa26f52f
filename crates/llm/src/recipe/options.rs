//! The options of a run as a file has them: flat, each under the name of its flag with underscores.

mod optimizer;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use unsloth_core::{ByteSize, DType};
use unsloth_train::{AdjustLr, OptimizerKind, ScheduleKind};

use super::{
    AdapterSettings, Method, Offload, RunError,
    adapter::{list, pairs, parse_pair},
    config::{EvalSource, RunLength, Start, TrainConfig, Warmup, invalid},
};
use crate::{Error, Result, adapter::SavedModule, fields::decimal};

/// Options of `unsloth train`; what is absent has its default. TOML with these keys is what `--config` reads and what a run
/// writes to `config.toml`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each is the flag of that name; `TrainConfig` documents what it means")]
pub struct TrainOptions {
    pub model: Option<PathBuf>,
    pub data: Option<OneOrMany<PathBuf>>,
    pub output: Option<PathBuf>,
    pub method: Option<Method>,
    pub adapter: Option<PathBuf>,
    /// Name of the device. Who opens it reads this; [`TrainOptions::config`] does not.
    pub device: Option<String>,
    /// Threads of the CPU, likewise.
    pub threads: Option<usize>,
    pub dtype: Option<String>,
    pub stochastic_rounding: Option<bool>,
    pub seed: Option<u64>,
    pub rank: Option<usize>,
    pub alpha: Option<f64>,
    pub dropout: Option<f64>,
    pub rslora: Option<bool>,
    pub dora: Option<bool>,
    pub lora_init: Option<String>,
    pub targets: Option<OneOrMany<String>>,
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// `PATTERN=RANK` each.
    pub rank_pattern: Option<OneOrMany<String>>,
    /// `PATTERN=ALPHA` each.
    pub alpha_pattern: Option<OneOrMany<String>>,
    pub modules_to_save: Option<OneOrMany<String>>,
    pub bias: Option<String>,
    pub train_on: Option<String>,
    pub max_seq_len: Option<usize>,
    pub packing: Option<bool>,
    pub shuffle: Option<bool>,
    pub steps: Option<usize>,
    pub epochs: Option<f64>,
    pub batch_size: Option<usize>,
    pub grad_accum: Option<usize>,
    pub learning_rate: Option<f64>,
    pub schedule: Option<ScheduleKind>,
    pub warmup_steps: Option<usize>,
    pub warmup_ratio: Option<f64>,
    pub end_learning_rate: Option<f64>,
    pub power: Option<f64>,
    pub decay_steps: Option<usize>,
    pub embedding_learning_rate: Option<f64>,
    pub loraplus_lr_ratio: Option<f64>,
    pub optimizer: Option<OptimizerKind>,
    pub weight_decay: Option<f64>,
    pub beta1: Option<f64>,
    pub beta2: Option<f64>,
    pub adam_eps: Option<f64>,
    pub momentum: Option<f64>,
    pub nesterov: Option<bool>,
    pub scale_parameter: Option<bool>,
    pub adjust_lr: Option<AdjustLr>,
    /// `inf`: gradients are never scaled down.
    pub max_grad_norm: Option<f64>,
    pub checkpointing: Option<String>,
    pub mlp_tile: Option<usize>,
    pub offload: Option<Offload>,
    pub offload_optimizer: Option<Offload>,
    pub memory: Option<String>,
    pub trace_nan: Option<bool>,
    pub save_every: Option<usize>,
    pub keep_last: Option<usize>,
    pub keep_best: Option<bool>,
    pub eval_every: Option<usize>,
    pub eval_data: Option<OneOrMany<PathBuf>>,
    pub eval_split: Option<f64>,
    pub resume: Option<bool>,
    pub overwrite: Option<bool>,
    /// Whether the program tells nothing; [`TrainOptions::config`] does not read it.
    pub quiet: Option<bool>,
}

/// A value, or a list of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One value.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The values.
    pub fn as_slice(&self) -> &[T] {
        match self {
            OneOrMany::One(value) => std::slice::from_ref(value),
            OneOrMany::Many(values) => values,
        }
    }
}

impl<T> From<OneOrMany<T>> for Vec<T> {
    fn from(values: OneOrMany<T>) -> Self {
        match values {
            OneOrMany::One(value) => vec![value],
            OneOrMany::Many(values) => values,
        }
    }
}

impl<T> From<Vec<T>> for OneOrMany<T> {
    fn from(values: Vec<T>) -> Self {
        OneOrMany::Many(values)
    }
}

/// Options of which a run has one at most: naming one takes the place of the other.
const ALTERNATIVES: [[&str; 2]; 4] =
    [["steps", "epochs"], ["warmup_steps", "warmup_ratio"], ["eval_data", "eval_split"], ["resume", "overwrite"]];

impl TrainOptions {
    /// Reads a TOML file of these keys.
    ///
    /// # Errors
    /// [`Error::Io`]; [`RunError::Toml`] for what is not TOML, an unknown key or a value of the wrong type;
    /// [`RunError::ExclusiveOptions`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let options: Self = toml::from_str(&text).map_err(|error| {
            let line = error.span().map_or(0, |span| 1 + text[..span.start].matches('\n').count());
            RunError::Toml { path: path.to_owned(), line, reason: error.message().to_owned() }
        })?;
        let table = options.table()?;
        for [one, other] in ALTERNATIVES {
            if table.contains_key(one) && table.contains_key(other) {
                return Err(RunError::ExclusiveOptions { path: path.to_owned(), one, other }.into());
            }
        }
        Ok(options)
    }

    /// These options, and those of `base` where they are absent.
    ///
    /// # Errors
    /// [`RunError::NotToml`].
    pub fn or(&self, base: &Self) -> Result<Self> {
        let (own, mut merged) = (self.table()?, base.table()?);
        for pair in ALTERNATIVES {
            if pair.iter().any(|&key| own.contains_key(key)) {
                pair.iter().for_each(|&key| drop(merged.remove(key)));
            }
        }
        merged.extend(own);
        merged.try_into().map_err(not_toml)
    }

    /// The run that these options describe.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a missing `model`, `data` or `output` and for a name that is not known; whether numbers are
    /// in range is left to [`TrainConfig::validate`].
    pub fn config(self) -> Result<TrainConfig> {
        let (start, optimizer, adapters) = (self.start(), optimizer::config(&self)?, self.adapters()?);
        let path = |field, path: Option<PathBuf>| path.map_or_else(|| invalid(field, "missing", "given"), Ok);
        let model = path("model", self.model)?;
        let data = self.data.map_or_else(|| invalid("data", "missing", "given"), |data| Ok(data.into()))?;
        let defaults = TrainConfig::new(model, data, path("output", self.output)?);
        let length = match (self.steps, self.epochs) {
            (Some(steps), _) => RunLength::Steps(steps),
            (None, epochs) => epochs.map_or(defaults.length, RunLength::Epochs),
        };
        let warmup = match (self.warmup_steps, self.warmup_ratio) {
            (Some(steps), _) => Warmup::Steps(steps),
            (None, ratio) => ratio.map_or(defaults.warmup, Warmup::Ratio),
        };
        let eval = match (self.eval_data, self.eval_split) {
            (Some(files), _) => Some(EvalSource::Files(files.into())),
            (None, share) => share.map(EvalSource::Split),
        };
        Ok(TrainConfig {
            method: self.method.unwrap_or(defaults.method),
            adapter: self.adapter,
            dtype: self.dtype.map_or(Ok(defaults.dtype), |name| float_type(&name))?,
            stochastic_rounding: self.stochastic_rounding.unwrap_or(defaults.stochastic_rounding),
            seed: self.seed.unwrap_or(defaults.seed),
            adapters,
            train_on: self.train_on.map(|text| text.parse()).transpose()?,
            max_seq_len: self.max_seq_len,
            packing: self.packing.unwrap_or(defaults.packing),
            shuffle: self.shuffle.unwrap_or(defaults.shuffle),
            length,
            batch_size: self.batch_size.unwrap_or(defaults.batch_size),
            grad_accum: self.grad_accum.unwrap_or(defaults.grad_accum),
            learning_rate: self.learning_rate.unwrap_or(defaults.learning_rate),
            schedule: self.schedule.unwrap_or(defaults.schedule),
            warmup,
            end_learning_rate: self.end_learning_rate.unwrap_or(defaults.end_learning_rate),
            power: self.power.unwrap_or(defaults.power),
            decay_steps: self.decay_steps,
            embedding_learning_rate: self.embedding_learning_rate,
            loraplus_lr_ratio: self.loraplus_lr_ratio,
            optimizer,
            max_grad_norm: match self.max_grad_norm {
                None => defaults.max_grad_norm,
                Some(norm) => Some(norm as f32).filter(|&norm| norm != f32::INFINITY),
            },
            checkpointing: self.checkpointing.map_or(Ok(defaults.checkpointing), |text| text.parse())?,
            mlp_tile: self.mlp_tile,
            offload: self.offload.unwrap_or(defaults.offload),
            offload_optimizer: self.offload_optimizer.unwrap_or(defaults.offload_optimizer),
            memory_bytes: self.memory.map(|text| text.parse()).transpose()?.map(|ByteSize(bytes)| bytes),
            trace_nan: self.trace_nan.unwrap_or(defaults.trace_nan),
            start,
            save_every: self.save_every,
            keep_last: self.keep_last.unwrap_or(defaults.keep_last),
            keep_best: self.keep_best.unwrap_or(defaults.keep_best),
            eval,
            eval_every: self.eval_every,
            ..defaults
        })
    }

    fn start(&self) -> Start {
        match (self.resume, self.overwrite) {
            (Some(true), _) => Start::Resume,
            (_, Some(true)) => Start::Overwrite,
            _ => Start::New,
        }
    }

    /// What these options say about adapters.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a name or a pattern that is none.
    pub fn adapters(&self) -> Result<AdapterSettings> {
        fn each<T, U>(values: &Option<OneOrMany<T>>, read: impl Fn(&T) -> Result<U>) -> Result<Option<Vec<U>>> {
            values.as_ref().map(|values| values.as_slice().iter().map(read).collect()).transpose()
        }
        Ok(AdapterSettings {
            rank: self.rank,
            alpha: self.alpha.map(|alpha| alpha as f32),
            dropout: self.dropout.map(|dropout| dropout as f32),
            rslora: self.rslora,
            dora: self.dora,
            lora_init: self.lora_init.as_ref().map(|text| text.parse()).transpose()?,
            targets: self.targets.as_ref().map(|names| list(names.as_slice()).parse()).transpose()?,
            layers_to_transform: self.layers_to_transform.as_ref().map(|layers| layers.as_slice().to_vec()),
            rank_pattern: each(&self.rank_pattern, |text| parse_pair("rank_pattern", text))?,
            alpha_pattern: each(&self.alpha_pattern, |text| parse_pair("alpha_pattern", text))?,
            modules_to_save: each(&self.modules_to_save, |text| text.parse())?,
            bias: self.bias.as_ref().map(|text| text.parse()).transpose()?,
        })
    }

    /// The options of a run, each said aloud, with absolute paths: they describe it from any folder.
    pub fn of(config: &TrainConfig, device: &str) -> Self {
        let adapters = &config.adapters;
        let path = |path: &PathBuf| absolute(path);
        let strings = |modules: &[SavedModule]| OneOrMany::Many(modules.iter().map(ToString::to_string).collect());
        let paths = |paths: &[PathBuf]| OneOrMany::Many(paths.iter().map(path).collect());
        let (steps, epochs) = match config.length {
            RunLength::Steps(steps) => (Some(steps), None),
            RunLength::Epochs(epochs) => (None, Some(epochs)),
        };
        let (warmup_steps, warmup_ratio) = match config.warmup {
            Warmup::Steps(steps) => (Some(steps), None),
            Warmup::Ratio(ratio) => (None, Some(ratio)),
        };
        let (eval_data, eval_split) = match &config.eval {
            Some(EvalSource::Files(files)) => (Some(paths(files)), None),
            Some(EvalSource::Split(share)) => (None, Some(*share)),
            None => (None, None),
        };
        let polynomial = |value: f64| (config.schedule == ScheduleKind::Polynomial).then_some(value);
        let options = Self {
            model: Some(path(&config.model)),
            data: Some(paths(&config.data)),
            output: Some(path(&config.output)),
            method: Some(config.method),
            adapter: config.adapter.as_ref().map(path),
            device: Some(device.to_owned()),
            dtype: Some(config.dtype.to_string()),
            stochastic_rounding: config.stochastic_rounding.then_some(true),
            seed: Some(config.seed),
            rank: adapters.rank,
            alpha: adapters.alpha.map(decimal),
            dropout: adapters.dropout.map(decimal),
            rslora: adapters.rslora,
            dora: adapters.dora,
            lora_init: adapters.lora_init.map(|init| init.to_string()),
            targets: adapters.targets.as_ref().map(|targets| OneOrMany::One(targets.to_string())),
            layers_to_transform: adapters.layers_to_transform.clone().map(OneOrMany::Many),
            rank_pattern: adapters.rank_pattern.as_ref().map(|patterns| OneOrMany::Many(pairs(patterns))),
            alpha_pattern: adapters.alpha_pattern.as_ref().map(|patterns| OneOrMany::Many(pairs(patterns))),
            modules_to_save: adapters.modules_to_save.as_ref().map(|modules| strings(modules)),
            bias: adapters.bias.map(|bias| bias.to_string()),
            train_on: config.train_on.map(|train_on| train_on.to_string()),
            max_seq_len: config.max_seq_len,
            packing: Some(config.packing),
            shuffle: Some(config.shuffle),
            steps,
            epochs,
            batch_size: Some(config.batch_size),
            grad_accum: Some(config.grad_accum),
            learning_rate: Some(config.learning_rate),
            schedule: Some(config.schedule),
            warmup_steps,
            warmup_ratio,
            end_learning_rate: polynomial(config.end_learning_rate),
            power: polynomial(config.power),
            decay_steps: config.decay_steps,
            embedding_learning_rate: config.embedding_learning_rate,
            loraplus_lr_ratio: config.loraplus_lr_ratio,
            max_grad_norm: Some(config.max_grad_norm.map_or(f64::INFINITY, decimal)),
            checkpointing: Some(config.checkpointing.to_string()),
            mlp_tile: config.mlp_tile,
            offload: Some(config.offload),
            offload_optimizer: Some(config.offload_optimizer),
            memory: config.memory_bytes.map(|bytes| bytes.to_string()),
            trace_nan: config.trace_nan.then_some(true),
            save_every: config.save_every,
            keep_last: Some(config.keep_last),
            keep_best: config.keep_best.then_some(true),
            eval_every: config.eval_every,
            eval_data,
            eval_split,
            threads: None,
            resume: None,
            overwrite: None,
            quiet: None,
            ..Self::default()
        };
        optimizer::options(options, &config.optimizer)
    }

    /// As TOML.
    ///
    /// # Errors
    /// [`RunError::NotToml`] for a path that is not UTF-8 or a seed of 2^63 or more.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(not_toml)
    }

    /// The first option, by name, in which `other` differs, with the two values; those of `ignored` may differ.
    pub(super) fn difference(&self, other: &Self, ignored: &[&str]) -> Result<Option<Difference>> {
        let (own, other) = (self.table()?, other.table()?);
        let names = own.keys().chain(other.keys()).filter(|name| !ignored.contains(&name.as_str()));
        let shown = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), Value::to_string);
        let differs = |name: &&String| own.get(*name) != other.get(*name);
        Ok(names.into_iter().find(differs).map(|name| Difference {
            option: name.clone(),
            own: shown(own.get(name)),
            other: shown(other.get(name)),
        }))
    }

    fn table(&self) -> Result<Table> {
        Table::try_from(self).map_err(not_toml)
    }
}

/// An option that two runs do not share.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) option: String,
    pub(super) own: String,
    pub(super) other: String,
}

/// TOML holds neither paths that are not UTF-8 nor whole numbers of 64 bits without a sign.
fn not_toml(error: impl std::fmt::Display) -> Error {
    RunError::NotToml { reason: error.to_string() }.into()
}

/// The path from the root; what is not there, such as a name on a hub, stays as it is.
fn absolute(path: &Path) -> PathBuf {
    if path.exists() { std::path::absolute(path).unwrap_or_else(|_| path.to_owned()) } else { path.to_owned() }
}

fn float_type(name: &str) -> Result<DType> {
    let found = DType::FLOATS.into_iter().find(|dtype| dtype.name() == name);
    found.map_or_else(|| invalid("dtype", name, "f32, f16 or bf16"), Ok)
}

#[cfg(test)]
mod tests;
