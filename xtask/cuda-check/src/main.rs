//! Compiles every kernel that the library launches on NVIDIA devices, without one: `cargo xtask cuda-check`.
//!
//! The operators run through the contract on a device that notes launches instead of running them; each noted kernel goes through
//! CubeCL's CUDA code generator and NVRTC, for every architecture in [`architecture::ARCHITECTURES`]. A kernel that does not
//! compile, spills registers or has a low occupancy without a reason in [`spills`] or [`occupancy::LISTED`], or lacks the instructions of tensor cores
//! that it is written for, by its name, a call that the library refuses, and
//! a kernel that no call launches are failures.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;

mod architecture;
mod calls;
mod compile;
mod disassembler;
mod document;
#[cfg(test)]
mod emulate;
mod kernels;
mod nvrtc;
mod occupancy;
mod offline;
mod report;
mod spills;

use architecture::ARCHITECTURES;
use disassembler::Disassembler;

/// Compiles every CUDA kernel of the library with NVRTC. Started by `cargo xtask cuda-check`, which finds NVRTC.
#[derive(Parser)]
struct Arguments {
    /// NVRTC's library.
    #[arg(long)]
    nvrtc: PathBuf,
    /// Folder of CUDA headers; may be given more than once.
    #[arg(long)]
    include: Vec<PathBuf>,
    /// NVIDIA's disassembler.
    #[arg(long)]
    nvdisasm: Option<PathBuf>,
    /// Where the report goes.
    #[arg(long)]
    json: PathBuf,
    /// Where the generated CUDA C++ goes, one file per instantiation and architecture.
    #[arg(long)]
    sources: Option<PathBuf>,
    /// Write docs/cuda-kernels.md, which is otherwise compared.
    #[arg(long)]
    write: bool,
    /// Only operators whose name contains this.
    #[arg(default_value = "")]
    filter: String,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Not by returning the error: its Debug form adds a backtrace, which hides the findings.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let Arguments { nvrtc, include, nvdisasm, json, sources, write, filter } = arguments;
    let start = Instant::now();
    ensure!(!write || filter.is_empty(), "--write: the document holds every operator, not only those with `{filter}`");
    if let Some(folder) = &sources {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let nvrtc = nvrtc::Nvrtc::load(&nvrtc, include)?;
    let (major, minor) = nvrtc.version();
    let capabilities = nvrtc.capabilities();
    let (mut launches, mut refused) = (Vec::new(), Vec::new());
    for architecture in &ARCHITECTURES {
        if !capabilities.contains(&architecture.capability) {
            println!("{}: not run (NVRTC {major}.{minor} does not compile for it)", architecture.target);
            launches.push(Vec::new());
            continue;
        }
        let outcome = calls::outcome(architecture, &filter)?;
        launches.push(outcome.launches);
        refused.extend(outcome.refused.into_iter().map(|call| format!("{}: {call}", architecture.target)));
    }
    let folder = json.parent().unwrap_or(Path::new(".")).to_path_buf();
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let disassembler = nvdisasm.map(|program| Disassembler { program, folder });
    let tools = compile::Tools { nvrtc: &nvrtc, disassembler: disassembler.as_ref(), sources: sources.as_deref() };
    let compiled = compile::compile(&tools, launches);

    let names: BTreeSet<String> = compiled.iter().map(|kernel| kernel.name.clone()).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).context("no repository above this crate")?;
    let declared = if filter.is_empty() { kernels::declared(root)? } else { BTreeSet::new() };
    let mut problems = report::problems(&compiled, &refused, &(&declared - &names));
    let version = format!("{major}.{minor}");
    if filter.is_empty() {
        problems.extend(occupancy::unneeded(&compiled));
        if write {
            document::write(root, &compiled, &version)?;
        } else {
            problems.extend(document::problem(root, &compiled, &version)?);
        }
    }
    print!("{}", report::table(&compiled));
    print!("\n{}", report::summary(&compiled));
    println!("\n{}", report::tensor_cores(&compiled, disassembler.is_some()));
    report::write(&json, &version, &compiled, &problems)?;

    let targets = ARCHITECTURES.each_ref().map(|architecture| architecture.target).join(", ");
    let (count, num_kernels, seconds) = (compiled.len(), names.len(), start.elapsed().as_secs());
    println!("\n{count} instantiations of {num_kernels} kernels, {targets}, NVRTC {version}, {seconds} s");
    println!("written to {}", json.display());
    problems.iter().for_each(|problem| println!("  {problem}"));
    ensure!(problems.is_empty(), "{} problems", problems.len());
    ensure!(count > 0, "no operator's name contains `{filter}`");
    Ok(())
}
