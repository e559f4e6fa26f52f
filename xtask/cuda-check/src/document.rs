//! `docs/cuda-kernels.md`: what the compiler makes of every kernel.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use anyhow::{Context, Result};

use crate::{
    architecture::ARCHITECTURES,
    compile::{Compiled, Kernel, Uses},
    occupancy::{LISTED, LOW},
    report::worst,
    spills,
};

/// Below the repository's root.
const PATH: &str = "docs/cuda-kernels.md";

/// Writes the document.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn write(root: &Path, kernels: &[Kernel], nvrtc: &str) -> Result<()> {
    fs::write(root.join(PATH), text(kernels, nvrtc)).context(PATH)
}

/// What is wrong with the document as it is. Another version of NVRTC gives other numbers: then nothing is compared.
///
/// # Errors
/// If there is no document.
pub(crate) fn problem(root: &Path, kernels: &[Kernel], nvrtc: &str) -> Result<Option<String>> {
    let written = fs::read_to_string(root.join(PATH)).context(PATH)?;
    if !written.contains(&by(nvrtc)) {
        println!("{PATH}: not compared, it is by another version of NVRTC");
        return Ok(None);
    }
    let differs = repeatable(&written) != repeatable(&text(kernels, nvrtc));
    Ok(differs.then(|| format!("{PATH} is out of date: run `cargo xtask cuda-check --write`")))
}

/// The lines that are the same on every run: CubeCL keeps what it declares in hash maps, and of another order of the same
/// statements the assembler makes a few registers more or less. Of a kernel's summary that leaves its name, its target and how many
/// variants there are, of the variants nothing.
fn repeatable(text: &str) -> Vec<String> {
    let text = text.split(VARIANTS).next().unwrap_or(text);
    let of_line = |line: &str| match line.split(" | ").collect::<Vec<_>>()[..] {
        [kernel, target, count, _, _, _, _, _] => [kernel, target, count].join(" | "),
        _ => line.to_owned(),
    };
    text.lines().map(of_line).collect()
}

const VARIANTS: &str = "\n## Variants\n";

fn by(nvrtc: &str) -> String {
    format!("NVRTC {nvrtc}.")
}

fn text(kernels: &[Kernel], nvrtc: &str) -> String {
    let mut text = format!(
        "# CUDA kernels\n\n\
         What NVIDIA's compiler makes of every kernel that the library launches. Written by `cargo xtask cuda-check --write`, which\n\
         compiles them without a GPU; not edited by hand. {}\n\n\
         Registers and stack are those of one unit. Occupancy is theoretical: planes that a multiprocessor holds at a time, in percent of\n\
         the most it can hold, and what stops the next cube. It is not speed. On a card, CubeCL hands PTX to the driver, whose assembler\n\
         may be of another version than the one used here.\n",
        by(nvrtc)
    );
    summary(&mut text, kernels);
    low(&mut text);
    spilling(&mut text);
    variants(&mut text, kernels);
    text
}

/// One row per kernel and architecture.
fn summary(text: &mut String, kernels: &[Kernel]) {
    text.push_str(
        "\n## Kernels\n\nThe most over all variants, and the least occupancy.\n\n\
         | kernel | target | variants | registers | spilled bytes | stack bytes | shared bytes | occupancy |\n\
         |---|---|---:|---:|---:|---:|---:|---|\n",
    );
    for ((name, target), worst) in &worst(kernels) {
        let occupancy = worst.least.map_or_else(String::new, |least| format!("{:.0}%, {}", least.percent, least.limit));
        let _ = writeln!(
            text,
            "| `{name}` | {target} | {} | {} | {} | {} | {} | {occupancy} |",
            worst.count, worst.registers, worst.spill_bytes, worst.stack_bytes, worst.shared_bytes,
        );
    }
}

fn low(text: &mut String) {
    let _ =
        write!(text, "\n## Occupancy below {LOW}%\n\n| kernel | units | not less than | why |\n|---|---:|---:|---|\n");
    for listed in &LISTED {
        let units = listed.units.map_or("any".to_owned(), |units| units.to_string());
        let _ = writeln!(text, "| `{}` | {units} | {}% | {} |", listed.kernel, listed.least, listed.reason);
    }
}

fn spilling(text: &mut String) {
    text.push_str("\n## Spills\n\n| kernel | calls | not more bytes than | why |\n|---|---|---:|---|\n");
    for (kernel, calls, most, reason) in spills::reasons() {
        let calls = if calls.is_empty() { "any" } else { calls };
        let _ = writeln!(text, "| `{kernel}` | {calls} | {most} | {reason} |");
    }
}

/// One row per kernel and set of numbers.
fn variants(text: &mut String, kernels: &[Kernel]) {
    text.push_str(VARIANTS);
    text.push_str("\nRegisters, shared bytes and occupancy; the first call that launches it, and how many variants are like it.\n\n| kernel | units |");
    ARCHITECTURES.iter().for_each(|architecture| text.push_str(&format!(" {} |", architecture.target)));
    text.push_str(" call |\n|---|---:|");
    ARCHITECTURES.iter().for_each(|_| text.push_str("---|"));
    text.push_str("---|\n");
    let mut rows: BTreeMap<(&str, u32, Vec<String>), (&str, usize)> = BTreeMap::new();
    for kernel in kernels {
        let cells = ARCHITECTURES.iter().map(|architecture| cell(kernel.on.get(architecture.target))).collect();
        rows.entry((&kernel.name, kernel.units, cells)).or_insert((&kernel.call, 0)).1 += 1;
    }
    for ((name, units, cells), (call, count)) in rows {
        let like = if count > 1 { format!(" ({count} like it)") } else { String::new() };
        let _ = writeln!(text, "| `{name}` | {units} | {} | {call}{like} |", cells.join(" | "));
    }
}

fn cell(compiled: Option<&Compiled>) -> String {
    match compiled {
        Some(Compiled::Uses(Uses { usage, shared_bytes, occupancy, .. })) => {
            format!("{}, {shared_bytes}, {:.0}% ({})", usage.registers, occupancy.percent, occupancy.limit)
        }
        Some(Compiled::Fails { .. }) => "does not compile".to_owned(),
        None => "not launched".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_may_differ_and_kernels_may_not() {
        let document = |rows: &str, variants: &str| format!("# CUDA kernels\n{rows}\n## Occupancy{VARIANTS}{variants}");
        let of = |rows: &str, variants: &str| repeatable(&document(rows, variants));
        let row = "| `a` | sm_80 | 3 | 40 | 0 | 0 | 128 | 75%, registers |";
        assert_eq!(of(row, "| 40 |"), of(&row.replace("40", "41"), "| 41 |"));
        assert_ne!(of(row, ""), of(&row.replace('3', "4"), ""));
        assert_ne!(of(row, ""), of(&row.replace("`a`", "`b`"), ""));
        assert_ne!(of(row, ""), of("", ""));
    }
}
