//! The folder that a run writes.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use super::{RunError, Start, TrainConfig, TrainOptions, config::invalid, curve, metrics::Metrics};
use crate::{Error, Result, atomic, tokenizer::TOKENIZER_FILES};

/// Folder of the checkpoints.
pub(super) const CHECKPOINTS: &str = "checkpoints";
pub(super) const METRICS: &str = "metrics.jsonl";
const CONFIG: &str = "config.toml";
const CURVE: &str = "loss.svg";

/// What is not to be lost unasked.
const RESULTS: [&str; 4] = [CHECKPOINTS, METRICS, "adapter_model.safetensors", "model.safetensors"];

/// What else describes the run that a folder holds.
const DESCRIPTIONS: [&str; 3] = [CONFIG, CURVE, "adapter_config.json"];

/// A folder known to be writable. If the run ends before it has written anything, a folder made for it is removed again.
pub(super) struct OutputFolder {
    path: PathBuf,
    is_new: bool,
    /// Held while the run lasts: the system takes it back from a run that is killed.
    _lock: Option<File>,
}

impl OutputFolder {
    /// The output folder of a run.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] if it is the folder of the model or of the adapter to begin with; [`RunError::HoldsRun`] if a new
    /// run is to begin where there is one; [`Error::Io`] if the folder cannot be made or written to.
    pub(super) fn open(config: &TrainConfig) -> Result<Self> {
        let TrainConfig { model, adapter, output, start, .. } = config;
        for (name, input) in [("model", Some(model)), ("adapter", adapter.as_ref())] {
            let same = |input: &PathBuf| {
                fs::canonicalize(input).is_ok_and(|input| fs::canonicalize(output).is_ok_and(|output| input == output))
            };
            if input.is_some_and(same) {
                return invalid(
                    "output",
                    format!("`{}`", output.display()),
                    &format!("another folder than that of the {name}"),
                );
            }
        }
        if let (Start::New, Some(found)) = (start, held(output)) {
            return Err(RunError::HoldsRun { path: output.clone(), found }.into());
        }
        Self::make(output)
    }

    fn make(path: &Path) -> Result<Self> {
        let is_new = !path.exists();
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let mut folder = Self { path: path.to_owned(), is_new, _lock: None };
        folder._lock = lock(path)?;
        // Permission bits do not tell: only writing does.
        tempfile::tempfile_in(path).map_err(Error::io("write to", path))?;
        Ok(folder)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the results of the run that the folder holds.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn clear(&self) -> Result<()> {
        for path in RESULTS.into_iter().chain(DESCRIPTIONS).map(|name| self.path.join(name)) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed.map_err(Error::io("remove", &path))?,
            }
        }
        Ok(())
    }

    /// Where the metrics are.
    pub(super) fn metrics(&self) -> PathBuf {
        self.path.join(METRICS)
    }

    /// Writes the options of the run.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn write_config(&self, options: &TrainOptions) -> Result<()> {
        atomic::write(&self.path.join(CONFIG), options.to_toml()?.as_bytes())
    }

    /// Draws the losses so far.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn draw_curve(&self, metrics: &Metrics) -> Result<()> {
        let path = self.path.join(CURVE);
        let svg = curve::draw(&metrics.losses, &metrics.eval_losses)
            .map_err(|reason| Error::io("draw", &path)(std::io::Error::other(reason)))?;
        atomic::write(&path, svg.as_bytes())
    }

    /// Copies the files that make up a tokenizer, those that exist.
    pub(super) fn copy_tokenizer(&self, model: &Path) -> Result<()> {
        for name in TOKENIZER_FILES {
            let (from, to) = (model.join(name), self.path.join(name));
            if from.is_file() {
                let folder = to.parent().unwrap_or(&self.path);
                fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
                atomic::write(&to, &fs::read(&from).map_err(Error::io("read", &from))?)?;
            }
        }
        Ok(())
    }
}

