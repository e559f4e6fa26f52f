//! Options that several commands share.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use unsloth_rs::{
    DType, Device,
    cpu::{CpuBackend, CpuOptions},
    device,
    llm::dataset::Report,
};

/// Where to compute.
#[derive(Args)]
pub(crate) struct DeviceArgs {
    /// Processor to compute on; this build has cpu
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: String,
    /// Threads of the CPU [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl DeviceArgs {
    pub(crate) fn open(&self) -> Result<Device> {
        match (self.device.as_str(), self.threads) {
            ("cpu", Some(_)) => {
                let options = CpuOptions { num_threads: self.threads, ..CpuOptions::default() };
                Ok(Device::new(CpuBackend::new(options)?))
            }
            (name, _) => Ok(device(name)?),
        }
    }
}

/// Which model, in which arithmetic.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Folder of the model: config.json and safetensors, as Hugging Face has them
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Type of activations
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    pub(crate) dtype: FloatType,
}

/// A storage type, as the command line spells it.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum FloatType {
    F32,
    Bf16,
    F16,
}

impl From<FloatType> for DType {
    fn from(dtype: FloatType) -> Self {
        match dtype {
            FloatType::F32 => DType::F32,
            FloatType::Bf16 => DType::BF16,
            FloatType::F16 => DType::F16,
        }
    }
}

/// One line about what was read.
pub(crate) fn describe(data: &Report) -> String {
    let mut line = format!(
        "data: {} examples, {} tokens, {:.1}% of them targets",
        data.num_examples,
        data.num_tokens,
        100.0 * data.target_share()
    );
    if data.num_truncated > 0 {
        line += &format!("; {} examples cut to the limit", data.num_truncated);
    }
    if data.num_dropped > 0 {
        line += &format!("; {} examples without a target dropped", data.num_dropped);
    }
    line
}
