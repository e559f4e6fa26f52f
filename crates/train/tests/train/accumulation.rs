//! Splits of a batch, and repetition.

use unsloth_train::{Model, StepMetrics, Trainer};

use crate::model::{TINY, TinyModel, constant, micro_batches};

/// Gradients of the first step, in a fixed order, and its metrics.
fn first_step(size: usize) -> (Vec<f32>, StepMetrics) {
    let device = unsloth_cpu::device();
    let mut trainer = Trainer::new(TinyModel::new(&device, TINY), constant(1e-2)).unwrap();
    trainer.step(&micro_batches(&device, 0, size)).unwrap();
    let metrics = trainer.finish().unwrap().unwrap();
    let parameters = trainer.model().parameters();
    let gradient = |parameter| trainer.gradients().get(parameter).unwrap().to_vec::<f32>().unwrap();
    (parameters.iter().flat_map(gradient).collect(), metrics)
}

#[test]
fn micro_batches_equal_one_batch() {
    let (whole, metrics) = first_step(4);
    let largest = whole.iter().fold(0.0f32, |largest, g| largest.max(g.abs()));
    assert!(largest > 0.01, "gradients to compare: {largest}");
    for size in [1, 2, 3] {
        let (split, split_metrics) = first_step(size);
        assert_eq!(split_metrics.num_targets, metrics.num_targets);
        assert_eq!(split_metrics.num_tokens, metrics.num_tokens);
        assert!((split_metrics.loss - metrics.loss).abs() <= 4.0 * f32::EPSILON * metrics.loss);
        assert!((split_metrics.grad_norm - metrics.grad_norm).abs() <= 8.0 * f32::EPSILON * metrics.grad_norm);
        for (split, whole) in split.iter().zip(&whole) {
            // Sums of a dozen terms in another order.
            assert!((split - whole).abs() <= 8.0 * f32::EPSILON * largest, "{split} instead of {whole}");
        }
    }
}

fn run() -> (Vec<u32>, Vec<[u32; 2]>) {
    let device = unsloth_cpu::device();
    let mut trainer = Trainer::new(TinyModel::new(&device, TINY), constant(1e-2)).unwrap();
    let mut metrics = Vec::new();
    for step in 0..5 {
        metrics.extend(trainer.step(&micro_batches(&device, step, 3)).unwrap());
    }
    metrics.extend(trainer.finish().unwrap());
    let bits = metrics.iter().map(|m: &StepMetrics| [m.loss.to_bits(), m.grad_norm.to_bits()]).collect();
    (trainer.into_model().snapshot(), bits)
}

#[test]
fn same_run_same_bits() {
    let first = run();
    assert_eq!(first.1.len(), 5);
    for _ in 0..3 {
        assert!(run() == first);
    }
}
