//! Timing of operators and whole steps: shapes of real models, results checked against the oracle before they are timed, the
//! machine's own limits to hold times against, peers, reports.
//!
//! `cargo xtask bench` runs all of it; the criterion benches run the same cases, an operator each.

mod candle;
pub mod case;
pub mod cases;
mod check;
pub mod compare;
pub mod criterion;
pub mod limits;
pub mod machine;
pub mod measure;
pub mod models;
pub mod plots;
pub mod profile;
pub mod recorder;
pub mod report;
pub mod run;
pub mod torch;
pub mod training;
