//! Where kept inputs wait for the backward pass.

use std::{fmt, path::Path, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use unsloth_core::{Device, Place, TensorStore};
use unsloth_train::Checkpointing;

use super::config::invalid;
use crate::{Error, Result};

/// Where the inputs of segments that are computed again wait for the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// On the device.
    #[default]
    None,
    /// In host memory. It gains nothing on a device that computes there.
    Host,
    /// In files without a name in the output folder, checked when they are read.
    Disk,
}

impl Offload {
    const ALL: [Offload; 3] = [Offload::None, Offload::Host, Offload::Disk];

    fn name(self) -> &'static str {
        match self {
            Offload::None => "none",
            Offload::Host => "host",
            Offload::Disk => "disk",
        }
    }

    /// # Errors
    /// [`Error::InvalidOption`] under a policy that keeps no inputs.
    pub(super) fn check(self, checkpointing: &Checkpointing) -> Result<()> {
        if self != Offload::None && !checkpointing.keeps_inputs() {
            return invalid(
                "offload",
                self,
                &format!("none with checkpointing {checkpointing}, which keeps no inputs"),
            );
        }
        Ok(())
    }

    /// The store, with files in `folder`.
    ///
    /// # Errors
    /// As [`Device::store`].
    pub(super) fn open(self, device: &Device, folder: &Path) -> Result<Option<Arc<dyn TensorStore>>> {
        let place = match self {
            Offload::None => return Ok(None),
            Offload::Host => Place::Host,
            Offload::Disk => Place::Disk { folder: folder.to_owned() },
        };
        Ok(Some(device.store(&place)?))
    }
}

/// `none`, `host` or `disk`.
impl fmt::Display for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Offload {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidOption`] for another name.
    fn from_str(text: &str) -> Result<Self> {
        let offload = Offload::ALL.into_iter().find(|offload| offload.name() == text);
        offload.map_or_else(|| invalid("offload", text, "none, host or disk"), Ok)
    }
}
