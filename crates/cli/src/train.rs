//! `unsloth train`

mod args;
mod progress;

use std::{
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};
use unsloth_rs::{
    ByteSize,
    recipe::{End, Summary, train},
};

pub(crate) use self::args::Args;
use self::progress::Progress;
use crate::{
    args::{DeviceArgs, quoted},
    note,
};

/// Exit status of a run that was stopped and can go on.
const STOPPED: u8 = 130;

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let options = args.options()?;
    let device = DeviceArgs { device: options.device.clone(), threads: options.threads }.open()?;
    let quiet = options.quiet.unwrap_or(false);
    let config = options.config()?;
    let stop = stop_on_signals()?;
    let mut progress = Progress::new(&device, quiet);
    let result = train(&device, &config, &mut |event| progress.event(event), &stop);
    progress.finish();
    let summary = result?;
    match &summary.end {
        End::Done => {
            progress.tell(&describe_summary(&summary));
            Ok(ExitCode::SUCCESS)
        }
        End::Stopped(checkpoint) => {
            note(&describe_stop(&summary, checkpoint.as_deref()));
            Ok(ExitCode::from(STOPPED))
        }
    }
}

/// A flag that the first signal to stop sets; the second one ends the process at once.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag down and raises it.
        flag::register_conditional_shutdown(signal, i32::from(STOPPED), stop.clone())
            .and_then(|_| flag::register(signal, stop.clone()))
            .context("cannot listen to signals")?;
    }
    let watched = stop.clone();
    // A step may take minutes, and a handler must not write to a stream: somebody has to look.
    std::thread::spawn(move || {
        while !watched.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(100));
        }
        note("stopping after this step; once more to stop at once, without saving");
    });
    Ok(stop)
}

fn describe_summary(summary: &Summary) -> String {
    let Summary { steps, first_loss, last_loss, tokens, elapsed, peak_bytes, offloaded, output, evaluation, .. } =
        summary;
    let reserved = ByteSize(summary.reserved_bytes);
    let mut text = format!("done: {steps} steps, loss {first_loss:.4} -> {last_loss:.4}");
    if let Some(evaluation) = evaluation {
        text += &format!(", eval loss {:.4}", evaluation.eval_loss);
    }
    if let Some((best, checkpoint)) = &summary.best {
        let (path, loss) = (checkpoint.display(), best.eval_loss);
        text += &format!(", the best {loss:.4} after step {}, whose model it gives and {path} holds", best.step);
    }
    let (seconds, peak) = (elapsed.as_secs_f64(), ByteSize(*peak_bytes));
    text += &format!(", {tokens} tokens in {seconds:.1} s, peak {peak}, {reserved} taken from the system");
    if let Some(usage) = offloaded {
        let waited = (usage.put.time + usage.taken.time).as_secs_f64();
        text += &format!(" and {} elsewhere, ", ByteSize(usage.peak_bytes));
        if usage.pinned_peak_bytes > 0 {
            text += &format!("{} of it pinned, ", ByteSize(usage.pinned_peak_bytes));
        }
        text += &format!("moved in {waited:.1} s");
    }
    text + &format!("; saved in {}", output.display())
}

fn describe_stop(summary: &Summary, checkpoint: Option<&Path>) -> String {
    let Some(checkpoint) = checkpoint else {
        return "stopped before a step was taken; the output folder is as it was".to_owned();
    };
    let (step, output) = (summary.steps, &summary.output);
    let config = quoted(&output.join("config.toml").display().to_string());
    format!(
        "stopped after step {step}, saved in {}; what has been learnt so far is in {}\ngo on with: unsloth train --config {config} --resume",
        checkpoint.display(),
        output.display()
    )
}
