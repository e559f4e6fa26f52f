//! `unsloth quickstart`

use std::{fmt::Write as _, io::Write as _, path::PathBuf};

use anyhow::{Context, Result};
use unsloth_rs::{
    ByteSize,
    recipe::{
        Event,
        quickstart::{
            Examined, QuickstartConfig, QuickstartEvent, QuickstartReport, Score, Training, Written, quickstart,
        },
    },
};

use crate::{
    args::{DeviceArgs, quoted},
    note,
};

/// Options of `unsloth quickstart`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder for the model, the adapter, the data and the loss curves
    #[arg(long, value_name = "DIR", default_value = "quickstart")]
    output: PathBuf,
    /// Seed of the stories, the weights and the order of the data
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Lines of progress of a training.
const NUM_PROGRESS_LINES: usize = 12;

pub(crate) fn run(args: Args) -> Result<()> {
    let device = args.device.open()?;
    let config = QuickstartConfig { seed: args.seed, ..QuickstartConfig::new(args.output) };
    let mut screen = Screen::default();
    // The first failure to write; a training cannot be interrupted from here.
    let mut shown = Ok(());
    let report = quickstart(&device, &config, &mut |event| {
        if shown.is_ok() {
            shown = print(&screen.text(&event));
        }
    })?;
    shown?;
    print(&summary(&report)?)
}

fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("cannot write to standard output")
}

/// What has to be remembered from one event to the next.
#[derive(Default)]
struct Screen {
    total_steps: usize,
    losses: Vec<f32>,
}

impl Screen {
    fn text(&mut self, event: &QuickstartEvent) -> String {
        match event {
            QuickstartEvent::Written(written) => describe_data(written),
            QuickstartEvent::Pretraining(event) => self.training(event, "A Llama", "weights, from random ones"),
            QuickstartEvent::FineTuning(event) => self.training(event, "A LoRA adapter", "weights"),
            QuickstartEvent::Stories(stories) => {
                let stories = stories.iter().map(|story| wrapped(story)).collect::<Vec<_>>();
                format!("\nStories it tells:\n{}", stories.join("\n"))
            }
            QuickstartEvent::Before(examined) => {
                format!("\nHeld-out questions that it answers: {}\n", percent(&examined.score))
            }
            QuickstartEvent::After(examined) => describe_answers(examined),
        }
    }

    fn training(&mut self, event: &Event, what: &str, of: &str) -> String {
        match event {
            Event::Prepared(prepared) => {
                self.total_steps = prepared.total_steps;
                self.losses.clear();
                let (millions, steps) = (prepared.num_trained as f64 / 1e6, prepared.total_steps);
                format!("\n{what} of {millions:.2} million {of}, {steps} steps:\n")
            }
            Event::Step(record) => {
                self.losses.push(record.loss);
                let (step, total) = (record.step, self.total_steps);
                let every = total.div_ceil(NUM_PROGRESS_LINES).max(1);
                let mut text = String::new();
                if step.is_multiple_of(every) || step == total {
                    note(&format!(
                        "  step {step:>4}/{total}  loss {:.4}  lr {:.2e}  grad norm {:.3}  {:.0} tokens/s  peak {}",
                        record.loss,
                        record.lr,
                        record.grad_norm.unwrap_or(f32::INFINITY),
                        record.tokens_per_second,
                        ByteSize(record.peak_bytes),
                    ));
                }
                if step == total {
                    let first = self.losses[0];
                    text = format!("  loss {} {first:.2} -> {:.2}\n", curve(&self.losses), record.loss);
                }
                text
            }
            _ => String::new(),
        }
    }
}

fn describe_data(written: &Written) -> String {
    let Written { num_stories, num_lessons, num_held_out, vocab_size, sample, majority } = written;
    format!(
        "{num_stories} stories and a tokenizer of {vocab_size} tokens, trained on them. The first one:\n{}\n\
        {num_lessons} chats to learn from, {num_held_out} questions held out, about people that never meet in the other stories.\n\
        Filling in the most frequent words would be right for {}.\n",
        wrapped(sample),
        percent(majority)
    )
}

