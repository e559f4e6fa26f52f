//! Bad input: every refusal names the file, the field or tensor, the value and the rule.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap fails the test")]

mod adapter;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod families;
mod generate;
mod weights;

use common::{F32, Folder};
use unsloth_llm::{Result, decoder::Decoder};

/// Weights of a model folder.
const WEIGHTS: &str = "model.safetensors";

/// The message of an error and of its sources.
fn message(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Asserts that a call fails with a message that has all of these parts.
#[track_caller]
fn refused<T>(result: Result<T>, parts: &[&str]) {
    let message = message(&result.err().expect("must be refused"));
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

fn decoder(folder: &Folder) -> Result<Decoder> {
    Decoder::load(folder.path(), &unsloth_cpu::device(), F32)
}
