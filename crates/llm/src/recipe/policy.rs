//! Which checkpointing policy a run has: one that was named, or the one that costs least time within a limit.

use std::{fmt, str::FromStr};

use unsloth_train::Checkpointing;

use super::config::invalid;
use crate::{Error, Result};

/// How a run comes to its checkpointing policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Policy {
    /// This one.
    Given(Checkpointing),
    /// The one that computes least again among those that stay within the limit on memory.
    Auto,
}

impl Policy {
    /// # Errors
    /// [`Error::InvalidOption`] where none has been chosen yet.
    pub(super) fn given(&self) -> Result<&Checkpointing> {
        match self {
            Policy::Given(checkpointing) => Ok(checkpointing),
            Policy::Auto => invalid("checkpointing", self, "given with memory, the limit to stay within"),
        }
    }
}

impl From<Checkpointing> for Policy {
    fn from(checkpointing: Checkpointing) -> Self {
        Policy::Given(checkpointing)
    }
}

/// `auto`, or as [`Checkpointing`].
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Given(checkpointing) => checkpointing.fmt(f),
            Policy::Auto => f.write_str("auto"),
        }
    }
}

impl FromStr for Policy {
    type Err = Error;

    /// # Errors
    /// As [`Checkpointing::from_str`].
    fn from_str(text: &str) -> Result<Self> {
        if text == "auto" { Ok(Policy::Auto) } else { Ok(Policy::Given(text.parse()?)) }
    }
}
