//! Running cargo from a task.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::vulkan;

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

/// Features that all tests are built with: theirs need no device and ask no network.
pub(crate) const FEATURES: &str = "unsloth-cli/hub,unsloth-cli/parquet";

/// Builds a `bin` or `example` of any package, and says where it is. As part of the workspace, with the same features as its tests: so
/// nothing is compiled twice.
pub(crate) fn build(root: &Path, (kind, name): (&str, &str)) -> Result<PathBuf> {
    let option = format!("--{kind}");
    let format = "--message-format=json-render-diagnostics";
    let features = [FEATURES, vulkan::FEATURE].join(",");
    let arguments = ["build", "--quiet", "--workspace", "--features", &features, &option, name, format];
    println!("$ cargo {}", arguments.join(" "));
    let output = command(root, &arguments).stderr(Stdio::inherit()).output().context("starting cargo")?;
    ensure!(output.status.success(), "cargo {}: {}", arguments.join(" "), output.status);
    let messages = String::from_utf8_lossy(&output.stdout);
    let program = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find_map(|message| {
        let target = &message["target"];
        let is_it = target["name"] == name && target["kind"][0] == kind;
        message["executable"].as_str().filter(|_| is_it).map(PathBuf::from)
    });
    program.with_context(|| format!("cargo built no {kind} `{name}`"))
}

/// Whether the subcommand `cargo <name>` is installed.
pub(crate) fn has_subcommand(root: &Path, name: &str) -> bool {
    command(root, &[name, "--version"]).output().is_ok_and(|output| output.status.success())
}
