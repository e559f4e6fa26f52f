//! Matrices in bf16 without a master copy: steps that rounding to nearest loses.

use unsloth_autograd::{GradStore, Parameter, Tape, Var};
use unsloth_core::{
    Category, DType, Device, Result,
    ops::{cross_entropy::LossSpec, elementwise, reduce},
};
use unsloth_train::{
    AdamWConfig, Batch, LossScaleConfig, LossScaler, Model, Optimizer, Rates, Role, SgdConfig, Trainer, TrainerConfig,
};

use crate::{
    model::{Sizes, TinyModel, constant, micro_batches},
    optimizers::add_gradient,
};

/// A matrix of ones behind 200 steps of a ten-thousandth against a gradient of 1.
fn stepped(seed: Option<u64>) -> Vec<f32> {
    const SHAPE: [usize; 2] = [64, 64];
    let device = unsloth_cpu::device();
    let ones = device.from_slice(&[1.0f32; 4096], SHAPE, Category::Weights).unwrap();
    let parameter = Parameter::new("matrix", elementwise::cast(&ones, DType::BF16).unwrap());
    let sgd = SgdConfig { momentum: 0.0, nesterov: false, weight_decay: 0.0 };
    let config = unsloth_train::OptimizerConfig::Sgd(sgd);
    let mut optimizer = Optimizer::new(&device, &[(parameter.clone(), Role::Weight)], config).unwrap();
    if let Some(seed) = seed {
        optimizer.round_stochastically(seed).unwrap();
    }
    let mut store = GradStore::new(std::slice::from_ref(&parameter)).unwrap();
    add_gradient(&mut store, &parameter, &[1.0; 4096]);
    let norm = reduce::grad_norm(&store.tensors()).unwrap();
    let mut scaler = LossScaler::new(LossScaleConfig { enabled: false, ..LossScaleConfig::default() }).unwrap();
    for index in 0..200 {
        let take = |unscaled| {
            optimizer.control(unscaled, (&norm, &[&norm]), None)?;
            optimizer.step(&store, Rates::same(1e-4), index)
        };
        scaler.step(0, &[], take).unwrap();
    }
    parameter.value().to_f32_vec().unwrap()
}

#[test]
fn small_steps_add_up_at_random_and_not_to_nearest() {
    // Below 1 the neighbours in bf16 are 1 / 256 apart.
    assert_eq!(stepped(None), [1.0; 4096]);
    let at_random = stepped(Some(3));
    let mean = at_random.iter().map(|value| f64::from(*value)).sum::<f64>() / 4096.0;
    // An element's variance grows by p (1 - p) / 256^2 a step, with p = 256e-4: five deviations of the mean of 4096 after 200.
    let deviation = (200.0 * 0.0256 * (1.0 - 0.0256) / 4096.0f64).sqrt() / 256.0;
    assert!((mean - 0.98).abs() <= 5.0 * deviation, "{mean}");
    assert_ne!(stepped(Some(4)), at_random, "the seed counts");
    assert_eq!(stepped(Some(3)), at_random);
}

/// A model of which table and head are trained.
struct Matrices(TinyModel);

impl Model for Matrices {
    fn loss(&self, tape: &Tape, batch: &Batch, loss: LossSpec) -> Result<Var> {
        self.0.loss(tape, batch, loss)
    }
    fn parameters(&self) -> Vec<Parameter> {
        ["table", "head"].map(|name| self.0.parameter(name)).into()
    }
    fn device(&self) -> &Device {
        self.0.device()
    }
}

/// By how much the mean loss over twelve batches falls in 300 steps.
fn fall(make: impl FnOnce(TinyModel) -> TinyModel, stochastic_rounding: bool) -> f64 {
    const SIZES: Sizes = Sizes { vocab_size: 96, hidden_size: 64, inner_size: 64, rank: 2 };
    let device = unsloth_cpu::device();
    let optimizer = AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() }.into();
    let config = TrainerConfig { optimizer, stochastic_rounding, seed: 5, ..constant(1e-4) };
    let mut trainer = Trainer::new(Matrices(make(TinyModel::new(&device, SIZES))), config).unwrap();
    let mut losses = Vec::new();
    for step in 0..300 {
        losses.extend(trainer.step(&micro_batches(&device, step % 12, 4)).unwrap().map(|m| f64::from(m.loss)));
    }
    losses.extend(trainer.finish().unwrap().map(|m| f64::from(m.loss)));
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    mean(&losses[..12]) - mean(&losses[288..])
}

#[test]
fn a_run_that_stalls_to_nearest_learns_at_random() {
    let in_f32 = fall(|model| model, false);
    let [nearest, random] = [false, true].map(|random| fall(TinyModel::in_bf16, random));
    println!("the loss falls by {in_f32} in f32, by {nearest} rounded to nearest, by {random} at random");
    assert!(in_f32 > 0.5, "{in_f32}");
    assert!(nearest < 0.7 * in_f32, "{nearest} against {in_f32}");
    assert!((random - in_f32).abs() < 0.1 * in_f32, "{random} against {in_f32}");
}
