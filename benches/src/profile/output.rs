//! A profile as tables, as a picture and as a trace for Chrome's viewer.

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use unsloth_rs::Category;

use super::{Profile, Share};
use crate::{
    plots,
    report::{bytes, seconds},
};

/// What is printed.
///
/// # Errors
/// None in practice: writing to a string.
pub fn tables(profile: &Profile) -> Result<String> {
    let mut text = String::new();
    let Profile { what, machine, limits, step_s, recorded_step_s, .. } = profile;
    writeln!(text, "{what}\n{}: {}\nlimits: {limits}\n", machine.device, machine.model)?;
    let (step, recorded) = (seconds(*step_s), seconds(*recorded_step_s));
    writeln!(
        text,
        "a step takes {step} ({:.1} tokens/s), recorded call by call {recorded}\n",
        profile.tokens_per_second
    )?;
    for (title, shares) in [("kind of layer", &profile.layers), ("operator", &profile.operators)] {
        writeln!(text, "share   time          calls  GFLOP/s  GB/s     of limit  moved at least  {title}")?;
        shares.iter().try_for_each(|share| writeln!(text, "{}", line(share)))?;
        let between = recorded_step_s - shares.iter().map(|share| share.seconds).sum::<f64>();
        writeln!(text, "        {:<13} between calls\n", seconds(between.max(0.0)))?;
    }
    writeln!(text, "peak memory")?;
    for (category, held) in profile.peak_bytes.iter().filter(|(_, held)| *held > 0) {
        writeln!(text, "  {:<12} {category}", bytes(*held))?;
    }
    let total = profile.peak_bytes.iter().map(|(_, held)| held).sum();
    writeln!(text, "  {:<12} in all", bytes(total))?;
    Ok(text)
}

fn line(share: &Share) -> String {
    let (time, moved) = (seconds(share.seconds), bytes(share.bytes as u64));
    let (gflops, gigabytes) = (share.flops / share.seconds / 1e9, share.bytes / share.seconds / 1e9);
    let (percent, of_limit) = (format!("{:.1}%", share.percent), format!("{:.0}%", share.percent_of_limit));
    let calls = format!("{:.0}", share.calls);
    format!(
        "{percent:<7} {time:<13} {calls:<6} {gflops:<8.1} {gigabytes:<8.1} {of_limit:<9} {moved:<15} {}",
        share.name
    )
}

/// Writes `profile.json`, `profile.svg` and `trace.json`.
///
/// # Errors
/// If the folder cannot be written.
pub fn write(profile: &Profile, folder: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let parts = |shares: &[Share], what: &str| -> Vec<(String, f64)> {
        shares.iter().map(|share| (format!("{what}: {}", share.name), share.percent)).collect()
    };
    let all = [parts(&profile.layers, "layers"), parts(&profile.operators, "operator")].concat();
    let files = [
        ("profile.json", format!("{}\n", serde_json::to_string_pretty(profile)?)),
        ("profile.svg", plots::bars(&all, "percent of a step's time", None)?),
        ("trace.json", format!("{}\n", trace(profile))),
    ];
    let write = |(name, text): (&str, String)| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        Ok(path)
    };
    files.into_iter().map(write).collect()
}

/// The calls of one step and the memory held after each, in the format that chrome://tracing and Perfetto read.
fn trace(profile: &Profile) -> Value {
    let micros = |duration: std::time::Duration| duration.as_secs_f64() * 1e6;
    let calls = profile.calls.iter().map(|(call, place)| {
        json!({ "name": call.name, "cat": place.kind, "ph": "X", "pid": 0, "tid": 0,
            "ts": micros(call.start), "dur": micros(call.elapsed),
            "args": { "shape": call.shape, "layer": place.kind, "module": place.module,
                "flops": call.cost.flops, "bytes": call.cost.bytes() } })
    });
    let memory = profile.calls.iter().map(|(call, _)| {
        let held = |category: &Category| (category.name().to_owned(), json!(call.live_bytes[category.index()]));
        let held: serde_json::Map<String, Value> = Category::ALL.iter().map(held).collect();
        json!({ "name": "memory", "ph": "C", "pid": 0, "ts": micros(call.start + call.elapsed), "args": held })
    });
    json!({ "displayTimeUnit": "ms", "otherData": { "what": profile.what },
        "traceEvents": calls.chain(memory).collect::<Vec<_>>() })
}
