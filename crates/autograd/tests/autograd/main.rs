//! Gradients, memory and order of the tape, on the CPU.

#![allow(clippy::unwrap_used, reason = "a helper of the tests fails the test that calls it")]

mod checkpoint;
mod deferred;
mod harness;
mod hooks;
mod memory;
mod model;
mod operators;
mod reference;
mod tape;
mod tiled;
