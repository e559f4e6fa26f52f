//! Runs that are interrupted.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::{Outcome, Value, read_metrics};

/// A run of the binary that has not ended.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn start(args: &[String]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_unsloth"));
        Self(command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Waits until `metrics.jsonl` of the run is there and has this many lines.
    pub(crate) fn wait_for_steps(&mut self, output: &Path, count: usize) {
        let start = Instant::now();
        let has_lines =
            || fs::read_to_string(output.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() >= count);
        while !has_lines() {
            assert!(start.elapsed() < Duration::from_secs(120), "the run takes no steps");
            assert!(self.0.try_wait().unwrap().is_none(), "the run ended too early");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends a signal by its name, such as `INT`.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.0.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the end. A run that a signal has ended at once has the status -1.
    pub(crate) fn end(self) -> Outcome {
        Outcome::of(self.0.wait_with_output().unwrap())
    }
}

/// Lines of `metrics.jsonl` without what two equal runs do not share.
pub(crate) fn results(output: &Path) -> Vec<Value> {
    let strip = |mut line: Value| {
        let map = line.as_object_mut().unwrap();
        map.remove("tokens_per_second");
        map.remove("peak_bytes");
        line
    };
    read_metrics(output).into_iter().map(strip).collect()
}
