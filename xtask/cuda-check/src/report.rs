//! The table, the findings and the file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    architecture::{ARCHITECTURES, Occupancy},
    compile::{Compiled, Kernel, Uses},
    occupancy, spills,
};

/// One line per instantiation.
pub(crate) fn table(kernels: &[Kernel]) -> String {
    let mut text = String::new();
    for architecture in &ARCHITECTURES {
        let _ = write!(text, "{:<38}", architecture.target);
    }
    text.push('\n');
    for _ in &ARCHITECTURES {
        text.push_str(" regs  spill  stack  shared    occ.    ");
    }
    text.push_str("units  kernel (first call)\n");
    for kernel in kernels {
        for architecture in &ARCHITECTURES {
            match kernel.on.get(architecture.target) {
                Some(Compiled::Uses(Uses { usage, shared_bytes, occupancy, .. })) => {
                    let (registers, spill, stack) = (usage.registers, usage.spill_bytes, usage.stack_bytes);
                    let percent = occupancy.percent;
                    let _ = write!(text, "{registers:>5} {spill:>6} {stack:>6} {shared_bytes:>7} {percent:>6.1}%    ");
                }
                Some(Compiled::Fails { .. }) => {
                    let _ = write!(text, "{:<38}", "  does not compile");
                }
                None => {
                    let _ = write!(text, "{:<38}", "  not launched");
                }
            }
        }
        let _ = writeln!(text, "{:>5}  {} ({})", kernel.units, kernel.name, kernel.call);
    }
    text
}

/// What makes the check fail.
pub(crate) fn problems(kernels: &[Kernel], refused: &[String], not_launched: &BTreeSet<String>) -> Vec<String> {
    let mut problems: Vec<String> = refused.iter().map(|call| format!("refused: {call}")).collect();
    problems
        .extend(not_launched.iter().map(|name| format!("{name}: no call in xtask/cuda-check/src/calls launches it")));
    for kernel in kernels {
        let Kernel { name, call, .. } = kernel;
        for (architecture, compiled) in &kernel.on {
            match compiled {
                Compiled::Fails { error } => problems.push(format!("{name} on {architecture} ({call}): {error}")),
                Compiled::Uses(Uses { usage, occupancy, tensor_core_instructions, .. }) => {
                    if *tensor_core_instructions == Some(0) {
                        problems.push(format!("{name} on {architecture} ({call}): no instruction of tensor cores"));
                    }
                    if let Some(problem) = spills::problem(kernel, usage.spill_bytes) {
                        problems.push(format!("{name} on {architecture} ({call}): {problem}"));
                    }
                    if let Some(problem) = occupancy::problem(kernel, *occupancy) {
                        problems.push(format!("{name} on {architecture} ({call}): {problem}"));
                    }
                }
            }
        }
    }
    problems
}

/// How many kernels are known to use tensor cores, and by what.
pub(crate) fn tensor_cores(kernels: &[Kernel], disassembled: bool) -> String {
    let on = kernels.iter().flat_map(|kernel| kernel.on.values());
    let counts = on.filter_map(|compiled| match compiled {
        Compiled::Uses(Uses { tensor_core_instructions, .. }) => *tensor_core_instructions,
        Compiled::Fails { .. } => None,
    });
    let (all, with) = counts.fold((0, 0), |(all, with), count| (all + 1, with + usize::from(count > 0)));
    let what = if disassembled {
        "HMMA"
    } else {
        "mma.sync in the source (no nvdisasm beside NVRTC or in PATH to look for HMMA; Python's package is nvidia-cuda-nvdisasm)"
    };
    format!("tensor cores: {what} in {with} of {all} kernels that are written for them")
}

/// One line per kernel and architecture: the most that an instantiation uses, and the least occupancy.
pub(crate) fn summary(kernels: &[Kernel]) -> String {
    let worst = worst(kernels);
    let mut text = format!(
        "  all  <50%  regs  spill  stack  shared  least occupancy      {:<8}kernel (the most over all instantiations)\n",
        ""
    );
    for ((name, architecture), worst) in &worst {
        let Worst { count, low, registers, spill_bytes, stack_bytes, shared_bytes, least } = worst;
        let least = least.map_or_else(String::new, |least| format!("{:>5.1}% {}", least.percent, least.limit));
        let _ = writeln!(
            text,
            "{count:>5} {low:>5} {registers:>5} {spill_bytes:>6} {stack_bytes:>6} {shared_bytes:>7}  {least:<21}{architecture:<8}{name}",
        );
    }
    text
}

/// By name of the kernel and of the architecture.
pub(crate) fn worst(kernels: &[Kernel]) -> BTreeMap<(&str, &'static str), Worst> {
    let mut worst: BTreeMap<(&str, &'static str), Worst> = BTreeMap::new();
    for kernel in kernels {
        for (architecture, compiled) in &kernel.on {
            if let Compiled::Uses(uses) = compiled {
                worst.entry((kernel.name.as_str(), *architecture)).or_default().add(uses);
            }
        }
    }
    worst
}

/// Of the instantiations of one kernel on one architecture.
#[derive(Default)]
pub(crate) struct Worst {
    pub(crate) count: usize,
    /// Those with less than [`occupancy::LOW`].
    low: usize,
    pub(crate) registers: u32,
    pub(crate) spill_bytes: u32,
    pub(crate) stack_bytes: u32,
    pub(crate) shared_bytes: usize,
    pub(crate) least: Option<Occupancy>,
}

impl Worst {
    fn add(&mut self, uses: &Uses) {
        let Uses { usage, shared_bytes, occupancy, .. } = uses;
        self.count += 1;
        self.low += usize::from(occupancy.percent < occupancy::LOW);
        self.registers = self.registers.max(usage.registers);
        self.spill_bytes = self.spill_bytes.max(usage.spill_bytes);
        self.stack_bytes = self.stack_bytes.max(usage.stack_bytes);
        self.shared_bytes = self.shared_bytes.max(*shared_bytes);
        if self.least.is_none_or(|least| occupancy.percent < least.percent) {
            self.least = Some(*occupancy);
        }
    }
}

/// Writes everything to `path`.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn write(path: &Path, nvrtc: &str, kernels: &[Kernel], problems: &[String]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let report = json!({ "nvrtc": nvrtc, "kernels": kernels, "problems": problems });
    fs::write(path, serde_json::to_string_pretty(&report)?).with_context(|| path.display().to_string())
}
