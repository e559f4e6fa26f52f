//! The train crate on the CPU, with a model small enough to write down.

mod accumulation;
mod adapters;
mod kv_cache;
mod model;
mod optimizer;
mod pytorch;
mod schedule;
mod steady_state;
mod stopping;
