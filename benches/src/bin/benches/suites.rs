//! Every operator's suite on one device.

use std::{path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};
use unsloth_benches::machine::{Machine, commit, info};
use unsloth_rs::{Device, Error, device};
use unsloth_testkit::{
    mutant::suites,
    report::{Checked, Failure, FailureKind},
    suite::{self, Suite},
};

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

/// Sets of problems that are large because only then tensor cores take part.
const ON_TENSOR_CORES: [(&str, Suite); 2] = [
    ("attention on tensor cores", suite::attention::check_on_tensor_cores),
    ("linear on tensor cores", suite::linear::check_on_tensor_cores),
];

/// What came of a suite.
enum Outcome {
    Passed,
    /// The device does not have what the suite needs.
    NotRun(String),
    Failed(String),
}

impl Outcome {
    fn of(result: Checked) -> Self {
        let unsupported = |failure: &Failure| {
            matches!(failure.kind(), FailureKind::Op(Error::Unsupported { .. } | Error::UnsupportedDType { .. }))
        };
        match result {
            Ok(()) => Outcome::Passed,
            Err(failure) if unsupported(&failure) => Outcome::NotRun(failure.to_string()),
            Err(failure) => Outcome::Failed(failure.to_string()),
        }
    }

    fn json(&self, name: &str, seconds: f64) -> Value {
        let (not_run, failure) = match self {
            Outcome::Passed => (None, None),
            Outcome::NotRun(reason) => (Some(reason), None),
            Outcome::Failed(failure) => (None, Some(failure)),
        };
        let passed = matches!(self, Outcome::Passed);
        json!({ "suite": name, "passed": passed, "not_run": not_run, "failure": failure, "seconds": seconds })
    }
}

/// The suites of a device by name.
fn all(device: &Device) -> Vec<(&'static str, Suite)> {
    let has_tensor_cores = !info(device).tensor_cores.is_empty();
    let sets = ON_TENSOR_CORES.into_iter().filter(|_| has_tensor_cores);
    suites().into_iter().chain(sets).collect()
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let device = device(&arguments.device)?;
    let (mut results, mut passed, mut failed) = (Vec::new(), 0, 0);
    for (name, suite) in all(&device).into_iter().filter(|(name, _)| name.contains(&arguments.filter)) {
        let start = Instant::now();
        let outcome = Outcome::of(suite(&device));
        let seconds = start.elapsed().as_secs_f64();
        match &outcome {
            Outcome::Passed => println!("{name}: passed on {} in {seconds:.1} s", device.name()),
            Outcome::NotRun(reason) => println!("{name}: not run ({reason})"),
            Outcome::Failed(failure) => println!("{name}: FAILED on {}: {failure}", device.name()),
        }
        passed += usize::from(matches!(outcome, Outcome::Passed));
        failed += usize::from(matches!(outcome, Outcome::Failed(_)));
        results.push(outcome.json(name, seconds));
    }
    let not_run = results.len() - passed - failed;
    println!("suites on {}: {passed} passed, {failed} failed, {not_run} not run", device.name());
    if let Some(path) = &arguments.json {
        let dtypes: Vec<&str> = device.float_dtypes().into_iter().map(|dtype| dtype.name()).collect();
        let report =
            json!({ "machine": Machine::of(&device), "commit": commit(), "dtypes": dtypes, "suites": results });
        std::fs::write(path, format!("{report:#}\n")).with_context(|| path.display().to_string())?;
    }
    Ok(if failed > 0 || passed == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
