//! Development tasks of unsloth-rs: `cargo xtask <task>`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

mod cargo;
mod check;
mod golden;
mod test;

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
    Test,
    /// Turns golden folders of transformers + PEFT into the fixtures under crates/llm/tests/fixtures.
    Golden(golden::Arguments),
}

/// The repository: the folder above this crate.
fn root() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent folder")?;
    Ok(root.to_path_buf())
}

fn main() -> Result<()> {
    let root = root()?;
    match Arguments::parse().task {
        Task::Check => check::run(&root),
        Task::Test => test::run(&root),
        Task::Golden(arguments) => golden::run(&root, &arguments),
    }
}
