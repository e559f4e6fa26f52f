//! `cargo xtask bench`, `cargo xtask profile` and the operators' suites as one program: each alone would carry the whole library,
//! and `benches/gpu.sh` copies it to machines without Rust.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod profile;
mod suites;

#[derive(Parser)]
#[command(name = "benches", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Bench(bench::Arguments),
    Profile(profile::Arguments),
    Suites(suites::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::Bench(arguments) => bench::run(arguments),
        Task::Profile(arguments) => profile::run(arguments),
        Task::Suites(arguments) => suites::run(&arguments),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
