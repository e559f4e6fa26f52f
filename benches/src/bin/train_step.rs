//! Times LoRA steps of a model from a Hugging Face folder; prints one line of JSON.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::json;
use unsloth_benches::{
    machine::{process_bytes, reset_process_peak},
    measure::Timing,
    training::{Options, random_batch, trainer},
};
use unsloth_rs::{DType, device, train::Checkpointing};

/// Times LoRA steps (forward, backward, clipping, AdamW) on all linear layers with random tokens.
#[derive(Parser)]
struct Arguments {
    /// Folder with the model as Hugging Face has it.
    model: PathBuf,
    /// Sequences of a step.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 1024)]
    seq: usize,
    /// Inner dimension of the adapters.
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Type of activations: f32 or bf16.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// What is recomputed: none, every:N or sqrt.
    #[arg(long, default_value = "none")]
    checkpointing: Checkpointing,
    /// Seconds to time for, at least three steps and at most 40.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
}

/// A line of /proc/self/status in MiB; `None` where there is no such file.
fn status_mib(field: &str) -> Option<u64> {
    process_bytes(field).map(|bytes| bytes >> 20)
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let Arguments { batch, seq, rank, .. } = arguments;
    ensure!(batch > 0 && seq > 1, "--batch must be at least 1 and --seq at least 2");
    let dtype = DType::FLOATS.into_iter().find(|dtype| dtype.name() == arguments.dtype);
    let dtype = dtype.with_context(|| format!("--dtype {}: no such type", arguments.dtype))?;
    let cpu = device("cpu")?;
    let checkpointing = arguments.checkpointing.clone();
    let mut trainer = trainer(&arguments.model, &cpu, Options { dtype, rank, checkpointing })?;
    let step = [random_batch(&cpu, trainer.model().config().vocab_size, (batch, seq))?];

    let loaded = status_mib("VmRSS");
    let loading_peak = status_mib("VmHWM");
    // Where that is not possible the peak includes loading.
    let mark_reset = reset_process_peak();
    let first = Instant::now();
    trainer.step(&step)?;
    let first_s = first.elapsed().as_secs_f64();
    let first_loss = trainer.step(&step)?.map(|metrics| metrics.loss);

    let mut seconds = Vec::new();
    let start = Instant::now();
    while seconds.len() < 3 || (start.elapsed().as_secs_f64() < arguments.seconds && seconds.len() < 40) {
        let before = Instant::now();
        trainer.step(&step)?;
        seconds.push(before.elapsed().as_secs_f64());
    }
    let last_loss = trainer.finish()?.map(|metrics| metrics.loss);
    let max_s = seconds.iter().copied().fold(0.0, f64::max);
    let Timing { median_s, min_s, samples, .. } = Timing::of(seconds).context("no step was timed")?;
    let step_peak = status_mib("VmHWM");
    let line = json!({
        "peer": "unsloth-rs", "model": arguments.model.display().to_string(), "dtype": dtype.name(), "batch": batch,
        "seq": seq, "rank": rank, "checkpointing": arguments.checkpointing.to_string(),
        "threads": std::thread::available_parallelism()?.get(), "n": samples,
        "median_s": median_s, "min_s": min_s, "max_s": max_s, "first_s": first_s,
        "tok_s": (batch * seq) as f64 / median_s,
        "rss_loaded_mb": loaded, "peak_rss_mb": loading_peak.zip(step_peak).map(|(a, b)| a.max(b)),
        "step_peak_rss_mb": step_peak.filter(|_| mark_reset),
        "ledger_peak_mb": cpu.usage().total_peak_bytes() >> 20,
        "loss0": first_loss, "lossN": last_loss,
    });
    println!("{line}");
    Ok(())
}
