//! `cargo xtask bench` and `profile`: builds the program in `benches` with what the device needs, and runs that task of it.

use std::path::Path;

use anyhow::Result;

use crate::cargo;

/// The program has the options: see its `--help`.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// What the program is given.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    run_task(root, "bench", &arguments.arguments)
}

/// `cargo xtask profile`.
pub(crate) fn profile(root: &Path, arguments: &Arguments) -> Result<()> {
    run_task(root, "profile", &arguments.arguments)
}

/// Runs a task of `benches`, built for speed and with the feature of the device that its arguments name.
fn run_task(root: &Path, name: &str, arguments: &[String]) -> Result<()> {
    let mut command = vec!["run", "--release", "--package", "unsloth-benches", "--bin", "benches"];
    if let Some(feature) = device(arguments).and_then(feature) {
        command.extend(["--features", feature]);
    }
    command.extend(["--", name]);
    command.extend(arguments.iter().map(String::as_str));
    cargo::run(root, &command, &[])
}

/// The value of `--device`.
fn device(arguments: &[String]) -> Option<&str> {
    let pairs = arguments.iter().zip(arguments.iter().skip(1));
    let separate = pairs.filter(|(flag, _)| *flag == "--device").map(|(_, value)| value.as_str());
    let joined = arguments.iter().filter_map(|argument| argument.strip_prefix("--device="));
    separate.chain(joined).last()
}

/// The cargo feature that a device is behind.
fn feature(device: &str) -> Option<&'static str> {
    let kind = device.split(':').next().unwrap_or(device);
    match kind {
        "cuda" => Some("cuda"),
        "vulkan" | "wgpu" => Some("wgpu"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{device, feature};

    #[test]
    fn the_device_decides_about_the_feature() {
        for (arguments, expected) in [
            (&["--quick"][..], None),
            (&["--device", "cpu"], None),
            (&["--device", "cuda:0", "--quick"], Some("cuda")),
            (&["--device=vulkan:1"], Some("wgpu")),
            (&["--device", "wgpu"], Some("wgpu")),
            (&["--device"], None),
        ] {
            let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
            assert_eq!(device(&arguments).and_then(feature), expected, "{arguments:?}");
        }
    }
}
