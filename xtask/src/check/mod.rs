//! `cargo xtask check`: everything about the tree that can be judged without running it.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::{bench_report, cargo};

mod arrows;
mod files;
mod links;
mod ops;
mod sources;

#[cfg(test)]
pub(crate) use files::plant;

/// Finds what breaks one rule under a repository root: one line each, empty when all is well.
type Rule = fn(&Path) -> Result<Vec<String>>;

const RULES: [(&str, Rule); 7] = [
    ("arrows between crates", arrows::check),
    ("file length", sources::length),
    ("nothing left unfinished", sources::unfinished),
    ("the facade only re-exports", sources::facade),
    ("every op is complete", ops::check),
    ("links in documents", links::check),
    ("figures in documents", bench_report::check),
];

/// Every feature at once, on the crates that have them and on what those are built on.
const FEATURES: &str = "clippy --workspace --all-targets --features \
    unsloth-cli/hub,unsloth-cli/parquet,unsloth-cli/wgpu,unsloth-cli/cuda,unsloth-benches/wgpu,unsloth-benches/cuda -- -D warnings";

pub(crate) fn run(root: &Path) -> Result<()> {
    let mut num_violations = 0;
    for (name, rule) in RULES {
        let violations = rule(root)?;
        println!("{name}: {}", if violations.is_empty() { "ok" } else { "FAILED" });
        violations.iter().for_each(|violation| println!("  {violation}"));
        num_violations += violations.len();
    }
    ensure!(num_violations == 0, "{num_violations} violations of the rules for the tree");
    cargo::run(root, &["fmt", "--all", "--check"], &[])?;
    cargo::run(root, &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])?;
    cargo::run(root, &FEATURES.split(' ').collect::<Vec<_>>(), &[])?;
    cargo::run(root, &["doc", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")])?;
    if cargo::has_subcommand(root, "deny") {
        cargo::run(root, &["deny", "check", "licenses", "bans", "sources"], &[])?;
    } else {
        println!("licences of dependencies: not run (cargo-deny is not installed)");
    }
    println!("xtask check: ok");
    Ok(())
}
