//! `unsloth plan`

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    io::Write,
    path::PathBuf,
};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use unsloth_rs::{
    ByteSize, Category, DeviceName,
    plan::Target,
    recipe::{Command, MemoryPlan, Method, Offload, Planner, Policy, TrainConfig},
    train::OptimizerKind,
};

use crate::{adapter_args::AdapterArgs, args::FloatType};

/// Memory of common devices, in GB.
const SIZES: [u64; 12] = [8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 192];

/// Options of `unsloth plan`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder with the model's config.json; of safetensors, if there are any, only the headers are read
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Device to plan for, which need not be there: cpu, vulkan:N, wgpu or cuda:N
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: DeviceName,
    /// Type of activations
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    dtype: FloatType,
    /// Trained matrices in bf16 alone, with --dtype bf16 and --method full or scratch
    #[arg(long)]
    stochastic_rounding: bool,
    /// Tokens of a sequence
    #[arg(long, value_name = "N")]
    seq: usize,
    /// Sequences in a micro-batch
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// What is trained: lora (adapters), full (every weight) or scratch (every weight, from random ones)
    #[arg(long, value_name = "METHOD", default_value = "lora")]
    method: Method,
    #[command(flatten)]
    adapters: AdapterArgs,
    /// What is computed again in the backward pass instead of kept: none, every:N (segments of N layers), sqrt, layers:A,B,..
    /// (from 0), selective (norms and gated units), selective:norm, selective:glu or auto (what --memory takes)
    #[arg(long, value_name = "POLICY", default_value = "none")]
    checkpointing: Policy,
    /// Tokens that the feed-forward part of a layer takes at a time [default: all of a micro-batch]
    #[arg(long, value_name = "N")]
    mlp_tile: Option<usize>,
    /// Where inputs of layers that are computed again wait: none (on the device), host or disk
    #[arg(long, value_name = "PLACE", default_value = "none")]
    offload: Offload,
    /// Where what the optimiser keeps waits between steps: none (on the device), host or disk
    #[arg(long, value_name = "PLACE", default_value = "none")]
    offload_optimizer: Offload,
    /// What is kept of each parameter: by adamw, adamw8bit, sgd, lion, adafactor or muon
    #[arg(long, value_name = "NAME", default_value_t)]
    optimizer: OptimizerKind,
    /// Fail, naming what is held and what would help, if the run would need more, such as 12GiB; without, a table of common
    /// sizes is printed
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Threads of the CPU, which have scratch of their own [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print {"peak_bytes", "by_category", "device"} instead of text, with --memory also {"checkpointing", "largest_seq",
    /// "largest_batch"}, with --offload or --offload-optimizer also {"offloaded_bytes"}
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let planner = planner(&args)?;
    let config = TrainConfig {
        dtype: args.dtype.into(),
        stochastic_rounding: args.stochastic_rounding,
        max_seq_len: Some(args.seq),
        batch_size: args.batch,
        method: args.method,
        adapters: args.adapters.options().adapters()?,
        checkpointing: args.checkpointing,
        mlp_tile: args.mlp_tile,
        offload: args.offload,
        offload_optimizer: args.offload_optimizer,
        optimizer: args.optimizer.with_defaults(),
        memory_bytes: args.memory.map(|ByteSize(bytes)| bytes),
        ..TrainConfig::new(args.model, Vec::new(), PathBuf::new())
    };
    let found = Found::new(&planner, &config, args.device)?;
    let text = match args.json {
        true => serde_json::to_string(&found)?,
        false if args.memory.is_some() => found.text(&config)?,
        false => found.text(&config)? + "\n\n" + &sizes(&planner, &config)?,
    };
    writeln!(std::io::stdout(), "{text}").context("cannot write to standard output")
}

fn planner(args: &Args) -> Result<Planner> {
    let target = match (args.device, args.threads) {
        (DeviceName::Cpu, None) => Target::default(),
        (DeviceName::Cpu, Some(num_threads)) => Target::Cpu { num_threads },
        (_, None) => Target::Kernels { memory_bytes: args.memory.map(|ByteSize(bytes)| bytes) },
        (name, Some(_)) => bail!("--threads is for --device cpu, not {name}"),
    };
    // CubeCL has no bf16 for graphics interfaces.
    let bf16 = matches!(args.device, DeviceName::Cpu | DeviceName::Cuda(_));
    Ok(Planner { target, bf16, command: Command::Plan })
}

/// What `--json` prints.
#[derive(Serialize)]
struct Found {
    peak_bytes: u64,
    /// Sums to `peak_bytes`.
    by_category: BTreeMap<&'static str, u64>,
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    offloaded_bytes: Option<u64>,
    #[serde(flatten)]
    within: Option<Within>,
}

/// What a limit has room for.
#[derive(Serialize)]
struct Within {
    checkpointing: String,
    largest_seq: Option<usize>,
    largest_batch: Option<usize>,
    #[serde(skip)]
    is_chosen: bool,
}

impl Found {
    fn new(planner: &Planner, config: &TrainConfig, device: DeviceName) -> Result<Self> {
        let (plan, within) = match config.memory_bytes {
            None => (planner.plan(config)?, None),
            Some(budget_bytes) => {
                let fitted = planner.fit(config, budget_bytes)?;
                let config = TrainConfig { checkpointing: fitted.checkpointing.clone().into(), ..config.clone() };
                let within = Within {
                    checkpointing: fitted.checkpointing.to_string(),
                    largest_seq: planner.largest_seq_len(&config, budget_bytes)?,
                    largest_batch: planner.largest_batch_size(&config, budget_bytes)?,
                    is_chosen: fitted.is_chosen,
                };
                (fitted.plan, Some(within))
            }
        };
        let MemoryPlan { usage, elsewhere } = plan;
        let by_category = Category::ALL.into_iter().map(|category| (category.name(), usage.at_peak(category)));
        Ok(Self {
            peak_bytes: usage.total_peak_bytes(),
            by_category: by_category.collect(),
            device: device.to_string(),
            offloaded_bytes: elsewhere.total().map(|usage| usage.peak_bytes),
            within,
        })
    }

    fn text(&self, config: &TrainConfig) -> Result<String, fmt::Error> {
        let mut text = String::new();
        for category in Category::ALL {
            let bytes = self.by_category[category.name()];
            if bytes > 0 {
                writeln!(text, "{:<12}{:>12}", category.name(), ByteSize(bytes))?;
            }
        }
        write!(text, "{:<12}{:>12} on {}", "peak", ByteSize(self.peak_bytes), self.device)?;
        if let Some(bytes) = config.memory_bytes {
            write!(text, ", fits {}", ByteSize(bytes))?;
        }
        if let Some(bytes) = self.offloaded_bytes {
            write!(text, "\n{:<12}{:>12} offloaded{}", "", ByteSize(bytes), places(config))?;
        }
        let Some(Within { checkpointing, largest_seq, largest_batch, is_chosen }) = &self.within else {
            return Ok(text);
        };
        if *is_chosen {
            write!(text, "\ncheckpointing {checkpointing} chosen")?;
        }
        let (seq, batch) = (config.max_seq_len.unwrap_or_default(), config.batch_size);
        write!(text, "\nlongest sequences at --batch {batch}: {}", count(*largest_seq))?;
        write!(text, "\nlargest batch at --seq {seq}: {}", count(*largest_batch))?;
        Ok(text)
    }
}

/// Where something waits, as ` to host`.
fn places(config: &TrainConfig) -> String {
    let mut places: Vec<_> =
        [config.offload, config.offload_optimizer].into_iter().filter(|place| *place != Offload::None).collect();
    places.dedup();
    places.iter().map(|place| format!(" to {place}")).collect::<Vec<_>>().join(" and")
}

fn count(largest: Option<usize>) -> String {
    largest.map_or_else(|| "none".to_owned(), |count| count.to_string())
}

/// A device of the same kind with so much memory.
fn with_memory(target: Target, bytes: u64) -> Target {
    match target {
        Target::Cpu { .. } => target,
        Target::Kernels { .. } => Target::Kernels { memory_bytes: Some(bytes) },
    }
}

/// What common devices have room for. A run needs somewhat more than its buffers: a tenth of the memory is left for that.
fn sizes(planner: &Planner, config: &TrainConfig) -> Result<String> {
    let (seq, batch) = (config.max_seq_len.unwrap_or_default(), config.batch_size);
    let mut text = format!("memory    longest sequences at --batch {batch}    largest batch at --seq {seq}");
    for gigabytes in SIZES {
        let budget_bytes = gigabytes * 900_000_000;
        let planner = Planner { target: with_memory(planner.target, gigabytes * 1_000_000_000), ..*planner };
        let longest = count(planner.largest_seq_len(config, budget_bytes)?);
        let largest = count(planner.largest_batch_size(config, budget_bytes)?);
        let width = format!("longest sequences at --batch {batch}").len();
        write!(text, "\n{:<10}{longest:<width$}    {largest}", format!("{gigabytes} GB"))?;
    }
    Ok(text)
}
