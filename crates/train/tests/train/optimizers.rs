//! Each optimiser against its reference, and what 8-bit moments cost and save.

use std::collections::HashMap;

use unsloth_autograd::{GradStore, Matrix, Parameter, Tape, ops};
use unsloth_core::{Category, DType, Device, ops::reduce};
use unsloth_train::{
    AdafactorConfig, AdamWConfig, AdjustLr, LionConfig, LossScaleConfig, LossScaler, Model, MuonConfig, Optimizer,
    OptimizerConfig, OptimizerKind, Rates, Role, SgdConfig, Trainer, TrainerConfig,
};

use crate::model::{ADAMW, Sizes, TinyModel, config, constant, micro_batches};

/// Made by `optimizers.py` in this folder, which explains it.
const REFERENCES: &str = include_str!("optimizers.txt");
const SHAPE: [usize; 2] = [7, 5];
const WIDE: [usize; 2] = [5, 7];

/// The smallest multiple of 64 columns that has moments in 8 bits, and a last block that is not full.
const IN_8_BITS: [usize; 2] = [64, 65];

fn values([rows, columns]: [usize; 2], value: impl Fn(f64) -> f64) -> Vec<f32> {
    (0..rows * columns).map(|i| value(i as f64) as f32).collect()
}

/// Adds to the gradient of a matrix by a backward pass, as there is no other way into a store.
pub(crate) fn add_gradient(store: &mut GradStore, parameter: &Parameter, gradient: &[f32]) {
    let (device, shape) = (parameter.value().device().clone(), *parameter.value().shape());
    let ids: Vec<i32> = (0..shape[0] as i32).collect();
    let ids = device.from_slice(&ids, [shape[0]], Category::Activations).unwrap();
    let gradient = device.from_slice(gradient, shape, Category::Activations).unwrap();
    let tape = Tape::new();
    let rows = ops::embedding(&tape, &Matrix::Trainable(parameter.clone()), &ids, DType::F32).unwrap();
    tape.backward_from(vec![(&rows, gradient)], store).unwrap();
}

/// The matrix behind each of twenty steps.
fn twenty_steps(device: &Device, shape: [usize; 2], config: OptimizerConfig) -> Vec<Vec<f32>> {
    let start = device.from_slice(&values(shape, |i| 0.5 * (0.7 * i + 1.0).sin()), shape, Category::Weights).unwrap();
    let parameter = Parameter::new("matrix", start);
    let mut optimizer = Optimizer::new(device, &[(parameter.clone(), Role::Weight)], config).unwrap();
    let mut store = GradStore::new(std::slice::from_ref(&parameter)).unwrap();
    let mut scaler = LossScaler::new(LossScaleConfig { enabled: false, ..LossScaleConfig::default() }).unwrap();
    let step = |step: usize| {
        let t = step as f64;
        store.zero().unwrap();
        add_gradient(&mut store, &parameter, &values(shape, |i| (1.3 * i + 0.9 * t).sin() + 0.3 * (0.4 * i * t).cos()));
        let norm = reduce::grad_norm(&store.tensors()).unwrap();
        let take = |unscaled| {
            optimizer.control(unscaled, (&norm, &[&norm]), None)?;
            optimizer.step(&store, Rates::same((0.05 * (1.0 - t / 40.0)) as f32), step as u32)
        };
        scaler.step(0, &[], take).unwrap();
        parameter.value().to_vec::<f32>().unwrap()
    };
    (0..20).map(step).collect()
}

fn check(name: &str, config: OptimizerConfig) {
    // Twenty steps in f32 against twenty in f64.
    check_within(2e-6, (name, SHAPE), config);
}

