//! Checkpoints of a run: folders `step-NNNNNN`, each all that the run needs to go on.
//!
//! A folder is written under a temporary name, flushed to the disk and renamed, so that one with a proper name is whole unless
//! something changed it afterwards, which `SHA256SUMS` (as `sha256sum` writes it) tells. Beside it are
//! - `state.safetensors`: for every trained tensor `parameter.NAME` in its own type, and what the optimiser keeps of it, such as
//!   `m.NAME` and `v.NAME`;
//! - `state.json`: a [`State`];
//! - `config.toml`: the options of the run.

mod files;

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use unsloth_autograd::Parameter;
use unsloth_core::{Category, DType, Device, Shape, Tensor};
use unsloth_train::{LossScaleState, Model, PARAMETER, RunState, Trainer, set_value};

use self::files::{remove_leftovers, retire, sync_folder, verify, write_sums};
use super::{Best, Damage, RunError, TrainOptions, output::CHECKPOINTS};
use crate::{
    Error, Result, atomic,
    decoder::Decoder,
    packing::Position,
    tensor_file::{self, Entry},
    weights::{self, Wanted, WeightSource},
};

/// Grows when the contents change their meaning.
const FORMAT: u32 = 3;
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");
const STATE: &str = "state.json";
const CONFIG: &str = "config.toml";
const TENSORS: &str = "state.safetensors";
const FILES: [&str; 3] = [CONFIG, STATE, TENSORS];

/// Where a run is, but for its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// Form of the checkpoint.
    pub(super) format: u32,
    /// Version of this program.
    pub(super) version: String,
    /// Steps done.
    pub(super) step: usize,
    /// Of these, the ones that changed nothing, because a gradient was not finite under its loss scale.
    pub(super) num_skipped: usize,
    /// The loss scaler; `None` without one.
    pub(super) loss_scale: Option<LossScaleState>,
    /// Steps of the whole run.
    pub(super) total_steps: usize,
    /// SHA-256 of what says which model the run began with.
    pub(super) model_sha256: String,
    /// Where in the data the next step begins.
    pub(super) position: Position,
    /// SHA-256 of the documents that the run trains on, in their order.
    pub(super) data_sha256: String,
    pub(super) progress: Progress,
    /// The best evaluation before this checkpoint, in a run that keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) best: Option<Best>,
}

/// What the steps so far add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Progress {
    /// Loss of the first step.
    pub(super) first_loss: f32,
    /// Loss of the latest step.
    pub(super) last_loss: f32,
    /// Tokens trained on.
    pub(super) tokens: usize,
    /// Time of all steps.
    pub(super) seconds: f64,
}

impl State {
    pub(super) fn new(
        trained: (RunState, usize),
        position: Position,
        (model_sha256, data_sha256): (&str, &str),
        (progress, best): (Progress, Option<Best>),
    ) -> Self {
        let (RunState { num_steps: step, num_skipped, loss_scale }, total_steps) = trained;
        Self {
            format: FORMAT,
            version: VERSION.to_owned(),
            step,
            num_skipped,
            loss_scale,
            total_steps,
            model_sha256: model_sha256.to_owned(),
            position,
            data_sha256: data_sha256.to_owned(),
            progress,
            best,
        }
    }
}

/// The checkpoints of an output folder.
pub(super) struct Checkpoints {
    folder: PathBuf,
    keep_last: usize,
    best: Option<Best>,
}

/// A checkpoint that was found whole.
pub(super) struct Saved {
    pub(super) path: PathBuf,
    pub(super) state: State,
    pub(super) options: TrainOptions,
    /// Newer ones that are not whole, the newest first.
    pub(super) damaged: Vec<Damage>,
}

impl Checkpoints {
    /// Those of the run that writes to `output`, of which the newest `keep_last` are kept, and the best.
    pub(super) fn new(output: &Path, keep_last: usize, best: Option<Best>) -> Self {
        Self { folder: output.join(CHECKPOINTS), keep_last, best }
    }

