//! Running cargo from a task.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};

/// The cargo that runs this task, at the root of the repository.
pub(crate) fn command(root: &Path, arguments: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root).args(arguments);
    command
}

/// Runs cargo to the end; an exit status other than 0 is an error.
pub(crate) fn run(root: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    println!("$ cargo {}", arguments.join(" "));
    let status = command(root, arguments).envs(environment.iter().copied()).status().context("starting cargo")?;
    ensure!(status.success(), "cargo {}: {status}", arguments.join(" "));
    Ok(())
}

/// Whether the subcommand `cargo <name>` is installed.
pub(crate) fn has_subcommand(root: &Path, name: &str) -> bool {
    command(root, &[name, "--version"]).output().is_ok_and(|output| output.status.success())
}
