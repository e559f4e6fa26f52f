//! `unsloth devices`

use std::{fmt::Write as _, io::Write};

use anyhow::{Context, Result};
use serde::Serialize;
use unsloth_rs::{ByteSize, DeviceInfo, cpu};

use crate::note;

/// Options of `unsloth devices`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print a list of {"name", "model", "memory_bytes", "driver", "dtypes", "features", "lacks"} instead of text
    #[arg(long)]
    json: bool,
}

/// What `--json` prints of a device.
#[derive(Serialize)]
struct Found {
    name: String,
    model: String,
    /// `null` where the driver does not say.
    memory_bytes: Option<u64>,
    /// `null` for the processor, which needs none.
    driver: Option<String>,
    dtypes: Vec<String>,
    features: Vec<String>,
    lacks: Vec<String>,
}

impl From<DeviceInfo> for Found {
    fn from(info: DeviceInfo) -> Self {
        let DeviceInfo { name, model, memory_bytes, driver, dtypes, tensor_cores: _, features, lacks } = info;
        let dtypes = dtypes.iter().map(ToString::to_string).collect();
        Self { name: name.to_string(), model, memory_bytes, driver, dtypes, features, lacks }
    }
}

/// What this build cannot look for.
const NOT_BUILT: [(&str, bool); 2] = [
    ("vulkan and wgpu devices: not in this build (cargo feature `wgpu`)", cfg!(feature = "wgpu")),
    ("cuda devices: not in this build (cargo feature `cuda`)", cfg!(feature = "cuda")),
];

fn all() -> Vec<Found> {
    #[cfg_attr(
        not(any(feature = "wgpu", feature = "cuda")),
        allow(unused_mut, reason = "the processor is all there is")
    )]
    let mut found = vec![cpu::info()];
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    found.extend(unsloth_rs::cube::devices());
    found.into_iter().map(Found::from).collect()
}

fn describe(device: &Found) -> Result<String> {
    let Found { name, model, memory_bytes, driver, dtypes, features, lacks } = device;
    let mut text = format!("{name}  {model}\n");
    if let Some(bytes) = memory_bytes {
        writeln!(text, "    memory    {}", ByteSize(*bytes))?;
    }
    if let Some(driver) = driver {
        writeln!(text, "    driver    {driver}")?;
    }
    writeln!(text, "    types     {}", if dtypes.is_empty() { "none".to_owned() } else { dtypes.join(", ") })?;
    writeln!(text, "    features  {}", features.join(", "))?;
    if !lacks.is_empty() {
        writeln!(text, "    lacks     {}", lacks.join(", "))?;
    }
    Ok(text)
}

pub(crate) fn run(args: Args) -> Result<()> {
    let found = all();
    let text = if args.json {
        format!("{}\n", serde_json::to_string(&found)?)
    } else {
        found.iter().map(describe).collect::<Result<String>>()?
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")?;
    if !args.json {
        NOT_BUILT.iter().filter(|(_, built)| !built).for_each(|(line, _)| note(line));
    }
    Ok(())
}
