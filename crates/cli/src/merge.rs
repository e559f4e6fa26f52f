//! `unsloth merge`

use std::path::PathBuf;

use anyhow::Result;
use unsloth_rs::recipe::{MergeConfig, merge};

use crate::{args::DeviceArgs, note};

/// Options of `unsloth merge`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the model: config.json and safetensors, as Hugging Face has them; with feature `hub` also its name there
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of the adapter
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder for the merged model, which holds none yet
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let Args { model, adapter, output, device } = args;
    merge(&device.open()?, &MergeConfig { model, adapter, output: output.clone() })?;
    note(&format!("merged model saved in {}", output.display()));
    Ok(())
}
