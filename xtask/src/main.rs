//! Development tasks of unsloth-rs: `cargo xtask <task>`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

mod bench;
mod bench_report;
mod cargo;
mod check;
mod cuda_check;
mod golden;
mod test;
mod vulkan;

/// Development tasks of unsloth-rs.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Formatting, lints, documentation, the arrows between crates and the rules for sources.
    Check,
    /// Every test of every crate, and a list of what did not run.
    Test(test::Arguments),
    /// Every CUDA kernel compiled without a GPU: registers, spills, shared memory, occupancy.
    CudaCheck(cuda_check::Arguments),
    /// How fast operators and whole steps are, against the machine's own limits and against peers.
    Bench(bench::Arguments),
    /// Makes the tables in docs/performance.md from benches/results.
    BenchReport(bench_report::Arguments),
    /// Where the time and the memory of a training step go, by operator and by kind of layer.
    Profile(bench::Arguments),
    /// Turns golden folders of transformers + PEFT into the fixtures under crates/llm/tests/fixtures.
    Golden(golden::Arguments),
}

/// The repository: the folder above this crate.
fn root() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent folder")?;
    Ok(root.to_path_buf())
}

fn run(task: &Task) -> Result<()> {
    let root = root()?;
    match task {
        Task::Check => check::run(&root),
        Task::Test(arguments) => test::run(&root, arguments),
        Task::CudaCheck(arguments) => cuda_check::run(&root, arguments),
        Task::Bench(arguments) => bench::run(&root, arguments),
        Task::BenchReport(arguments) => bench_report::run(&root, arguments),
        Task::Profile(arguments) => bench::profile(&root, arguments),
        Task::Golden(arguments) => golden::run(&root, arguments),
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        // Not by returning the error: its Debug form adds a backtrace, which hides what the task has printed.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
