//! Every operator's suite on one device.

use std::{path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;
use unsloth_benches::machine::{Machine, commit};
use unsloth_rs::device;
use unsloth_testkit::mutant::suites;

/// Runs the suites that hold every backend to the f64 oracle, in all float types that the device has.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Device: cpu, cuda:N, vulkan:N or wgpu.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Only suites whose name contains this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Where the results go, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let device = device(&arguments.device)?;
    let (mut results, mut failed) = (Vec::new(), 0);
    for (name, suite) in suites().into_iter().filter(|(name, _)| name.contains(&arguments.filter)) {
        let start = Instant::now();
        let failure = suite(&device).err().map(|failure| failure.to_string());
        let seconds = start.elapsed().as_secs_f64();
        match &failure {
            None => println!("{name}: passed on {} in {seconds:.1} s", device.name()),
            Some(failure) => println!("{name}: FAILED on {}: {failure}", device.name()),
        }
        failed += usize::from(failure.is_some());
        results.push(json!({ "suite": name, "passed": failure.is_none(), "failure": failure, "seconds": seconds }));
    }
    println!("suites on {}: {} passed, {failed} failed", device.name(), results.len() - failed);
    if let Some(path) = &arguments.json {
        let dtypes: Vec<&str> = device.float_dtypes().into_iter().map(|dtype| dtype.name()).collect();
        let report =
            json!({ "machine": Machine::of(&device), "commit": commit(), "dtypes": dtypes, "suites": results });
        std::fs::write(path, format!("{report:#}\n")).with_context(|| path.display().to_string())?;
    }
    Ok(if failed > 0 || results.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