/// A lock that another run of this or another process does not get meanwhile.
///
/// # Errors
/// [`RunError::InUse`] if another run has it; [`Error::Io`].
fn lock(folder: &Path) -> Result<Option<File>> {
    // A folder that can be opened needs no file of its own for it.
    let path = if cfg!(unix) { folder.to_owned() } else { folder.join("run.lock") };
    let file = if cfg!(unix) { File::open(&path) } else { File::create(&path) };
    let file = file.map_err(Error::io("lock", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(RunError::InUse { path: folder.to_owned() }.into()),
        // Some network file systems have no locks, and two runs in one folder are a mistake, not the rule.
        Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => Ok(None),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", &path)(error)),
    }
}

/// What of a run that took a step a folder holds.
fn held(folder: &Path) -> Option<&'static str> {
    let is_held = |name: &&str| {
        let path = folder.join(name);
        match *name {
            CHECKPOINTS => fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some()),
            METRICS => fs::metadata(path).is_ok_and(|file| file.len() > 0),
            _ => path.exists(),
        }
    };
    RESULTS.into_iter().find(is_held)
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        if self.is_new {
            // Fails, as it should, if anything was written.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unused_new_folder_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        drop(OutputFolder::make(&path).unwrap());
        assert!(!path.exists());
        let used = OutputFolder::make(&path).unwrap();
        fs::write(path.join("file"), "x").unwrap();
        drop(used);
        assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "x");
        // An existing folder stays, whether used or not.
        drop(OutputFolder::make(parent.path()).unwrap());
        assert!(parent.path().exists());
    }

    fn config(output: &Path, start: Start) -> TrainConfig {
        TrainConfig { start, ..TrainConfig::new("nowhere".into(), vec!["data".into()], output.to_owned()) }
    }

    #[test]
    fn a_run_is_found_and_removed_whole() {
        for name in RESULTS {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(name);
            match name {
                CHECKPOINTS => fs::create_dir_all(path.join("step-000001")).unwrap(),
                _ => fs::write(&path, "x").unwrap(),
            }
            for name in DESCRIPTIONS.into_iter().chain(["notes.txt"]) {
                fs::write(folder.path().join(name), "x").unwrap();
            }
            let open = |start| OutputFolder::open(&config(folder.path(), start));
            let refused = open(Start::New).err().unwrap().to_string();
            assert!(refused.contains(&format!("holds a run already (`{name}`)")), "{refused}");
            open(Start::Resume).unwrap();
            let output = open(Start::Overwrite).unwrap();
            assert!(path.exists(), "{name} is removed before the new run begins");
            output.clear().unwrap();
            let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(left, ["notes.txt"]);
            drop(output);
            open(Start::New).unwrap();
        }
    }

    #[test]
    fn two_runs_do_not_share_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        for start in [Start::New, Start::Overwrite, Start::Resume] {
            let first = OutputFolder::open(&config(folder.path(), start)).unwrap();
            let refused = OutputFolder::open(&config(folder.path(), start)).err().unwrap().to_string();
            assert_eq!(refused, format!("another run is writing to `{}`", folder.path().display()));
            drop(first);
        }
        OutputFolder::open(&config(folder.path(), Start::New)).unwrap();
    }

    #[test]
    fn what_a_run_without_a_step_leaves_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(METRICS), "").unwrap();
        fs::write(folder.path().join(CONFIG), "seed = 0\n").unwrap();
        fs::create_dir(folder.path().join(CHECKPOINTS)).unwrap();
        OutputFolder::open(&config(folder.path(), Start::New)).unwrap();
    }

    #[test]
    fn the_inputs_are_not_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::create_dir(&path).unwrap();
        let other_name = folder.path().join("a/../a");
        for start in [Start::New, Start::Overwrite] {
            let adapter = TrainConfig { adapter: Some(path.clone()), ..config(&other_name, start) };
            let model = TrainConfig { model: path.clone(), ..config(&other_name, start) };
            for (config, name) in [(adapter, "adapter"), (model, "model")] {
                let message = OutputFolder::open(&config).err().unwrap().to_string();
                assert!(
                    message.starts_with("output = ")
                        && message.ends_with(&format!("another folder than that of the {name}")),
                    "{message}"
                );
            }
        }
    }

    #[test]
    fn every_template_is_copied() {
        let (model, parent) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let files = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"];
        fs::create_dir(model.path().join("additional_chat_templates")).unwrap();
        for name in files {
            fs::write(model.path().join(name), name).unwrap();
        }
        let output = OutputFolder::make(&parent.path().join("out")).unwrap();
        output.copy_tokenizer(model.path()).unwrap();
        for name in files {
            assert_eq!(fs::read_to_string(output.path().join(name)).unwrap(), name);
        }
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_an_error() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("out");
        fs::write(&path, "x").unwrap();
        let error = OutputFolder::make(&path).err().unwrap().to_string();
        assert!(error.contains("cannot create") && error.contains("out`"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "x");
    }
}
