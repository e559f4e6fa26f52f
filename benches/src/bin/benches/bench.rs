//! `cargo xtask bench`: how fast operators and whole steps are on a device, against its own limits and against peers.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Args;
use unsloth_benches::{
    compare::Comparison,
    report::{HEAD, Report},
    run::{self, Options},
};
use unsloth_rs::DType;

/// Times operators and whole steps: each result is checked against the f64 oracle, then timed in turn with its peers, and held
/// against what the machine was measured to do at most.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The smallest model in under three minutes on two cores; says what it leaves out.
    #[arg(long)]
    quick: bool,
    /// Device: cpu, cuda:N, vulkan:N or wgpu; `cargo xtask bench` builds what it needs.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Only this operator, or train_step or decode; repeat for several.
    #[arg(long = "op", value_name = "NAME")]
    ops: Vec<String>,
    /// Only the shapes of this model, as Llama-3.2-1B; repeat for several.
    #[arg(long = "shape", value_name = "NAME", conflicts_with = "quick")]
    shapes: Vec<String>,
    /// Begin nothing once so many seconds have passed; what is left out is listed.
    #[arg(long, value_name = "SECONDS")]
    time_limit: Option<u64>,
    /// Only this storage type (f32, bf16 or f16); repeat for several [default: f32 and bf16].
    #[arg(long = "dtype", value_name = "TYPE", value_parser = dtype)]
    dtypes: Vec<DType>,
    /// Lengths of one sequence, for attention and train_step, separated by commas [default: 512 to 16384, of larger models fewer].
    #[arg(long = "seq", value_name = "TOKENS", value_delimiter = ',', conflicts_with = "quick")]
    seq_lens: Vec<usize>,
    /// Numbers of threads, separated by commas [default: all, and some operators with fewer].
    #[arg(long, value_name = "N", value_delimiter = ',')]
    threads: Vec<usize>,
    /// Hugging Face folder for train_step and decode [default: two layers of a model's shape with random weights].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// A peer besides candle: torch.
    #[arg(long, value_name = "NAME", value_parser = ["torch"])]
    peer: Option<String>,
    /// Python that has PyTorch (and transformers and peft, for train_step).
    #[arg(long, value_name = "PATH", default_value = "python3", requires = "peer")]
    python: PathBuf,
    /// Where bench.json and plots go.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Run nothing: compare two files, and fail where the second is slower by more than the threshold.
    #[arg(long, num_args = 2, value_names = ["BEFORE", "AFTER"])]
    compare: Option<Vec<PathBuf>>,
    /// By how many percent a median may grow.
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0, requires = "compare")]
    threshold: f64,
}

fn dtype(name: &str) -> Result<DType, String> {
    DType::FLOATS.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| "must be f32, bf16 or f16".to_owned())
}

fn compare(files: &[PathBuf], threshold: f64) -> Result<ExitCode> {
    let comparison = Comparison::of(&Report::read(&files[0])?, &Report::read(&files[1])?);
    print!("{comparison}");
    let regressions = comparison.regressions(1.0 + threshold / 100.0).len();
    println!("{} compared, {regressions} slower by more than {threshold}%", comparison.changes.len());
    Ok(if regressions > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn bench(arguments: Arguments) -> Result<ExitCode> {
    let command = std::iter::once("cargo xtask".to_owned()).chain(std::env::args().skip(1));
    let options = Options {
        device: arguments.device,
        dtypes: arguments.dtypes,
        threads: arguments.threads,
        ops: arguments.ops,
        shapes: arguments.shapes,
        seq_lens: arguments.seq_lens,
        folder: arguments.model,
        quick: arguments.quick,
        time_limit: arguments.time_limit.map(Duration::from_secs),
        python: arguments.peer.map(|_| arguments.python),
        command: command.collect::<Vec<_>>().join(" "),
    };
    println!("{HEAD}");
    let outcome = run::run(&options, &mut |line| println!("{line}"))?;
    for written in run::write(&outcome.report, &arguments.out)? {
        println!("written: {}", written.display());
    }
    if let Some(share) = outcome.report.used_by_others {
        println!("used by other processes meanwhile: {:.0}% of all processors", 100.0 * share);
    }
    for not_run in &outcome.report.not_run {
        println!("not run: {} ({})", not_run.what, not_run.reason);
    }
    outcome.failures.iter().for_each(|failure| println!("FAILED: {failure}"));
    Ok(if outcome.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(crate) fn run(arguments: Arguments) -> Result<ExitCode> {
    match &arguments.compare {
        Some(files) => compare(files, arguments.threshold),
        None => bench(arguments),
    }
}
