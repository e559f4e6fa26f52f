//! Dropout of adapters in training: what it depends on, what it means on average, and where it is off.

use unsloth_autograd::{Matrix, Tape, Var};
use unsloth_core::{Category, Device};
use unsloth_train::{
    Batch, Document, Draw, DrawRows, Linear, LoraConfig, Model, StepMetrics, Trainer, TrainerConfig, evaluate,
};

use crate::model::{TINY, TinyModel, constant, micro_batches};

const DROPOUT: f32 = 0.4;

/// Gradients of the first step, split into micro-batches of `size` documents.
fn first_step(size: usize, dropout: f32) -> Vec<f32> {
    let device = unsloth_cpu::device();
    let model = TinyModel::new(&device, TINY).with_dropout(dropout);
    let mut trainer = Trainer::new(model, constant(1e-2)).unwrap();
    trainer.step(&micro_batches(&device, 0, size)).unwrap();
    trainer.finish().unwrap();
    let parameters = trainer.model().parameters();
    let gradient = |parameter| trainer.gradients().get(parameter).unwrap().to_vec::<f32>().unwrap();
    parameters.iter().flat_map(gradient).collect()
}

#[test]
fn micro_batches_drop_what_one_batch_drops() {
    let whole = first_step(4, DROPOUT);
    let largest = whole.iter().fold(0.0f32, |largest, g| largest.max(g.abs()));
    for size in [1, 2, 3] {
        for (split, whole) in first_step(size, DROPOUT).iter().zip(&whole) {
            // Sums of a dozen terms in another order.
            assert!((split - whole).abs() <= 8.0 * f32::EPSILON * largest, "{size}: {split} instead of {whole}");
        }
    }
    assert!(first_step(4, 0.0).iter().zip(&whole).any(|(a, b)| (a - b).abs() > 1e-2 * largest), "something is dropped");
}

/// Losses of steps on one batch at a rate of 0, so that nothing but what is dropped differs.
fn losses(seed: u64, dropout: f32) -> Vec<f32> {
    let device = unsloth_cpu::device();
    let config = TrainerConfig { seed, ..constant(0.0) };
    let mut trainer = Trainer::new(TinyModel::new(&device, TINY).with_dropout(dropout), config).unwrap();
    let mut metrics: Vec<StepMetrics> = Vec::new();
    for _ in 0..6 {
        metrics.extend(trainer.step(&micro_batches(&device, 0, 2)).unwrap());
    }
    metrics.extend(trainer.finish().unwrap());
    metrics.iter().map(|metrics| metrics.loss).collect()
}

#[test]
fn steps_and_seeds_drop_differently_and_runs_alike() {
    let first = losses(1, DROPOUT);
    for (i, loss) in first.iter().enumerate() {
        assert!(!first[..i].contains(loss), "step {i} drops what another one does: {first:?}");
    }
    assert_eq!(losses(1, DROPOUT), first);
    assert!(losses(2, DROPOUT).iter().zip(&first).all(|(a, b)| a != b), "another seed");
    let off = losses(1, 0.0);
    assert!(off.iter().all(|loss| *loss == off[0]), "{off:?}");
}

#[test]
fn nothing_is_dropped_outside_training() {
    let device = unsloth_cpu::device();
    let batches = micro_batches(&device, 0, 2);
    let loss = |dropout| evaluate(&TinyModel::new(&device, TINY).with_dropout(dropout), &batches).unwrap();
    assert_eq!(loss(DROPOUT), loss(0.0));
}

const WIDTH: usize = 12;

/// A layer that adds what is left of its input to it: identities for the base, `A` and `B`.
fn identity(device: &Device, index: u32) -> Linear {
    let identity: Vec<f32> = (0..WIDTH * WIDTH).map(|i| if i % (WIDTH + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let base = device.from_slice(&identity, [WIDTH, WIDTH], Category::Weights).unwrap();
    let mut layer = Linear::new("layer", Matrix::Frozen(device.prepare_weight(base).unwrap()), None);
    let config = LoraConfig { dropout: DROPOUT, ..LoraConfig::new(WIDTH, WIDTH as f32) };
    layer.add_adapter(&config, 0, index).unwrap();
    let adapter = layer.adapter.as_ref().unwrap();
    for parameter in [&adapter.lora_a, &adapter.lora_b] {
        parameter.update(|value| value.write(&identity)).unwrap();
    }
    layer
}

/// What the layer adds to five rows of ones in two documents, in the draw of a step.
fn update(device: &Device, layer: &Linear, draw: Option<Draw>) -> Vec<f32> {
    let documents = [Document { ids: &[1, 2, 3], targets: &[2, 3, 4] }, Document { ids: &[1, 2], targets: &[2, 3] }];
    let batch = Batch { draw, ..Batch::new(device, &documents).unwrap() };
    let x = Var::constant(device.from_slice(&[1.0f32; 5 * WIDTH], [5, WIDTH], Category::Activations).unwrap());
    let y = layer.forward(&Tape::inference(), &x, DrawRows::new(&batch).unwrap().as_ref()).unwrap();
    y.tensor().to_vec::<f32>().unwrap().into_iter().map(|y| y - 1.0).collect()
}

#[test]
fn the_mean_over_steps_is_the_layer_without_dropout() {
    const STEPS: u32 = 4000;
    let device = unsloth_cpu::device();
    let layer = identity(&device, 3);
    let mut sum = vec![0.0f64; 5 * WIDTH];
    for step in 0..STEPS {
        let values = update(&device, &layer, Some(Draw { seed: 7, step, first_sequence: 0 }));
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(value));
    }
    // An element is 0 or 1 / (1 - p): its variance is p / (1 - p). Five standard errors, for each of 60 elements.
    let limit = 5.0 * (f64::from(DROPOUT) / f64::from(1.0 - DROPOUT) / f64::from(STEPS)).sqrt();
    for (i, sum) in sum.iter().enumerate() {
        let mean = sum / f64::from(STEPS);
        assert!((mean - 1.0).abs() <= limit, "element {i}: {mean}");
    }
    assert!(update(&device, &layer, None).iter().all(|&value| value == 1.0), "without a draw nothing is dropped");
}

#[test]
fn layers_documents_and_steps_drop_differently() {
    let device = unsloth_cpu::device();
    let draw = Draw { seed: 7, step: 0, first_sequence: 0 };
    let base = update(&device, &identity(&device, 0), Some(draw));
    for value in &base {
        assert!(*value == 0.0 || (value - 1.0 / 0.6).abs() < 1e-6, "{value}");
    }
    // The rows of a document differ, and so do those at one position of two documents.
    let rows: Vec<&[f32]> = base.chunks(WIDTH).collect();
    assert!((0..5).all(|i| !rows[..i].contains(&rows[i])), "{rows:?}");
    for (layer, draw) in [
        (1, draw),
        (0, Draw { seed: 8, ..draw }),
        (0, Draw { step: 1, ..draw }),
        (0, Draw { first_sequence: 1, ..draw }),
    ] {
        assert_ne!(update(&device, &identity(&device, layer), Some(draw)), base, "{layer} {draw:?}");
    }
    // The second document of one batch is the first of the next.
    let next = update(&device, &identity(&device, 0), Some(Draw { first_sequence: 1, ..draw }));
    assert_eq!(next[..2 * WIDTH], base[3 * WIDTH..]);
}
