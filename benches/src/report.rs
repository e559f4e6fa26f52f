//! Results: as JSON to keep, as a table to read.

use std::{fmt, path::Path};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use unsloth_rs::DType;

use crate::{
    case::Id,
    limits::{Bound, Limits},
    machine::Machine,
    measure::Timing,
};

/// Version of the files: those of another are refused.
pub const VERSION: u32 = 1;

/// Everything that one run of `cargo xtask bench` found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// The command that repeats it.
    pub command: String,
    /// What was built.
    pub commit: Option<String>,
    /// What it ran on.
    pub machine: Machine,
    /// Share of the processors that other processes used meanwhile, peers in their own process included.
    pub used_by_others: Option<f64>,
    /// Peers in the form `name version`.
    pub peers: Vec<String>,
    /// Limits by number of threads.
    pub limits: Vec<ThreadLimits>,
    /// Times.
    pub results: Vec<Entry>,
    /// What was asked for or could be, and did not run.
    pub not_run: Vec<NotRun>,
}

/// Limits with a number of threads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ThreadLimits {
    /// Threads of this process; 1 on a device of its own.
    pub threads: usize,
    /// The rates.
    #[serde(flatten)]
    pub limits: Limits,
}

/// One thing that was timed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// What.
    #[serde(flatten)]
    pub id: Id,
    /// With so many threads.
    pub threads: usize,
    /// The times.
    #[serde(flatten)]
    pub timing: Timing,
    /// Least FLOPs of products, from the operators' contracts.
    pub flops: u64,
    /// Least bytes moved, from the operators' contracts.
    pub bytes: u64,
    /// What bounds it on this machine.
    pub bound: Bound,
    /// Least time that the measured limits allow, in percent of the median.
    pub percent_of_limit: f64,
    /// The rate of products that this percentage is of, in FLOP/s, where it was measured between the samples (their median): that of
    /// [`Report::limits`] is the best one, from the start of the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_flops: Option<f64>,
    /// Highest number of bytes held on the device while it ran, from the ledger; inputs are among them.
    pub peak_bytes: u64,
    /// Those beyond what was held before.
    pub extra_bytes: u64,
    /// Highest resident size of this process while it ran, where the system tells.
    pub peak_rss_bytes: Option<u64>,
    /// Where it is about tokens.
    pub tokens_per_second: Option<f64>,
    /// Others that did the same in turn.
    pub peers: Vec<PeerTiming>,
}

/// A peer's times.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerTiming {
    /// Who.
    pub name: String,
    /// The times.
    #[serde(flatten)]
    pub timing: Timing,
    /// The peer's median over ours: above 1 we are faster.
    pub ratio: f64,
}

/// Something that did not run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotRun {
    /// What.
    pub what: String,
    /// Why.
    pub reason: String,
}

impl NotRun {
    /// `what`, for this reason.
    pub fn new(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { what: what.into(), reason: reason.into() }
    }
}

impl Report {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, is not such a file or has another version.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let report: Self =
            serde_json::from_str(&text).with_context(|| format!("{}: not a file of this command", path.display()))?;
        let (path, version) = (path.display(), report.version);
        ensure!(version == VERSION, "{path}: version = {version}, must be {VERSION}");
        Ok(report)
    }

    /// The limits with so many threads.
    pub fn limits(&self, threads: usize) -> Option<&Limits> {
        self.limits.iter().find(|limits| limits.threads == threads).map(|found| &found.limits)
    }
}

impl Entry {
    /// Rate of what bounds it, in GFLOP/s or GB/s.
    pub fn rate(&self) -> (f64, &'static str) {
        match self.bound {
            Bound::Compute => (self.flops as f64 / self.timing.median_s / 1e9, "GFLOP/s"),
            Bound::Memory => (self.bytes as f64 / self.timing.median_s / 1e9, "GB/s"),
        }
    }

    /// The storage type.
    pub fn dtype(&self) -> Option<DType> {
        DType::FLOATS.into_iter().find(|dtype| dtype.name() == self.id.dtype)
    }
}

/// Seconds as people read them.
pub fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.3} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

/// Bytes as people read them.
pub fn bytes(bytes: u64) -> String {
    match bytes {
        b if b >= 10 << 30 => format!("{:.1} GiB", b as f64 / f64::from(1 << 30)),
        b if b >= 1 << 20 => format!("{:.1} MiB", b as f64 / f64::from(1 << 20)),
        b => format!("{:.1} KiB", b as f64 / 1024.0),
    }
}

