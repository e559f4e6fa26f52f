//! What was measured on.

use std::{fs, path::Path, process::Command};

use serde::{Deserialize, Serialize};
use unsloth_rs::{Device, DeviceInfo, DeviceName, cpu};

/// The machine and the device that results belong to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Device, as the command line spells it.
    pub device: String,
    /// What its driver or system calls it.
    pub model: String,
    /// Bytes of its memory.
    pub memory_bytes: Option<u64>,
    /// Driver and version; none for the processor.
    pub driver: Option<String>,
    /// What the device offers.
    pub features: Vec<String>,
    /// The processor.
    pub cpu: String,
    /// Instruction sets that the system lists for it.
    pub cpu_flags: Vec<String>,
    /// Processors that the process may use.
    pub cpus: usize,
    /// Operating system and architecture.
    pub system: String,
}

impl Machine {
    /// Of this device.
    pub fn of(device: &Device) -> Self {
        let (processor, info) = (cpu::info(), info(device));
        Self {
            device: device.name(),
            model: info.model,
            memory_bytes: info.memory_bytes,
            driver: info.driver,
            features: info.features,
            cpu: processor.model,
            cpu_flags: cpu_flags(),
            cpus: cpus(),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
    }
}

/// What is known of a device; of one that is in no list, what is known of the processor.
pub fn info(device: &Device) -> DeviceInfo {
    let found = devices().into_iter().find(|info| info.name.to_string() == device.name());
    found.unwrap_or_else(cpu::info)
}

/// The devices that this build finds.
pub fn devices() -> Vec<DeviceInfo> {
    #[cfg_attr(
        not(any(feature = "wgpu", feature = "cuda")),
        allow(unused_mut, reason = "the processor is all there is")
    )]
    let mut found = vec![cpu::info()];
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    found.extend(unsloth_rs::cube::devices());
    found
}

/// Kinds of devices that this build cannot look for, and how to build one that can.
pub fn not_built() -> Vec<(&'static str, &'static str)> {
    let kinds = [
        ("vulkan and wgpu devices", cfg!(feature = "wgpu"), "built without feature wgpu: --device vulkan:0"),
        ("cuda devices", cfg!(feature = "cuda"), "built without feature cuda: --device cuda:0"),
    ];
    kinds.into_iter().filter(|(_, is_built, _)| !is_built).map(|(what, _, why)| (what, why)).collect()
}

/// Whether a name is that of the processor.
pub fn is_cpu(device: &Device) -> bool {
    device.name() == DeviceName::Cpu.to_string()
}

/// Processors that the process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn cpu_flags() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    let wanted = |flag: &&str| {
        ["sse4", "avx", "fma", "f16c", "amx", "neon", "asimd", "sve", "bf16", "i8mm", "fphp"]
            .iter()
            .any(|prefix| flag.starts_with(prefix))
    };
    let flags = line.and_then(|line| line.split_once(':')).map_or("", |(_, flags)| flags);
    flags.split_whitespace().filter(wanted).map(str::to_owned).collect()
}

/// Size of the last cache that the first processor has a share of; `None` where the system does not say.
fn last_cache_bytes() -> Option<usize> {
    let caches = Path::new("/sys/devices/system/cpu/cpu0/cache");
    let size = |entry: fs::DirEntry| {
        let text = fs::read_to_string(entry.path().join("size")).ok()?;
        let (digits, factor) = match text.trim().strip_suffix('K') {
            Some(digits) => (digits, 1 << 10),
            None => (text.trim().strip_suffix('M')?, 1 << 20),
        };
        Some(digits.parse::<usize>().ok()? * factor)
    };
    fs::read_dir(caches).ok()?.flatten().filter_map(size).max()
}

/// Bytes of which little is left in any cache when the last has been read.
pub(crate) fn beyond_caches() -> usize {
    const LEAST: usize = 64 << 20;
    const MOST: usize = 512 << 20;
    (4 * last_cache_bytes().unwrap_or(LEAST / 4)).clamp(LEAST, MOST)
}

/// The commit that the program was built from, where the build was told (`benches/gpu.sh` does), else the one that it was started
/// in, marked where the tree has changes; `None` outside a repository.
pub fn commit() -> Option<String> {
    if let Some(commit) = option_env!("UNSLOTH_COMMIT") {
        return Some(commit.to_owned());
    }
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "HEAD"])?;
    let changes = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changes.is_empty() { commit } else { format!("{commit} with changes") })
}

/// Version of a library that this program is linked with, from the lock file; `None` for one that is not there.
pub fn library_version(name: &str) -> Option<&'static str> {
    let (_, rest) = include_str!("../../Cargo.lock").split_once(&format!("name = \"{name}\"\nversion = \""))?;
    rest.split('"').next()
}

/// A line of /proc/self/status in bytes; `None` where there is no such file.
pub fn process_bytes(field: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.strip_prefix(field).is_some_and(|rest| rest.starts_with(':')))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
}

/// Forgets the highest resident size of the process, where the system can.
pub fn reset_process_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Seconds of work that all processes together have done since the system started, and seconds of this process; `None` where
/// the system does not say.
fn cpu_seconds() -> Option<(f64, f64)> {
    // The unit of both files on every Linux that this can run on.
    const TICKS: f64 = 100.0;
    let all = fs::read_to_string("/proc/stat").ok()?;
    let fields = all.lines().next()?.split_whitespace().skip(1).take(8).map(str::parse);
    let fields: Vec<f64> = fields.collect::<Result<_, _>>().ok()?;
    let own = fs::read_to_string("/proc/self/stat").ok()?;
    let own: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |index: usize| own.get(index).and_then(|ticks| ticks.parse::<f64>().ok());
    let idle = fields.get(3)? + fields.get(4)?;
    Some(((fields.iter().sum::<f64>() - idle) / TICKS, (ticks(11)? + ticks(12)?) / TICKS))
}

/// Watches how much of the processors others use.
pub struct Noise(Option<(f64, f64)>, std::time::Instant);

impl Noise {
    /// Begins to watch.
    pub fn start() -> Self {
        Self(cpu_seconds(), std::time::Instant::now())
    }

    /// Share of all processors that other processes have used since; `None` where the system does not say.
    pub fn share(&self) -> Option<f64> {
        let ((all, own), (all_now, own_now)) = (self.0?, cpu_seconds()?);
        let available = cpus() as f64 * self.1.elapsed().as_secs_f64();
        Some((((all_now - all) - (own_now - own)) / available).clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::{cpus, library_version};

    #[test]
    fn knows_the_peers_version() {
        assert!(library_version("candle-core").is_some_and(|version| version.starts_with("0.")));
        assert_eq!(library_version("no-such-library"), None);
        assert!(cpus() > 0);
    }
}
