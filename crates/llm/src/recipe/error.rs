//! What can go wrong with a run's options, its output folder and its checkpoints.

use std::path::PathBuf;

use super::OverBudget;
use crate::Error;

/// An error of managing a run. Messages name the file or folder, the option, the value and the rule.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A configuration file is not TOML, has a key that is no option, or a value of the wrong type.
    #[error("`{}`, line {line}: {reason}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Line number from 1; 0 if unknown.
        line: usize,
        /// What the parser reported.
        reason: String,
    },
    /// Options cannot be written as TOML: a path is not UTF-8, or a seed is 2^63 or more.
    #[error("the options cannot be written as TOML: {reason}")]
    NotToml {
        /// What the library reported.
        reason: String,
    },
    /// A configuration file has two options of which a run has one at most.
    #[error("`{}`: `{one}` and `{other}` exclude each other", path.display())]
    ExclusiveOptions {
        /// The file.
        path: PathBuf,
        /// One option.
        one: &'static str,
        /// The other.
        other: &'static str,
    },
    /// A run was to begin in a folder that holds another one's results.
    #[error(
        "`{}` holds a run already (`{found}`): resume it, overwrite it, or choose another folder",
        path.display()
    )]
    HoldsRun {
        /// The folder.
        path: PathBuf,
        /// A file or folder of the run.
        found: &'static str,
    },
    /// Another run writes to the folder.
    #[error("another run is writing to `{}`", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// A run was to be resumed that has saved no checkpoint.
    #[error("`{}`: no checkpoint to resume from", path.display())]
    NoCheckpoint {
        /// The folder that would hold them.
        path: PathBuf,
    },
    /// Every checkpoint of a run is damaged.
    #[error("no whole checkpoint to resume from: {}", join(damaged))]
    AllDamaged {
        /// Each checkpoint and what is wrong with it, the newest first.
        damaged: Vec<Damage>,
    },
    /// A checkpoint is whole but not of this run or of another version's form.
    #[error("`{}`: `{field}` = {value}, must be {rule}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// Field or tensor.
        field: String,
        /// Value found.
        value: String,
        /// What is accepted.
        rule: String,
    },
    /// A run was to be resumed with an option, or with data, that would make it another run.
    #[error("{option} = {now} differs from the run to be resumed, which has {saved} (`{}`)", checkpoint.display())]
    Changed {
        /// Name of the option.
        option: String,
        /// Value now.
        now: String,
        /// Value in the checkpoint.
        saved: String,
        /// The checkpoint.
        checkpoint: PathBuf,
    },
    /// A run would exceed the limit on its device's memory; found out before its weights are loaded.
    #[error("{0}")]
    OverBudget(Box<OverBudget>),
    /// A checkpoint could not be written; those before it are as they were.
    #[error(
        "the checkpoint of step {step} could not be saved; {}",
        last_good.as_ref().map_or_else(|| "there is none before it".to_owned(), |path| format!("`{}` is whole, resume from it", path.display()))
    )]
    NotSaved {
        /// The step, from 1.
        step: usize,
        /// The newest checkpoint before it.
        last_good: Option<PathBuf>,
        /// What failed.
        #[source]
        source: Box<Error>,
    },
    /// The best checkpoint of a run was damaged while the run went on; what its last step left has been saved instead.
    #[error(
        "the best checkpoint, of step {step}, is damaged: {damage}; the output folder holds what the last step left"
    )]
    BestDamaged {
        /// The step of the best evaluation.
        step: usize,
        /// What is wrong.
        damage: Damage,
    },
}

/// A checkpoint that is not whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The file, or the folder where it is missing.
    pub path: PathBuf,
    /// What is wrong.
    pub reason: String,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` {}", self.path.display(), self.reason)
    }
}

fn join(damaged: &[Damage]) -> String {
    damaged.iter().map(Damage::to_string).collect::<Vec<_>>().join("; ")
}
