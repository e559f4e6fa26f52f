//! Options that several commands share.

use std::path::PathBuf;

use anyhow::{Result, bail};
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
    /// Device to compute on: cpu, vulkan:N, wgpu or cuda:N; `unsloth devices` lists those of this build and machine [default: cpu]
    #[arg(long, value_name = "NAME")]
    pub(crate) device: Option<String>,
    /// Threads of the CPU [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

impl DeviceArgs {
    pub(crate) fn open(&self) -> Result<Device> {
        match (self.device.as_deref().unwrap_or("cpu"), self.threads) {
            ("cpu", Some(_)) => {
                let options = CpuOptions { num_threads: self.threads, ..CpuOptions::default() };
                Ok(Device::new(CpuBackend::new(options)?))
            }
            (name, Some(_)) => bail!("--threads is for --device cpu, not {name}"),
            (name, None) => Ok(device(name)?),
        }
    }
}

/// Which model, in which arithmetic.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Folder of the model: config.json and safetensors, as Hugging Face has them; with feature `hub` also its name there
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

/// One line about what was read; `name` says what for.
pub(crate) fn describe(name: &str, data: &Report) -> String {
    let mut line = format!(
        "{name}: {} examples, {} tokens, {:.1}% of them targets",
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

/// A text as a shell takes it.
pub(crate) fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn texts_are_quoted_where_a_shell_would_take_them_apart() {
        let cases = [
            ("out/a-1.toml", "out/a-1.toml"),
            ("my out/c", "'my out/c'"),
            ("it's", r"'it'\''s'"),
            ("$x", "'$x'"),
            ("\"Hi!\"", "'\"Hi!\"'"),
            ("", "''"),
        ];
        for (text, expected) in cases {
            assert_eq!(quoted(text), expected);
        }
    }
}
