//! The command line of unsloth-rs: arguments to configurations, events to lines.
//!
//! Exit status: 0 done, 1 failed with one line on standard error, 2 wrong usage, 130 stopped by a signal
//! after saving.

mod adapter_args;
mod args;
mod check_grad;
mod devices;
mod eval;
mod generate;
mod merge;
mod plan;
mod quickstart;
mod train;

use std::{io::Write, process::ExitCode};

use clap::Parser;
use unsloth_rs::{llm, recipe::RunError};

/// Fine-tune language models on whatever processor you have.
#[derive(Parser)]
#[command(name = "unsloth", version, about, max_term_width = 100)]
enum Command {
    /// Train a small language model from nothing, then an adapter for it, within minutes and without any download.
    Quickstart(quickstart::Args),
    /// List the devices of this machine that --device can name.
    Devices(devices::Args),
    /// Train a low-rank adapter for a Hugging Face model, or all of its weights, on chats, texts or tokens.
    Train(Box<train::Args>),
    /// Mean loss and perplexity of a model, with or without an adapter, over data.
    Eval(eval::Args),
    /// Memory that training would take, by category, without reading weights or computing.
    Plan(plan::Args),
    /// Merge an adapter into the weights of its model: a folder that needs no adapter any more.
    Merge(merge::Args),
    /// Hold every gradient of a model and a batch to a device that computes in f64 and to central differences there.
    CheckGrad(check_grad::Args),
    /// Continue a prompt or answer a chat, with the most likely tokens or drawn ones.
    Generate(generate::Args),
}

fn main() -> ExitCode {
    let done = |()| ExitCode::SUCCESS;
    let result = match Command::parse() {
        Command::Quickstart(args) => quickstart::run(args).map(done),
        Command::Devices(args) => devices::run(args).map(done),
        Command::Train(args) => train::run(*args),
        Command::Eval(args) => eval::run(args).map(done),
        Command::Plan(args) => plan::run(args).map(done),
        Command::Merge(args) => merge::run(args).map(done),
        Command::CheckGrad(args) => check_grad::run(args).map(done),
        Command::Generate(args) => generate::run(args).map(done),
    };
    match result {
        Ok(status) => status,
        Err(error) => {
            // `{:#}` joins the causes; a library's message may still have lines of its own. Those of ours are meant.
            let text = format!("error: {error:#}");
            let has_lines = matches!(error.downcast_ref(), Some(llm::Error::Run(RunError::OverBudget(_))));
            note(&if has_lines { text } else { text.replace('\n', " ") });
            ExitCode::FAILURE
        }
    }
}

/// One line on standard error. A reader that has gone away is no reason to stop a run.
fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
