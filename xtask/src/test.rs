//! `cargo xtask test`: everything that must pass for every change; with `--full` also what takes too long for that.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    path::Path,
    process::{ExitStatus, Stdio},
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{
    cargo,
    vulkan::{self, Vulkan},
};

/// Options of `cargo xtask test`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Run the ignored tests too: more repeats, more models, whole programs
    #[arg(long)]
    full: bool,
}

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    let vulkan = vulkan::find_or_install(root)?;
    let mut all = vec!["test", "--workspace", "--no-fail-fast", "--features", cargo::FEATURES];
    if let Vulkan::Devices(_) = vulkan {
        all.extend(["--features", vulkan::FEATURE, "--features", BENCHES]);
    }
    // Output of passing tests says which device ran a suite.
    all.extend(["--", "--show-output"]);
    if arguments.full {
        all.extend(["--include-ignored", "--skip", IN_RELEASE]);
    }
    let mut passes = vec![all];
    if arguments.full {
        passes.push(WITHOUT_FEATURES.split(' ').collect());
        passes.push(RELEASE.split(' ').chain([IN_RELEASE]).collect());
    }
    let mut summary = Summary::default();
    let statuses =
        passes.iter().map(|pass| run_cargo(root, pass, &mut summary)).collect::<Result<Vec<ExitStatus>>>()?;
    print!("{summary}");
    println!("{vulkan}");
    println!("cuda suites: not run (built without feature cuda)");
    if !arguments.full {
        println!("full: not run (cargo xtask test --full)");
    }
    println!("{}", summary.totals());
    for status in statuses {
        ensure!(status.success(), "cargo test: {status}");
    }
    ensure!(summary.failed == 0 && summary.passed > 0, "cargo test reported success without a passing test");
    if let Vulkan::Devices(_) = vulkan {
        let ran = summary.devices.iter().any(|device| device.starts_with("vulkan:"));
        ensure!(ran, "there is a Vulkan device, but no suite ran on it");
    }
    Ok(())
}

/// Of the program that runs the suites elsewhere: its own, so nothing else is compiled anew for it.
const BENCHES: &str = "unsloth-benches/wgpu";

/// Tests of what a build without [`cargo::FEATURES`] says. Most of what these tests need is compiled anew for them.
const WITHOUT_FEATURES: &str = "test --package unsloth-llm --package unsloth-cli --test parquet --test bad_input";

/// What a test is called that measures time, and has to be built for speed.
const IN_RELEASE: &str = "_in_release";

/// Those tests.
const RELEASE: &str = "test --release --package unsloth-rs --test quickstart -- --show-output --ignored";

/// Prints what cargo prints, but for the output of passing tests.
fn run_cargo(root: &Path, arguments: &[&str], summary: &mut Summary) -> Result<ExitStatus> {
    println!("$ cargo {}", arguments.join(" "));
    let mut child = cargo::command(root, arguments).stdout(Stdio::piped()).spawn().context("starting cargo")?;
    let stdout = child.stdout.take().context("cargo has no standard output")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        summary.read(&line);
        if !summary.in_successes {
            println!("{line}");
        }
    }
    Ok(child.wait()?)
}

/// Totals over the test binaries, from libtest's own lines.
#[derive(Default)]
struct Summary {
    passed: u64,
    failed: u64,
    ignored: Vec<String>,
    /// Devices that suites passed on.
    devices: BTreeSet<String>,
    /// What tests say that they could not do on this machine, and why.
    not_run: BTreeSet<String>,
    /// Inside the output of passing tests.
    in_successes: bool,
}

impl Summary {
    fn read(&mut self, line: &str) {
        self.in_successes = match line {
            "successes:" => true,
            "failures:" => false,
            _ => self.in_successes && !line.starts_with("test result: "),
        };
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.passed += count(counts, " passed");
            self.failed += count(counts, " failed");
        } else if let Some((name, rest)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
            && rest.starts_with("ignored")
        {
            self.ignored.push(format!("{name}: not run ({rest})"));
        } else if let Some((_, device)) = line.split_once(": passed on ") {
            self.devices.insert(device.to_owned());
        } else if line.contains(": not run (") {
            self.not_run.insert(line.to_owned());
        }
    }

    fn totals(&self) -> String {
        format!("xtask test: {} passed, {} failed, {} ignored", self.passed, self.failed, self.ignored.len())
    }
}

/// The number in front of ` passed` in `ok. 3 passed; 0 failed; ...`.
fn count(counts: &str, what: &str) -> u64 {
    let field = counts.split(['.', ';']).find_map(|field| field.strip_suffix(what));
    field.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let devices: Vec<&str> = self.devices.iter().map(String::as_str).collect();
        writeln!(f, "\nsuites ran on: {}", if devices.is_empty() { "no device".into() } else { devices.join(", ") })?;
        for line in self.ignored.iter().chain(&self.not_run) {
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Summary;

    #[test]
    fn sums_over_binaries_and_names_what_was_ignored() {
        let mut summary = Summary::default();
        let text = "running 3 tests\n\
            test a::b ... ok\n\
            test slow ... ignored, needs an idle machine\n\
            successes:\n\n---- rope stdout ----\nrope: passed on cpu\ncard: not run (no compiler)\n\nsuccesses:\n    rope\n\nfailures:\n    x\n\
            test result: FAILED. 3 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
            test result: ok. 40 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.25s\n";
        text.lines().for_each(|line| summary.read(line));
        assert_eq!((summary.passed, summary.failed), (43, 1));
        assert_eq!(summary.ignored, ["slow: not run (ignored, needs an idle machine)"]);
        assert_eq!(summary.devices.iter().collect::<Vec<_>>(), ["cpu"]);
        assert_eq!(summary.not_run.iter().collect::<Vec<_>>(), ["card: not run (no compiler)"]);
        assert!(!summary.in_successes);
        assert_eq!(summary.totals(), "xtask test: 43 passed, 1 failed, 1 ignored");
    }
}
