//! Loss curves of the quickstart's fine-tuning in every precision.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{path::Path, sync::atomic::AtomicBool};

use unsloth_rs::{
    DType, device,
    recipe::{
        Event, RunLength, TrainConfig, Warmup,
        quickstart::{QuickstartConfig, Size, quickstart},
        train,
    },
    train::{AdamWConfig, ScheduleKind},
};

const STEPS: usize = 200;
/// Losses of single steps depend on their few questions; curves are means over as many steps.
const WINDOW: usize = 20;

/// Losses of fine-tuning the quickstart's model on its questions, with its settings but for the length.
fn losses(quickstart: &Path, dtype: DType) -> Vec<f64> {
    let (model, data) = (quickstart.join("model"), quickstart.join("data/questions.jsonl"));
    let config = TrainConfig {
        dtype,
        length: RunLength::Steps(STEPS),
        batch_size: 4,
        learning_rate: 2e-3,
        schedule: ScheduleKind::Linear,
        warmup: Warmup::Ratio(0.05),
        optimizer: AdamWConfig { beta2: 0.95, ..AdamWConfig::default() }.into(),
        max_seq_len: Some(256),
        ..TrainConfig::new(model, vec![data], quickstart.join(dtype.name()))
    };
    let mut losses = Vec::new();
    let mut on_event = |event| {
        if let Event::Step(record) = event {
            losses.push(f64::from(record.loss));
        }
    };
    train(&device("cpu").unwrap(), &config, &mut on_event, &AtomicBool::new(false)).unwrap();
    losses
}

fn means(losses: &[f64]) -> Vec<f64> {
    losses.chunks(WINDOW).map(|window| window.iter().sum::<f64>() / window.len() as f64).collect()
}

#[test]
#[ignore = "full: minutes of two idle cores"]
fn bf16_and_f16_learn_as_f32() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("quickstart");
    // Half of the stories, and as few questions as a fine-tuning may have: it is made anew below.
    let size = Size { num_stories: 2800, num_lessons: 800, num_held_out: 10, ..Size::FULL };
    let config = QuickstartConfig { size, ..QuickstartConfig::new(output.clone()) };
    quickstart(&device("cpu").unwrap(), &config, &mut |_| ()).unwrap();
    let expected = means(&losses(&output, DType::F32));
    println!("f32 {expected:.4?}");
    assert!(expected[STEPS / WINDOW - 1] < 0.7 * expected[0], "{expected:?}");
    for dtype in [DType::BF16, DType::F16] {
        let actual = means(&losses(&output, dtype));
        let difference = |(actual, expected): (&f64, &f64)| (actual - expected).abs() / expected;
        let largest = actual.iter().zip(&expected).map(difference).fold(0.0, f64::max);
        println!("{dtype} {actual:.4?}, at most {:.3}% from f32", 100.0 * largest);
        for (window, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
            let steps = format!("steps {} to {}", window * WINDOW + 1, (window + 1) * WINDOW);
            assert!((actual - expected).abs() <= 0.02 * expected, "{dtype}, {steps}: {actual} instead of {expected}");
        }
    }
}
