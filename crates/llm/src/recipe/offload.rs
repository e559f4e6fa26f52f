//! What waits outside of the device's memory until it is needed.

use std::{fmt, path::Path, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use unsloth_core::{Device, Place, StoreUsage, TensorStore};
use unsloth_train::{Checkpointing, OptimizerConfig, SgdConfig, Trainer};

use super::config::invalid;
use crate::{Error, Result, decoder::Decoder};

/// Where something waits: inputs of segments that are computed again, for the backward pass, or what the optimiser keeps, for the next
/// step.
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
    pub(super) fn check_inputs(self, checkpointing: &Checkpointing) -> Result<()> {
        if self != Offload::None && !checkpointing.keeps_inputs() {
            return invalid(
                "offload",
                self,
                &format!("none with checkpointing {checkpointing}, which keeps no inputs"),
            );
        }
        Ok(())
    }

    /// # Errors
    /// [`Error::InvalidOption`] with an optimiser that keeps nothing.
    pub(super) fn check_optimizer(self, optimizer: &OptimizerConfig) -> Result<()> {
        if self != Offload::None && !keeps_something(optimizer) {
            return invalid("offload_optimizer", self, "none with sgd without momentum, which keeps nothing");
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

/// Whether an optimiser needs to know more than the last gradient.
pub(super) fn keeps_something(optimizer: &OptimizerConfig) -> bool {
    !matches!(optimizer, OptimizerConfig::Sgd(SgdConfig { momentum: 0.0, .. }))
}

/// What waits outside of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Offloaded {
    /// Inputs of segments that are computed again.
    pub inputs: Option<StoreUsage>,
    /// What the optimiser keeps.
    pub optimizer: Option<StoreUsage>,
}

impl Offloaded {
    pub(super) fn of(trainer: &Trainer<Decoder>) -> Self {
        let inputs = trainer.model().offload().map(TensorStore::usage);
        Self { inputs, optimizer: trainer.optimizer().paging().map(|paging| paging.store.usage()) }
    }

    /// Both together, if anything was to wait.
    pub fn total(&self) -> Option<StoreUsage> {
        [self.inputs, self.optimizer].into_iter().flatten().reduce(StoreUsage::and)
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
