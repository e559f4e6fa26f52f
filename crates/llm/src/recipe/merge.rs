//! `unsloth merge`: an adapter into the weights of its model.

use std::path::PathBuf;

use unsloth_core::{DType, Device};

use super::{TrainConfig, load_model, output::OutputFolder};
use crate::{
    Result, export,
    hub::{self, Parts},
};

/// A merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeConfig {
    /// Folder with the model as Hugging Face has it, or its name there ([`hub`]).
    pub model: PathBuf,
    /// Folder of the adapter.
    pub adapter: PathBuf,
    /// Folder for the merged model; made if it is not there. It holds no run or model yet.
    pub output: PathBuf,
}

/// Writes what [`export::save_merged`] writes and the tokenizer's files.
///
/// # Errors
/// [`super::RunError::HoldsRun`] for a folder that holds a model or a run; whatever loading model and adapter refuses; as
/// [`export::save_merged`].
pub fn merge(device: &Device, config: &MergeConfig) -> Result<()> {
    let model = hub::folder(&config.model, Parts::All)?;
    let run = TrainConfig {
        adapter: Some(config.adapter.clone()),
        ..TrainConfig::new(model.clone(), Vec::new(), config.output.clone())
    };
    let output = OutputFolder::open(&run)?;
    let decoder = load_model(device, &model, Some(&config.adapter), DType::F32)?;
    export::save_merged(output.path(), &decoder)?;
    output.copy_tokenizer(&model)
}