fn describe_answers(examined: &Examined) -> String {
    let mut text = format!("\nHeld-out questions that it answers now: {}\n", percent(&examined.score));
    for answered in &examined.answered {
        text += &wrapped(&answered.prompt);
        text += &format!("\n    -> {}\n", answered.answer.trim());
    }
    text
}

fn summary(report: &QuickstartReport) -> Result<String> {
    let mut text = String::new();
    let output = report.output.display();
    writeln!(text, "\n{:<26}{:>12}{:>12}", "", "from scratch", "adapter")?;
    let [scratch, adapter] = [&report.pretraining, &report.fine_tuning];
    let mut row = |name: &str, of: &dyn Fn(&Training) -> String| {
        writeln!(text, "{name:<26}{:>12}{:>12}", of(scratch), of(adapter))
    };
    row("tokens", &|training| training.tokens.to_string())?;
    row("tokens/s", &|training| format!("{:.0}", training.tokens_per_second))?;
    row("seconds", &|training| format!("{:.0}", training.seconds))?;
    row("loss", &|training| format!("{:.3}", training.last_loss))?;
    let (before, after) = (report.before.score.accuracy(), report.after.score.accuracy());
    writeln!(text, "{:<26}{:>11.1}%{:>11.1}%", "held-out questions right", 100.0 * before, 100.0 * after)?;
    let (minutes, seconds) = (report.seconds as u64 / 60, report.seconds as u64 % 60);
    writeln!(
        text,
        "\nDone in {minutes} min {seconds} s, peak memory {}. All of it is in {output}.",
        ByteSize(report.peak_bytes)
    )?;
    writeln!(text, "Loss curves: {output}/model/loss.svg, {output}/adapter/loss.svg")?;
    text += "\nTry next:\n";
    let program = std::env::args().next().unwrap_or_else(|| "unsloth".into());
    let question = report.after.answered.first().map_or("Who are you?", |answered| &answered.prompt);
    let commands = [
        format!("generate --model {output}/model --prompt \"Once there was a boy\" --temperature 0.5"),
        format!("generate --model {output}/model --adapter {output}/adapter --chat {}", quoted(question)),
        format!("eval --model {output}/model --adapter {output}/adapter --data {output}/data/held-out.jsonl"),
        format!("train --model {output}/model --data {output}/data/questions.jsonl --output my-adapter"),
    ];
    for command in commands {
        writeln!(text, "  {program} {command}")?;
    }
    Ok(text)
}

fn percent(score: &Score) -> String {
    format!("{} of {} ({:.1}%)", score.right, score.total, 100.0 * score.accuracy())
}

/// Width of the loss curve.
const NUM_COLUMNS: usize = 48;

/// The losses as a row of bars, each a mean over its share of the steps.
fn curve(losses: &[f32]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let columns = losses.len().min(NUM_COLUMNS);
    let mean = |column: usize| {
        let share = &losses[column * losses.len() / columns..(column + 1) * losses.len() / columns];
        share.iter().sum::<f32>() / share.len() as f32
    };
    let means: Vec<f32> = (0..columns).map(mean).collect();
    let (low, high) = means.iter().fold((f32::MAX, f32::MIN), |(low, high), &mean| (low.min(mean), high.max(mean)));
    let height = |mean: f32| ((mean - low) / (high - low).max(1e-6) * 7.0).round() as usize;
    means.into_iter().map(|mean| BARS[height(mean).min(7)]).collect()
}

/// A text in lines that a terminal shows whole, indented.
fn wrapped(text: &str) -> String {
    const WIDTH: usize = 92;
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.len() - 1;
        if !lines[last].is_empty() && lines[last].len() + word.len() >= WIDTH {
            lines.push(word.to_owned());
        } else {
            let separator = if lines[last].is_empty() { "" } else { " " };
            lines[last] += &format!("{separator}{word}");
        }
    }
    lines.iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