    /// Where the checkpoint of a step is.
    pub(super) fn path(&self, step: usize) -> PathBuf {
        self.folder.join(format!("step-{step:06}"))
    }

    /// Writes a checkpoint and then removes those that are no longer to be kept.
    ///
    /// # Errors
    /// [`RunError::NotSaved`], after which the earlier ones are as they were.
    pub(super) fn save(&self, trainer: &Trainer<Decoder>, state: &State, options: &TrainOptions) -> Result<PathBuf> {
        let saved = self.write(trainer, state, options);
        saved.map_err(|source| {
            let earlier = self.list().unwrap_or_default().into_iter().rev().find(|(step, _)| *step < state.step);
            let last_good = earlier.map(|(_, path)| path);
            RunError::NotSaved { step: state.step, last_good, source: Box::new(source) }.into()
        })
    }

    fn write(&self, trainer: &Trainer<Decoder>, state: &State, options: &TrainOptions) -> Result<PathBuf> {
        fs::create_dir_all(&self.folder).map_err(Error::io("create", &self.folder))?;
        remove_leftovers(&self.folder)?;
        let path = self.path(state.step);
        let partial = files::partial(&path);
        let written = fs::create_dir(&partial)
            .map_err(Error::io("create", &partial))
            .and_then(|()| write_files(&partial, trainer, state, options))
            .and_then(|()| {
                // Only a damaged one can bear the name: the run goes on from the newest that is whole.
                retire(&path)?;
                fs::rename(&partial, &path).map_err(Error::io("rename", &partial))
            });
        if let Err(error) = written {
            // That the remains cannot be removed either would only hide why.
            let _ = fs::remove_dir_all(&partial);
            return Err(error);
        }
        sync_folder(&self.folder)?;
        self.prune(state.step)?;
        Ok(path)
    }

    /// Removes all but the newest up to `step`, and the best.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn prune(&self, step: usize) -> Result<()> {
        let mut older = self.list()?;
        older.retain(|(other, _)| *other <= step);
        older.truncate(older.len().saturating_sub(self.keep_last));
        older.retain(|(other, _)| self.best.is_none_or(|best| best.step != *other));
        older.iter().try_for_each(|(_, path)| retire(path))?;
        remove_leftovers(&self.folder)
    }

    /// What is wrong with the best checkpoint, if there is to be one.
    pub(super) fn damage_of_best(&self) -> Option<Damage> {
        verify(&self.path(self.best?.step), FILES).err()
    }

    /// Puts what the best checkpoint has into the parameters of the run's model, if there is to be one.
    ///
    /// # Errors
    /// As [`Saved::restore`].
    pub(super) fn put_best(&self, model: &Decoder) -> Result<()> {
        let Some(Best { step, .. }) = self.best else { return Ok(()) };
        let path = self.path(step).join(TENSORS);
        let file = weights::Checkpoint::open_file(&path)?;
        let put = |parameter: Parameter| {
            set_value(&parameter, |form| saved_tensor(&file, &path, (&parameter, PARAMETER), form, model.device()))
        };
        model.parameters().into_iter().try_for_each(put)
    }

    /// The newest checkpoint that is whole.
    ///
    /// # Errors
    /// [`RunError::NoCheckpoint`], [`RunError::AllDamaged`]; [`RunError::Checkpoint`] for one of another form;
    /// [`Error::Io`] if the folder cannot be read.
    pub(super) fn newest(&self) -> Result<Saved> {
        let mut damaged = Vec::new();
        for (step, path) in self.list()?.into_iter().rev() {
            match verify(&path, FILES) {
                Ok(()) => return read(path, step, damaged),
                Err(damage) => damaged.push(damage),
            }
        }
        Err(match damaged.is_empty() {
            true => RunError::NoCheckpoint { path: self.folder.clone() },
            false => RunError::AllDamaged { damaged },
        }
        .into())
    }

    /// Steps and folders, the oldest first.
    fn list(&self) -> Result<Vec<(usize, PathBuf)>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::io("read", &self.folder))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::io("read", &self.folder))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let step = name.and_then(|name| name.strip_prefix("step-")).and_then(|digits| digits.parse().ok());
            found.extend(step.map(|step| (step, path)));
        }
        found.sort_unstable();
        Ok(found)
    }
}

