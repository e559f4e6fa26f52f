//! `unsloth plan`

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    io::Write,
    path::PathBuf,
};

use anyhow::{Context, Result};
use serde::Serialize;
use unsloth_rs::{
    Category, Device,
    core::Usage,
    llm::decoder::Targets,
    plan::{PlanBackend, PlanOptions},
    recipe::{Method, Offload, PlanConfig, plan},
    train::Checkpointing,
};

use crate::args::{ByteSize, FloatType};

/// The device whose memory is planned.
const DEVICE: &str = "cpu";

/// Options of `unsloth plan`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder with the model's config.json; of safetensors, if there are any, only the headers are read
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Type of activations
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    dtype: FloatType,
    /// Tokens of a sequence
    #[arg(long, value_name = "N")]
    seq: usize,
    /// Sequences in a micro-batch
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// What is trained: lora (adapters), full (every weight) or scratch (every weight, from random ones)
    #[arg(long, value_name = "METHOD", default_value = "lora")]
    method: Method,
    /// Inner dimension of the adapters [default: 16]
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// Share of the adapters' input that is set to zero in training [default: 0]
    #[arg(long, value_name = "F")]
    dropout: Option<f32>,
    /// all-linear, or names of the layers to adapt, such as q_proj,v_proj [default: all-linear]
    #[arg(long, value_name = "NAME,NAME,..")]
    targets: Option<Targets>,
    /// What is computed again in the backward pass instead of kept: none, every:N (segments of N layers), sqrt, layers:A,B,..
    /// (from 0), selective (norms and gated units), selective:norm or selective:glu
    #[arg(long, value_name = "POLICY", default_value = "none")]
    checkpointing: Checkpointing,
    /// Where inputs of layers that are computed again wait: none (on the device), host or disk
    #[arg(long, value_name = "PLACE", default_value = "none")]
    offload: Offload,
    /// Fail, naming what is held, if the run would need more, such as 12GiB
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Threads of the CPU, which have scratch of their own [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print {"peak_bytes", "by_category", "device"} instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let mut options = PlanOptions { budget_bytes: args.memory.map(|size| size.0), ..PlanOptions::default() };
    if let Some(num_threads) = args.threads {
        options.num_threads = num_threads;
    }
    let device = Device::new(PlanBackend::new(options)?);
    let config = PlanConfig {
        model: args.model,
        dtype: args.dtype.into(),
        seq_len: args.seq,
        batch_size: args.batch,
        method: args.method,
        rank: args.rank,
        dropout: args.dropout,
        targets: args.targets,
        checkpointing: args.checkpointing,
        offload: args.offload,
    };
    let usage = plan(&device, &config)?;
    let text = if args.json { serde_json::to_string(&Found::from(&usage))? } else { table(&usage, args.memory)? };
    writeln!(std::io::stdout(), "{text}").context("cannot write to standard output")
}

/// What `--json` prints.
#[derive(Serialize)]
struct Found {
    peak_bytes: u64,
    /// Sums to `peak_bytes`.
    by_category: BTreeMap<&'static str, u64>,
    device: &'static str,
}

impl From<&Usage> for Found {
    fn from(usage: &Usage) -> Self {
        let by_category = Category::ALL.into_iter().map(|category| (category.name(), usage.at_peak(category)));
        Self { peak_bytes: usage.total_peak_bytes(), by_category: by_category.collect(), device: DEVICE }
    }
}

fn table(usage: &Usage, memory: Option<ByteSize>) -> Result<String, fmt::Error> {
    let mut text = String::new();
    for category in Category::ALL {
        let bytes = usage.at_peak(category);
        if bytes > 0 {
            writeln!(text, "{:<12}{:>12}", category.name(), ByteSize(bytes))?;
        }
    }
    write!(text, "{:<12}{:>12} on {DEVICE}", "peak", ByteSize(usage.total_peak_bytes()))?;
    if let Some(memory) = memory {
        write!(text, ", fits {memory}")?;
    }
    Ok(text)
}
