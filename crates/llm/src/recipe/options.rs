//! The options of a run as a file has them: flat, each under the name of its flag with underscores.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use unsloth_core::{ByteSize, DType};
use unsloth_train::{AdamWConfig, ScheduleKind};

use super::{
    Method, Offload, RunError,
    config::{EvalSource, RunLength, Start, TrainConfig, Warmup, invalid},
};
use crate::{Error, Result, fields::decimal};

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
    pub seed: Option<u64>,
    pub rank: Option<usize>,
    pub alpha: Option<f64>,
    pub dropout: Option<f64>,
    pub rslora: Option<bool>,
    pub targets: Option<OneOrMany<String>>,
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
    pub weight_decay: Option<f64>,
    pub beta1: Option<f64>,
    pub beta2: Option<f64>,
    pub adam_eps: Option<f64>,
    /// `inf`: gradients are never scaled down.
    pub max_grad_norm: Option<f64>,
    pub checkpointing: Option<String>,
    pub offload: Option<Offload>,
    pub memory: Option<String>,
    pub save_every: Option<usize>,
    pub keep_last: Option<usize>,
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
        let (start, adamw) = (self.start(), self.adamw());
        let path = |field, path: Option<PathBuf>| path.map_or_else(|| invalid(field, "missing", "given"), Ok);
        let model = path("model", self.model)?;
        let data = self.data.map_or_else(|| invalid("data", "missing", "given"), |data| Ok(data.into()))?;
        let defaults = TrainConfig::new(model, data, path("output", self.output)?);
        let targets = |names: OneOrMany<String>| Vec::from(names).join(",").parse();
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
            seed: self.seed.unwrap_or(defaults.seed),
            rank: self.rank,
            alpha: self.alpha.map(|alpha| alpha as f32),
            dropout: self.dropout.map(|dropout| dropout as f32),
            rslora: self.rslora,
            targets: self.targets.map(targets).transpose()?,
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
            adamw,
            max_grad_norm: match self.max_grad_norm {
                None => defaults.max_grad_norm,
                Some(norm) => Some(norm as f32).filter(|&norm| norm != f32::INFINITY),
            },
            checkpointing: self.checkpointing.map_or(Ok(defaults.checkpointing), |text| text.parse())?,
            offload: self.offload.unwrap_or(defaults.offload),
            memory_bytes: self.memory.map(|text| text.parse()).transpose()?.map(|ByteSize(bytes)| bytes),
            start,
            save_every: self.save_every,
            keep_last: self.keep_last.unwrap_or(defaults.keep_last),
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

    fn adamw(&self) -> AdamWConfig {
        let defaults = AdamWConfig::default();
        let narrow = |value: Option<f64>, default: f32| value.map_or(default, |value| value as f32);
        AdamWConfig {
            beta1: narrow(self.beta1, defaults.beta1),
            beta2: narrow(self.beta2, defaults.beta2),
            eps: narrow(self.adam_eps, defaults.eps),
            weight_decay: narrow(self.weight_decay, defaults.weight_decay),
        }
    }

    /// The options of a run, each said aloud, with absolute paths: they describe it from any folder.
    pub fn of(config: &TrainConfig, device: &str) -> Self {
        let path = |path: &PathBuf| absolute(path);
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
        Self {
            model: Some(path(&config.model)),
            data: Some(paths(&config.data)),
            output: Some(path(&config.output)),
            method: Some(config.method),
            adapter: config.adapter.as_ref().map(path),
            device: Some(device.to_owned()),
            dtype: Some(config.dtype.to_string()),
            seed: Some(config.seed),
            rank: config.rank,
            alpha: config.alpha.map(decimal),
            dropout: config.dropout.map(decimal),
            rslora: config.rslora,
            targets: config.targets.as_ref().map(|targets| OneOrMany::One(targets.to_string())),
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
            weight_decay: Some(decimal(config.adamw.weight_decay)),
            beta1: Some(decimal(config.adamw.beta1)),
            beta2: Some(decimal(config.adamw.beta2)),
            adam_eps: Some(decimal(config.adamw.eps)),
            max_grad_norm: Some(config.max_grad_norm.map_or(f64::INFINITY, decimal)),
            checkpointing: Some(config.checkpointing.to_string()),
            offload: Some(config.offload),
            memory: config.memory_bytes.map(|bytes| bytes.to_string()),
            save_every: config.save_every,
            keep_last: Some(config.keep_last),
            eval_every: config.eval_every,
            eval_data,
            eval_split,
            threads: None,
            resume: None,
            overwrite: None,
            quiet: None,
        }
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
mod tests {
    use super::*;

    fn every_option() -> TrainConfig {
        TrainConfig {
            method: Method::Full,
            adapter: Some("/adapter".into()),
            dtype: DType::BF16,
            seed: u64::MAX >> 1,
            rank: Some(3),
            alpha: Some(0.1),
            dropout: Some(0.3),
            rslora: Some(true),
            targets: Some("q_proj,v_proj".parse().unwrap()),
            train_on: Some("all".parse().unwrap()),
            max_seq_len: Some(77),
            packing: false,
            shuffle: false,
            length: RunLength::Steps(9),
            batch_size: 2,
            grad_accum: 3,
            learning_rate: 0.3,
            schedule: ScheduleKind::Linear,
            warmup: Warmup::Steps(4),
            adamw: AdamWConfig { beta1: 0.1, beta2: 0.2, eps: 1e-30, weight_decay: 0.7 },
            max_grad_norm: None,
            checkpointing: "every:3".parse().unwrap(),
            offload: Offload::Disk,
            memory_bytes: Some(12 << 30),
            start: Start::New,
            save_every: Some(5),
            keep_last: 6,
            eval: Some(EvalSource::Files(vec!["/e1".into(), "/e2".into()])),
            eval_every: Some(7),
            ..TrainConfig::new("/m".into(), vec!["/d1".into(), "/d2".into()], "/o".into())
        }
    }

    #[test]
    fn a_configuration_survives_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        let defaults = TrainConfig::new("/m".into(), vec!["/d".into()], "/o".into());
        let split = TrainConfig { eval: Some(EvalSource::Split(0.25)), ..defaults.clone() };
        for config in [every_option(), defaults, split] {
            std::fs::write(&path, TrainOptions::of(&config, "cpu").to_toml().unwrap()).unwrap();
            let read = TrainOptions::read(&path).unwrap();
            assert_eq!(read, TrainOptions::of(&config, "cpu"));
            assert_eq!(read.config().unwrap(), config);
        }
    }

    #[test]
    fn numbers_are_written_as_they_were_typed() {
        let text = TrainOptions::of(&every_option(), "cpu").to_toml().unwrap();
        for line in [
            "alpha = 0.1\n",
            "dropout = 0.3\n",
            "rslora = true\n",
            "beta2 = 0.2\n",
            "max_grad_norm = inf\n",
            "device = \"cpu\"\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn own_options_win_and_replace_their_alternative() {
        let base = TrainOptions {
            steps: Some(3),
            warmup_ratio: Some(0.5),
            seed: Some(1),
            rank: Some(2),
            ..TrainOptions::default()
        };
        let own = TrainOptions { epochs: Some(2.0), warmup_ratio: Some(0.1), rank: Some(5), ..TrainOptions::default() };
        let merged = own.or(&base).unwrap();
        let expected = TrainOptions { seed: Some(1), ..own.clone() };
        assert_eq!(merged, expected);
        assert_eq!(TrainOptions::default().or(&base).unwrap(), base);
    }

    #[test]
    fn what_is_not_an_option_is_refused_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        for (text, parts) in [
            ("model = \"m\"\nlearning_rat = 1\n", ["line 2", "unknown field `learning_rat`"]),
            ("\n\nsteps = \"many\"\n", ["line 3", "invalid type: string \"many\""]),
            ("steps = -3\n", ["line 1", "invalid value"]),
            ("seed = \n", ["line 1", ""]),
            ("schedule = \"saw\"\n", ["line 1", "unknown variant `saw`"]),
            ("steps = 1\nepochs = 2\n", ["`steps`", "`epochs`"]),
            ("resume = true\noverwrite = true\n", ["`resume`", "`overwrite`"]),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = TrainOptions::read(&path).unwrap_err().to_string();
            for part in parts.into_iter().chain(["run.toml`"]) {
                assert!(message.contains(part), "{text}: {message}");
            }
        }
    }

    #[test]
    fn names_and_missing_paths_are_checked() {
        let whole = TrainOptions::of(&every_option(), "cpu");
        type Spoil = fn(&mut TrainOptions);
        let cases: [(&str, Spoil); 8] = [
            ("model = missing", |o| o.model = None),
            ("data = missing", |o| o.data = None),
            ("output = missing", |o| o.output = None),
            ("dtype = i8", |o| o.dtype = Some("i8".into())),
            ("targets = `a,`", |o| o.targets = Some(OneOrMany::Many(vec!["a".into(), String::new()]))),
            ("train_on = x", |o| o.train_on = Some("x".into())),
            ("checkpointing = x", |o| o.checkpointing = Some("x".into())),
            ("memory: bytes = `x`", |o| o.memory = Some("x".into())),
        ];
        for (start, spoil) in cases {
            let mut options = whole.clone();
            spoil(&mut options);
            let message = options.config().unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        }
    }

    #[test]
    fn a_difference_is_named() {
        let one = TrainOptions { seed: Some(1), rank: Some(2), ..TrainOptions::default() };
        let other = TrainOptions { seed: Some(1), rank: Some(3), steps: Some(4), ..TrainOptions::default() };
        let found = one.difference(&other, &["steps"]).unwrap();
        assert_eq!(found, Some(Difference { option: "rank".into(), own: "2".into(), other: "3".into() }));
        let found = one.difference(&other, &["rank"]).unwrap();
        assert_eq!(found, Some(Difference { option: "steps".into(), own: "absent".into(), other: "4".into() }));
        assert_eq!(one.difference(&other, &["steps", "rank"]).unwrap(), None);
    }
}
