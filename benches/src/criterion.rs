//! The cases of an operator as criterion benches.

use std::time::Duration;

use anyhow::{Context as _, Result};
use criterion::{Criterion, Throughput};
use unsloth_rs::device;

use crate::{
    case::{Context, Prepared, Run},
    cases::{GROUPS, Selection},
    recorder::recorded,
};

/// Times the cases of one group on the processor, each after its check, with candle beside it where it has a counterpart.
/// Throughput is FLOP/s where there are products, else the least traffic per second.
///
/// # Errors
/// A result that is wrong; [`unsloth_rs::Error::OutOfMemory`].
///
/// # Panics
/// If a call fails while it is being timed.
pub fn run(group: &str) -> Result<()> {
    let (_, cases) =
        GROUPS.into_iter().find(|(name, _)| *name == group).with_context(|| format!("no cases {group}"))?;
    let (device, recording) = recorded(&device("cpu")?);
    let mut criterion = criterion();
    for case in cases(&Selection::criterion()) {
        let context = Context { device: &device, recording: &recording, with_candle: true };
        let Prepared { mut check, mut run, candle, .. } = case.prepare(&context)?;
        check()?;
        let cost = recording.cost_of(|| once(&mut run).map(drop))?;
        let mut benches = criterion.benchmark_group(case.id.to_string());
        benches.throughput(if cost.flops > 0 {
            Throughput::Elements(cost.flops)
        } else {
            Throughput::Bytes(cost.bytes())
        });
        for (name, run) in [("unsloth", Some(run)), ("candle", candle)] {
            let Some(mut run) = run else { continue };
            benches.bench_function(name, |bencher| bencher.iter_custom(|iterations| elapsed(&mut run, iterations)));
        }
        benches.finish();
    }
    criterion.final_summary();
    Ok(())
}

/// One run, and the time that it or its clock took.
pub(crate) fn once(run: &mut Run) -> Result<Duration> {
    match run {
        Run::Clocked(run) => run(),
        Run::Call(run) => {
            let start = std::time::Instant::now();
            run()?;
            Ok(start.elapsed())
        }
    }
}

fn elapsed(run: &mut Run, iterations: u64) -> Duration {
    let each = (0..iterations).map(|_| once(run).unwrap_or_else(|error| panic!("a timed call failed: {error:#}")));
    each.sum()
}

/// Few samples of calls that take long; a few seconds each.
fn criterion() -> Criterion {
    let criterion = Criterion::default().sample_size(10);
    criterion.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).configure_from_args()
}
