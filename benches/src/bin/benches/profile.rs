//! `cargo xtask profile`: where the time and the memory of a training step go.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Args;
use unsloth_benches::{
    models::MODELS,
    profile::{self, Options},
    training,
};
use unsloth_rs::{
    DType, Device,
    cpu::{CpuBackend, CpuOptions},
    device,
    train::Checkpointing,
};

/// Records every operator of LoRA steps on random tokens: time, share, rates against the measured limits and memory by operator
/// and by kind of layer, as tables, a picture and a trace for Chrome's viewer.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Hugging Face folder [default: two layers of --shape with random weights].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Whose shape the model has that is written where there is no --model.
    #[arg(long, value_name = "NAME", default_value = "Qwen2.5-0.5B", conflicts_with = "model")]
    shape: String,
    /// Device: cpu, cuda:N, vulkan:N or wgpu.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Threads [default: one per core].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Type of activations: f32, bf16 or f16.
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    dtype: String,
    /// Sequences of a step.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 1024)]
    seq: usize,
    /// Inner dimension of the adapters.
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// What is recomputed: none, every:N or sqrt.
    #[arg(long, default_value = "none")]
    checkpointing: Checkpointing,
    /// Recorded steps.
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Where profile.json, profile.svg and trace.json go.
    #[arg(long, value_name = "DIR", default_value = "target/profile")]
    out: PathBuf,
}

pub(crate) fn run(arguments: Arguments) -> Result<ExitCode> {
    let Arguments { batch, seq, rank, checkpointing, steps, .. } = arguments;
    ensure!(batch > 0 && seq > 1 && steps > 0, "--batch and --steps must be at least 1 and --seq at least 2");
    let dtype = DType::FLOATS.into_iter().find(|dtype| dtype.name() == arguments.dtype);
    let dtype = dtype.with_context(|| format!("--dtype {}: must be f32, bf16 or f16", arguments.dtype))?;
    let shape = MODELS.into_iter().find(|model| model.name == arguments.shape);
    let shape = shape.with_context(|| {
        format!("--shape {}: must be one of {}", arguments.shape, MODELS.map(|model| model.name).join(", "))
    })?;
    let device = match arguments.threads {
        None => device(&arguments.device)?,
        Some(_) if arguments.device != "cpu" => anyhow::bail!("--threads: {} has none to choose", arguments.device),
        threads => Device::new(CpuBackend::new(CpuOptions { num_threads: threads, ..CpuOptions::default() })?),
    };
    let training = training::Options { dtype, rank, checkpointing };
    let options = Options { folder: arguments.model, shape, batch: (batch, seq), training, steps };
    let profile = profile::run(&device, &options)?;
    print!("{}", profile::tables(&profile)?);
    for written in profile::write(&profile, &arguments.out)? {
        println!("written: {}", written.display());
    }
    Ok(ExitCode::SUCCESS)
}
