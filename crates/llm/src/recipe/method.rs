//! What a run trains.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::config::invalid;
use crate::{Error, Result, hub::Parts};

/// What of a model is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Low-rank adapters; the model's own weights are frozen.
    #[default]
    Lora,
    /// Every weight of the checkpoint.
    Full,
    /// Every weight of a model that is initialised at random from its `config.json`.
    Scratch,
}

impl Method {
    const ALL: [Method; 3] = [Method::Lora, Method::Full, Method::Scratch];

    fn name(self) -> &'static str {
        match self {
            Method::Lora => "lora",
            Method::Full => "full",
            Method::Scratch => "scratch",
        }
    }

    /// What of the model's folder is read.
    pub(super) fn parts(self) -> Parts {
        match self {
            Method::Lora | Method::Full => Parts::All,
            Method::Scratch => Parts::WithoutWeights,
        }
    }

    /// Checks settings of adapters, each with its name and whether it was given.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for one that was given although no adapter is trained.
    pub(super) fn check_adapter_settings(self, settings: &[(&'static str, bool)]) -> Result<()> {
        match settings.iter().find(|(_, given)| *given && self != Method::Lora) {
            Some((field, _)) => invalid("method", self, &format!("lora where {field} is given")),
            None => Ok(()),
        }
    }
}

/// `lora`, `full` or `scratch`.
impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidOption`] for another name.
    fn from_str(text: &str) -> Result<Self> {
        let method = Method::ALL.into_iter().find(|method| method.name() == text);
        method.map_or_else(|| invalid("method", text, "lora, full or scratch"), Ok)
    }
}