/// The head of the table whose lines are entries.
pub const HEAD: &str = "median        p90           rate              of limit   peak       peers            what";

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rate, unit) = self.rate();
        let peers: Vec<String> = self.peers.iter().map(|peer| format!("{} {:.2}x", peer.name, peer.ratio)).collect();
        let peers = if peers.is_empty() { "-".to_owned() } else { peers.join(", ") };
        let (median, p90) = (seconds(self.timing.median_s), seconds(self.timing.p90_s));
        let rate = format!("{rate:.1} {unit}");
        let percent = format!("{:.0}%", self.percent_of_limit);
        let peak = bytes(self.peak_bytes);
        write!(f, "{median:<13} {p90:<13} {rate:<17} {percent:<10} {peak:<10} {peers:<16} {}", self.id)?;
        if let Some(tokens) = self.tokens_per_second {
            write!(f, ", {tokens:.1} tokens/s")?;
        }
        Ok(())
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flops = |name: &str, rate: &crate::limits::Rate| format!("{name} {:.1} GFLOP/s", rate.per_second / 1e9);
        write!(f, "{}", flops("f32", &self.f32_flops))?;
        for (name, rate) in [("bf16", &self.bf16_flops), ("f16", &self.f16_flops)] {
            if let Some(rate) = rate {
                write!(f, ", {}", flops(name, rate))?;
            }
        }
        let (read, copy) = (self.read_bytes.per_second / 1e9, self.copy_bytes.per_second / 1e9);
        write!(f, ", read {read:.1} GB/s, copy {copy:.1} GB/s")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::limits::Rate;

    /// An attention of so many tokens that took so many seconds.
    pub(crate) fn entry(tokens: usize, threads: usize, median_s: f64) -> Entry {
        let shape = format!("{tokens} x 4 on {tokens} x 2, 16");
        let id = Id { op: "attention".into(), part: "forward".into(), model: "m".into(), shape, dtype: "f32".into() };
        Entry {
            id,
            threads,
            timing: Timing { median_s, p90_s: median_s, min_s: median_s, samples: 5 },
            flops: 4_000_000_000,
            bytes: 1_000_000,
            bound: Bound::Compute,
            percent_of_limit: 50.0,
            limit_flops: None,
            peak_bytes: 3 << 20,
            extra_bytes: 1 << 20,
            peak_rss_bytes: None,
            tokens_per_second: Some(1000.0),
            peers: Vec::new(),
        }
    }

    pub(crate) fn report(results: Vec<Entry>) -> Report {
        let rate = || Rate { per_second: 1e9, by: "hand".into() };
        let limits =
            Limits { f32_flops: rate(), bf16_flops: None, f16_flops: None, read_bytes: rate(), copy_bytes: rate() };
        Report {
            version: VERSION,
            command: "cargo xtask bench".into(),
            commit: None,
            machine: Machine::of(&unsloth_rs::device("cpu").unwrap()),
            used_by_others: None,
            peers: Vec::new(),
            limits: [1, 2].map(|threads| ThreadLimits { threads, limits: limits.clone() }).to_vec(),
            results,
            not_run: vec![NotRun::new("PyTorch", "--peer torch asks for it")],
        }
    }

    #[test]
    fn a_report_comes_back_from_its_file() {
        let (folder, report) = (tempfile::tempdir().unwrap(), report(vec![entry(512, 2, 2.0)]));
        let path = folder.path().join("bench.json");
        std::fs::write(&path, serde_json::to_string(&report).unwrap()).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report);
        std::fs::write(&path, serde_json::to_string(&Report { version: 2, ..report }).unwrap()).unwrap();
        let error = Report::read(&path).unwrap_err().to_string();
        assert!(error.contains("version = 2, must be 1"), "{error}");
        std::fs::write(&path, "{}").unwrap();
        assert!(Report::read(&path).unwrap_err().to_string().contains("not a file of this command"));
    }

    #[test]
    fn an_entry_as_a_line() {
        let line = entry(512, 2, 2.0).to_string();
        for part in ["2.000 s", "2.0 GFLOP/s", "50%", "3.0 MiB", "attention forward", "1000.0 tokens/s"] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }
}
