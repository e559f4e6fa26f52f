//! What a person sees of a run: a bar with a line of numbers on a terminal, a line a step elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use unsloth_rs::{
    ByteSize, Device,
    llm::dataset::Sample,
    recipe::{EvalRecord, Event, Fitted, Prepared, Resumed, StepRecord},
};

use crate::{args::describe, note};

/// Shows the events of a run.
pub(super) struct Progress {
    device: Device,
    quiet: bool,
    /// Where a bar is drawn, if one is.
    terminal: Option<ProgressDrawTarget>,
    bar: Option<ProgressBar>,
    total_steps: usize,
}

impl Progress {
    /// On standard error, with a bar if that is a terminal.
    pub(super) fn new(device: &Device, quiet: bool) -> Self {
        let has_bar = !quiet && std::io::stderr().is_terminal();
        Self {
            device: device.clone(),
            quiet,
            terminal: has_bar.then(ProgressDrawTarget::stderr),
            bar: None,
            total_steps: 0,
        }
    }

    /// Shows an event.
    pub(super) fn event(&mut self, event: Event) {
        match event {
            Event::Fitted(fitted) => self.tell(&describe_fitted(&fitted)),
            Event::Prepared(prepared) => self.prepared(&prepared),
            Event::Resumed(resumed) => self.resumed(&resumed),
            Event::Step(record) => self.step(&record),
            Event::Evaluated(EvalRecord { step, eval_loss, eval_perplexity, best }) => {
                let (total, best) = (self.total_steps, if best { ", the best so far" } else { "" });
                self.tell(&format!(
                    "step {step}/{total}  eval loss {eval_loss:.4}  perplexity {eval_perplexity:.2}{best}"
                ));
            }
            Event::Overflow(origin) => self.tell(&origin.to_string()),
            Event::Saved(path) => self.tell(&format!("saved {}", path.display())),
            _ => {}
        }
    }

    /// Shows a line, unless the run is to be quiet.
    pub(super) fn tell(&self, line: &str) {
        if !self.quiet {
            self.show(line);
        }
    }

    /// Removes the bar, so that what follows stands where it stood.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Shows a line above the bar.
    fn show(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(line)),
            None => note(line),
        }
    }

    /// Shows a line even to those who want no progress.
    fn warn(&self, line: &str) {
        self.show(&format!("warning: {line}"));
    }

    fn prepared(&mut self, prepared: &Prepared) {
        self.total_steps = prepared.total_steps;
        self.tell(&format!("{} (limit {} tokens)", describe("data", &prepared.data), prepared.max_seq_len));
        if let Some(eval) = &prepared.eval {
            self.tell(&describe("evaluation", &eval.data));
            if eval.num_trained_on > 0 {
                let (shared, all) = (eval.num_trained_on, eval.data.num_examples);
                self.warn(&format!("{shared} of the {all} evaluation examples are trained on too"));
            }
        }
        if let Some(sample) = &prepared.sample {
            self.tell(&describe_sample(sample));
        }
        if !prepared.unused_tensors.is_empty() {
            self.warn(&format!("tensors without a place in the model: {}", prepared.unused_tensors.join(", ")));
        }
        self.tell(&format!("training {} parameters for {} steps", prepared.num_trained, prepared.total_steps));
        self.bar = self.terminal.take().map(|target| bar(target, prepared.total_steps));
    }

    fn resumed(&self, resumed: &Resumed) {
        for damage in &resumed.damaged {
            self.warn(&format!("passed over a damaged checkpoint: {damage}"));
        }
        if let Some(damage) = &resumed.damaged_best {
            self.warn(&format!("the best checkpoint is damaged, the best from now on takes its place: {damage}"));
        }
        if resumed.num_missing_records > 0 {
            self.warn(&format!("metrics.jsonl has lost {} steps before {}", resumed.num_missing_records, resumed.step));
        }
        if let Some(version) = &resumed.other_version {
            self.warn(&format!("the checkpoint is of version {version}; this one may compute other bits"));
        }
        self.tell(&format!("resumed from {}, after step {}", resumed.checkpoint.display(), resumed.step));
        if let Some(bar) = &self.bar {
            bar.set_position(resumed.step as u64);
            bar.reset_eta();
        }
    }

    fn step(&self, record: &StepRecord) {
        let numbers = describe_step(record, self.device.usage().total_live_bytes());
        match &self.bar {
            Some(bar) => {
                bar.set_message(numbers);
                bar.set_position(record.step as u64);
            }
            None => self.tell(&format!("step {}/{}  {numbers}", record.step, self.total_steps)),
        }
    }
}

