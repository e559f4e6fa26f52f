//! The train crate on the CPU, with a model small enough to write down.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod accumulation;
mod adapters;
mod dropout;
mod kv_cache;
mod loss_scale;
mod model;
mod optimizer;
mod optimizers;
mod paging;
mod pytorch;
mod resume;
mod rounding;
mod schedule;
mod steady_state;
mod stopping;