/// Differences of so much of the largest element, or less.
fn check_within(tolerance: f64, (name, shape): (&str, [usize; 2]), config: OptimizerConfig) {
    let actual = twenty_steps(&unsloth_cpu::device(), shape, config);
    let mut num_checked = 0;
    for line in REFERENCES.lines() {
        let mut fields = line.split(' ');
        if fields.next() != Some(name) {
            continue;
        }
        let step: usize = fields.next().unwrap().parse().unwrap();
        let expected: Vec<f64> = fields.map(|field| field.parse().unwrap()).collect();
        let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        assert!(!expected.is_empty() && actual[step - 1].len().is_multiple_of(expected.len()), "{name}");
        let stride = actual[step - 1].len() / expected.len();
        for (actual, expected) in actual[step - 1].iter().step_by(stride).zip(expected) {
            let difference = (f64::from(*actual) - expected).abs();
            assert!(difference <= tolerance * largest, "{name}, step {step}: {actual} instead of {expected}");
        }
        num_checked += 1;
    }
    assert_eq!(num_checked, 4, "{name}");
}

#[test]
fn adamw_as_pytorch() {
    check("adamw", ADAMW.into());
}

#[test]
fn sgd_as_pytorch() {
    let sgd = |momentum, nesterov| OptimizerConfig::Sgd(SgdConfig { momentum, nesterov, weight_decay: 0.1 });
    check("sgd", sgd(0.9, false));
    check("nesterov", sgd(0.9, true));
    check("plain", sgd(0.0, false));
}

#[test]
fn lion_as_its_paper() {
    check("lion", OptimizerConfig::Lion(LionConfig { weight_decay: 0.1, ..LionConfig::default() }));
}

#[test]
fn adafactor_as_transformers_and_pytorch() {
    let adafactor =
        |scale_parameter| OptimizerConfig::Adafactor(AdafactorConfig { scale_parameter, weight_decay: 0.1 });
    check("adafactor", adafactor(false));
    check("adafactor_scaled", adafactor(true));
}

#[test]
fn adamw8bit_as_bitsandbytes_describes_it() {
    check_within(2e-6, ("adamw8bit", IN_8_BITS), OptimizerConfig::AdamW8bit(ADAMW));
}

/// The iteration multiplies what is wrong with small singular values by up to 3.4445^5.
#[test]
fn muon_as_pytorch() {
    let adamw = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
    let muon =
        |adjust_lr, nesterov| OptimizerConfig::Muon(MuonConfig { adjust_lr, nesterov, adamw, ..MuonConfig::default() });
    check_within(2e-5, ("muon", SHAPE), muon(AdjustLr::Original, true));
    check_within(2e-5, ("muon_wide", WIDE), muon(AdjustLr::MatchRmsAdamw, false));
    check_within(2e-5, ("muon_unclamped", WIDE), muon(AdjustLr::SpectralUnclamped, true));
}

/// Table and head have enough elements for moments in 8 bits.
const LARGER: Sizes = Sizes { vocab_size: 96, hidden_size: 64, inner_size: 64, rank: 2 };

/// Losses of 200 steps, and the bytes that the optimiser holds.
fn two_hundred_steps(optimizer: OptimizerConfig) -> (Vec<f64>, u64) {
    let device = unsloth_cpu::device();
    let mut trainer =
        Trainer::new(TinyModel::new(&device, LARGER), TrainerConfig { optimizer, ..constant(2e-3) }).unwrap();
    let mut losses = Vec::new();
    for step in 0..200 {
        losses.extend(trainer.step(&micro_batches(&device, step % 12, 4)).unwrap().map(|m| f64::from(m.loss)));
    }
    losses.extend(trainer.finish().unwrap().map(|m| f64::from(m.loss)));
    (losses, device.usage().live_bytes[Category::Optimiser.index()])
}

#[test]
fn moments_in_8_bits_learn_the_same_in_a_quarter_of_the_memory() {
    let adamw = AdamWConfig::default();
    let (expected, f32_bytes) = two_hundred_steps(OptimizerConfig::AdamW(adamw));
    let (losses, bytes) = two_hundred_steps(OptimizerConfig::AdamW8bit(adamw));
    // Twelve batches take turns.
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&expected[188..]) < 0.7 * mean(&expected[..12]), "{expected:?}");
    assert_ne!(losses, expected);
    for (step, (loss, expected)) in losses.iter().zip(&expected).enumerate() {
        assert!((loss - expected).abs() <= 0.01 * expected, "step {}: {loss} instead of {expected}", step + 1);
    }
    let ratio = f32_bytes as f64 / bytes as f64;
    assert!(ratio >= 3.5, "{f32_bytes} bytes against {bytes}: {ratio}");
}

