//! The README's first command, through the facade.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{fs, path::Path};

use unsloth_rs::{
    DType, device,
    recipe::{
        EvalConfig, Event, evaluate,
        quickstart::{QuickstartConfig, QuickstartEvent, QuickstartReport, Size, quickstart},
    },
};

fn run(output: &Path, size: Size) -> (QuickstartReport, Vec<QuickstartEvent>) {
    let config = QuickstartConfig { size, ..QuickstartConfig::new(output.to_owned()) };
    let mut events = Vec::new();
    let report = quickstart(&device("cpu").unwrap(), &config, &mut |event| events.push(event)).unwrap();
    (report, events)
}

fn num_lines(path: &Path) -> usize {
    fs::read_to_string(path).unwrap().lines().count()
}

/// Everything but what takes minutes: that the model learns to read.
#[test]
fn tiny() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("quickstart");
    let (report, events) = run(&output, Size::TINY);

    for file in [
        "report.json",
        "blueprint/config.json",
        "model/model.safetensors",
        "model/config.json",
        "model/generation_config.json",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "model/chat_template.jinja",
        "model/loss.svg",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/tokenizer.json",
        "adapter/loss.svg",
    ] {
        assert!(output.join(file).is_file(), "{file}");
    }
    assert!(!output.join("blueprint/model.safetensors").exists());
    let Size { num_stories, num_lessons, num_held_out, .. } = Size::TINY;
    for (file, count) in [
        ("data/stories.jsonl", num_stories),
        ("data/questions.jsonl", num_lessons),
        ("data/held-out.jsonl", num_held_out),
        ("model/metrics.jsonl", report.pretraining.steps),
        ("adapter/metrics.jsonl", report.fine_tuning.steps),
    ] {
        assert_eq!(num_lines(&output.join(file)), count, "{file}");
    }

    let scratch = report.pretraining;
    // Random weights are no better than guessing, which is ln(400) or 6; how often words come alone brings it below 5.
    assert!(scratch.first_loss > 5.5 && scratch.last_loss < 4.8, "{scratch:?}");
    assert!(report.fine_tuning.last_loss < report.fine_tuning.first_loss - 1.0, "{:?}", report.fine_tuning);
    assert_eq!((report.before.score.total, report.after.score.total), (num_held_out, num_held_out));
    assert!(report.stories.iter().all(|story| story.len() > 40), "{:?}", report.stories);
    assert!(report.peak_bytes > 0 && report.num_weights > 20_000, "{report:?}");

    let kinds: Vec<&str> = events.iter().map(kind).collect();
    assert_eq!(kinds[..2], ["written", "pretraining"]);
    let expected = ["written", "pretraining", "stories", "before", "fine-tuning", "after"];
    let mut order = kinds.clone();
    order.dedup();
    assert_eq!(order, expected);
    let steps = events.iter().filter(|event| matches!(event, QuickstartEvent::Pretraining(Event::Step(_))));
    assert_eq!(steps.count(), report.pretraining.steps);

    // What the other commands do with it.
    let held_out = EvalConfig {
        model: output.join("model"),
        adapter: Some(output.join("adapter")),
        data: vec![output.join("data/held-out.jsonl")],
        train_on: None,
        dtype: DType::F32,
        batch_size: 4,
        max_seq_len: None,
    };
    assert!(evaluate(&device("cpu").unwrap(), &held_out).unwrap().loss < f64::from(report.fine_tuning.first_loss));
}

fn kind(event: &QuickstartEvent) -> &'static str {
    match event {
        QuickstartEvent::Written(_) => "written",
        QuickstartEvent::Pretraining(_) => "pretraining",
        QuickstartEvent::Stories(_) => "stories",
        QuickstartEvent::Before(_) => "before",
        QuickstartEvent::FineTuning(_) => "fine-tuning",
        QuickstartEvent::After(_) => "after",
    }
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let outputs = ["a", "b"].map(|name| folder.path().join(name));
    for output in &outputs {
        run(output, Size { num_stories: 24, num_lessons: 8, num_held_out: 2, ..Size::TINY });
    }
    for file in
        ["data/stories.jsonl", "model/tokenizer.json", "model/model.safetensors", "adapter/adapter_model.safetensors"]
    {
        let [first, second] = outputs.each_ref().map(|output| fs::read(output.join(file)).unwrap());
        assert_eq!(first, second, "{file}");
    }
}

/// The promise of the README.
#[test]
#[ignore = "minutes of two idle cores; cargo test --release -p unsloth-rs --test quickstart -- --ignored --nocapture"]
fn full_in_release() {
    let folder = tempfile::tempdir().unwrap();
    let (report, _) = run(&folder.path().join("quickstart"), Size::FULL);
    println!("{report:#?}");
    let [before, after, majority] = [&report.before.score, &report.after.score, &report.majority].map(|s| s.accuracy());
    assert!(before <= 0.02, "{before}");
    assert!(after >= 0.9, "{after}");
    assert!(majority <= 0.25, "{majority}");
    assert!(report.seconds <= 300.0, "{}", report.seconds);
}