fn write_files(folder: &Path, trainer: &Trainer<Decoder>, state: &State, options: &TrainOptions) -> Result<()> {
    let mut entries = Vec::new();
    for state in trainer.state()? {
        let name = format!("{}.{}", state.part, state.parameter.name());
        let (shape, dtype) = (*state.shape(), state.dtype());
        entries.push(Entry { name, shape, dtype, tensor: Box::new(move || state.tensor()) });
    }
    tensor_file::write(&folder.join(TENSORS), entries)?;
    let path = folder.join(STATE);
    let mut json = serde_json::to_vec_pretty(state).map_err(Error::json(&path))?;
    json.push(b'\n');
    atomic::write(&path, &json)?;
    atomic::write(&folder.join(CONFIG), options.to_toml()?.as_bytes())?;
    write_sums(folder, FILES)
}

/// What stands in a checkpoint whose checksums are right.
fn read(path: PathBuf, step: usize, damaged: Vec<Damage>) -> Result<Saved> {
    let file = path.join(STATE);
    let json = fs::read(&file).map_err(Error::io("read", &file))?;
    let refuse = |field: &str, value: String, rule: String| {
        Err(RunError::Checkpoint { path: file.clone(), field: field.to_owned(), value, rule }.into())
    };
    // The form first: another one may have other fields.
    #[derive(Deserialize)]
    struct Form {
        format: u32,
    }
    let Form { format } = serde_json::from_slice(&json).map_err(Error::json(&file))?;
    if format != FORMAT {
        return refuse("format", format.to_string(), format!("{FORMAT}, the form that this version reads"));
    }
    let state: State = serde_json::from_slice(&json).map_err(Error::json(&file))?;
    if state.step != step || step == 0 || step > state.total_steps {
        let rule = format!("{step}, as the folder is named, and at most {}", state.total_steps);
        return refuse("step", state.step.to_string(), rule);
    }
    let options = TrainOptions::read(&path.join(CONFIG))?;
    Ok(Saved { path, state, options, damaged })
}

impl Saved {
    /// Puts the trainer where the run was when this checkpoint was saved.
    ///
    /// # Errors
    /// [`RunError::Checkpoint`], [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::UnexpectedTensor`] unless the file
    /// holds exactly the trainer's tensors, each in its own type.
    pub(super) fn restore(&self, trainer: &mut Trainer<Decoder>) -> Result<()> {
        let path = self.path.join(TENSORS);
        let file = weights::Checkpoint::open_file(&path)?;
        let device = trainer.model().device().clone();
        let &State { step: num_steps, num_skipped, loss_scale, .. } = &self.state;
        // The trainer puts each into the category of what it replaces.
        trainer.restore(RunState { num_steps, num_skipped, loss_scale }, |parameter, part, form| {
            saved_tensor(&file, &path, (parameter, part), form, &device)
        })?;
        match file.unused().into_iter().next() {
            Some(name) => Err(Error::UnexpectedTensor { path, name }),
            None => Ok(()),
        }
    }
}

/// A part of a parameter, of this shape and type, from a checkpoint's file.
///
/// # Errors
/// [`RunError::Checkpoint`] for another type; [`Error::MissingTensor`], [`Error::TensorShape`].
fn saved_tensor(
    file: &weights::Checkpoint,
    path: &Path,
    (parameter, part): (&Parameter, &str),
    (shape, dtype): (Shape, DType),
    device: &Device,
) -> Result<Tensor> {
    let name = format!("{part}.{}", parameter.name());
    let stored = file.element_dtype(&name)?;
    if stored != dtype {
        let (path, value, rule) = (path.to_owned(), stored.to_string(), dtype.to_string());
        return Err(RunError::Checkpoint { path, field: name, value, rule }.into());
    }
    file.tensor_copy(device, &Wanted { name: &name, shape, dtype, category: Category::Workspace })
}