/// Every optimiser lowers the loss of the same batch.
#[test]
fn all_optimisers_learn() {
    let device = unsloth_cpu::device();
    let rates = HashMap::from([("sgd", 0.05), ("lion", 1e-3), ("muon", 0.02)]);
    for kind in OptimizerKind::ALL {
        let rate = rates.get(&*kind.to_string()).copied().unwrap_or(3e-3);
        let config = TrainerConfig { optimizer: kind.with_defaults(), ..constant(rate) };
        let mut trainer = Trainer::new(TinyModel::new(&device, LARGER), config).unwrap();
        let mut losses = Vec::new();
        for _ in 0..20 {
            losses.extend(trainer.step(&micro_batches(&device, 0, 4)).unwrap().map(|m| m.loss));
        }
        assert!(losses[18] < 0.7 * losses[0], "{kind}: {losses:?}");
        assert_eq!(kind.to_string().parse::<OptimizerKind>().unwrap(), kind);
    }
    let message = "adam".parse::<OptimizerKind>().unwrap_err().to_string();
    assert_eq!(message, "optimizer = adam, must be adamw, adamw8bit, sgd, lion, adafactor or muon");
}

/// Table and head of a model that says which parameters these are.
struct WithEmbeddings(TinyModel);

impl Model for WithEmbeddings {
    fn loss(
        &self,
        tape: &Tape,
        batch: &unsloth_train::Batch,
        loss: unsloth_core::ops::cross_entropy::LossSpec,
    ) -> unsloth_core::Result<unsloth_autograd::Var> {
        self.0.loss(tape, batch, loss)
    }
    fn parameters(&self) -> Vec<Parameter> {
        self.0.parameters()
    }
    fn role(&self, parameter: &Parameter) -> Role {
        if ["table", "head"].contains(&parameter.name()) { Role::Embedding } else { Role::Weight }
    }
    fn device(&self) -> &Device {
        self.0.device()
    }
}

/// With a rate of 0 of their own embeddings stay, while everything else changes; with half the rate they take half the step.
#[test]
fn embeddings_have_their_own_rate() {
    let device = unsloth_cpu::device();
    let sgd = OptimizerConfig::Sgd(SgdConfig { momentum: 0.0, nesterov: false, weight_decay: 0.0 });
    let change = |embedding_learning_rate: Option<f64>, name: &str| {
        let config = TrainerConfig { optimizer: sgd, embedding_learning_rate, ..constant(0.5) };
        let model = WithEmbeddings(TinyModel::new(&device, LARGER));
        let parameter = model.0.parameter(name);
        let before = parameter.value().to_vec::<f32>().unwrap();
        let mut trainer = Trainer::new(model, config).unwrap();
        trainer.step(&micro_batches(&device, 0, 4)).unwrap();
        trainer.finish().unwrap();
        let after = parameter.value().to_vec::<f32>().unwrap();
        after.iter().zip(before).map(|(after, before)| f64::from(*after) - f64::from(before)).collect::<Vec<_>>()
    };
    for name in ["table", "head"] {
        let whole = change(None, name);
        assert!(whole.iter().any(|change| *change != 0.0), "{name}");
        assert!(change(Some(0.0), name).iter().all(|change| *change == 0.0), "{name}");
        for (half, whole) in change(Some(0.25), name).into_iter().zip(whole) {
            // Differences of numbers near a half.
            assert!((2.0 * half - whole).abs() <= 4.0 * f64::from(f32::EPSILON), "{name}: {half} against {whole}");
        }
    }
    assert_eq!(change(Some(0.0), "norm"), change(None, "norm"));
    let config = TrainerConfig { embedding_learning_rate: Some(-1.0), ..config() };
    let message = config.validate().unwrap_err().to_string();
    assert_eq!(message, "embedding_learning_rate = -1, must be 0 or more and finite");
}