/// A bar over the steps with the time to the end, above a line of numbers.
fn bar(target: ProgressDrawTarget, total_steps: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total_steps as u64), target);
    // The template is a constant: were it not valid, the bar would look otherwise and no more.
    if let Ok(style) = ProgressStyle::with_template("[{wide_bar}] step {pos}/{len}  {elapsed} gone, {eta} to go\n{msg}")
    {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn describe_step(record: &StepRecord, live_bytes: u64) -> String {
    let StepRecord { loss, lr, tokens_per_second, peak_bytes, .. } = *record;
    let (now, peak) = (ByteSize(live_bytes), ByteSize(peak_bytes));
    let norm = match (record.grad_norm, record.loss_scale) {
        (Some(norm), _) => format!("grad norm {norm:.4}"),
        (None, scale) => format!("skipped: gradients overflow at loss scale {}", scale.unwrap_or(1.0)),
    };
    format!("loss {loss:.4}  lr {lr:.3e}  {norm}  {tokens_per_second:.0} tokens/s  memory {now}, peak {peak}")
}

/// What the run will hold, and the policy that was chosen for that.
fn describe_fitted(fitted: &Fitted) -> String {
    let (peak, budget) = (ByteSize(fitted.plan.usage.total_peak_bytes()), ByteSize(fitted.budget_bytes));
    let mut line = format!("memory: {peak} planned, {budget} allowed");
    if fitted.is_chosen {
        line += &format!("; checkpointing {} chosen", fitted.checkpointing);
    }
    line
}

/// The first example, indented, with what is learnt in brackets.
fn describe_sample(sample: &Sample) -> String {
    let mut text = String::new();
    for piece in &sample.pieces {
        text += &if piece.is_trained { format!("[[{}]]", piece.text) } else { piece.text.clone() };
    }
    if sample.is_cut {
        text += " ..";
    }
    let mut shown = "first example, [[learnt]]:".to_owned();
    for line in text.lines() {
        // Data must not move the cursor or change colours.
        let line: String = line.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect();
        shown += "\n    ";
        shown += &line;
    }
    shown
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex, PoisonError},
    };

    use indicatif::TermLike;
    use unsloth_rs::{device, llm::dataset::Report};

    use super::*;

    /// Keeps what is drawn.
    #[derive(Clone, Debug, Default)]
    struct Recorder(Arc<Mutex<String>>);

    impl Recorder {
        fn add(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
            Ok(())
        }
    }

    impl TermLike for Recorder {
        fn width(&self) -> u16 {
            120
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, line: &str) -> io::Result<()> {
            self.add(&format!("{line}\n"))
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.add(text)
        }
        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn record(step: usize) -> StepRecord {
        let (tokens_per_second, peak_bytes) = (1234.5, 5 << 20);
        // The first one overflows.
        let grad_norm = (step > 1).then_some(0.25);
        let loss_scale = Some(65_536.0);
        StepRecord { step, loss: 2.5, lr: 1e-3, grad_norm, loss_scale, tokens: 10, tokens_per_second, peak_bytes }
    }

    #[test]
    fn a_terminal_shows_a_bar_with_every_number() {
        let screen = Recorder::default();
        let mut progress = Progress::new(&device("cpu").unwrap(), false);
        // Every draw is kept: none may be left out because it follows the last one too soon.
        progress.terminal = Some(ProgressDrawTarget::term_like_with_hz(Box::new(screen.clone()), 255));
        progress.event(Event::Prepared(Prepared {
            data: Report::default(),
            eval: None,
            sample: None,
            max_seq_len: 8,
            total_steps: 40,
            num_trained: 1,
            unused_tensors: vec![],
        }));
        for step in 1..=3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            progress.event(Event::Step(record(step)));
        }
        progress.finish();
        let shown = screen.0.lock().unwrap().clone();
        for part in [
            "step 3/40",
            "to go",
            "loss 2.5000",
            "lr 1.000e-3",
            "skipped: gradients overflow at loss scale 65536",
            "grad norm 0.2500",
            "1234 tokens/s",
            "memory 0 B, peak 5.0 MiB",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
    }
}
