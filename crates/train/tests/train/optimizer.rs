//! What a step does to parameters.

use unsloth_train::{AdamWConfig, Error, Model, Optimizer, Role, Trainer, TrainerConfig};

use crate::model::{ADAMW, TINY, TinyModel, config, constant, documents, micro_batches};

/// A row of the table that the first document of step 0 does not read, so that its gradient is zero.
fn unread_row() -> usize {
    let (read, _) = documents(0).remove(0);
    (0..TINY.vocab_size).find(|&id| !read.contains(&(id as i32))).expect("a document is shorter than the vocabulary")
}

fn row_after(weight_decay: f32, num_steps: usize) -> (Vec<f32>, Vec<f32>) {
    let device = unsloth_cpu::device();
    let base = constant(0.01);
    let config = TrainerConfig { optimizer: AdamWConfig { weight_decay, ..ADAMW }.into(), ..base };
    let mut trainer = Trainer::new(TinyModel::new(&device, TINY), config).unwrap();
    let row = |trainer: &Trainer<TinyModel>| {
        let table = trainer.model().parameter("table").value().to_vec::<f32>().unwrap();
        table[unread_row() * TINY.hidden_size..][..TINY.hidden_size].to_vec()
    };
    let before = row(&trainer);
    for _ in 0..num_steps {
        trainer.step(&micro_batches(&device, 0, 1)[..1]).unwrap();
    }
    trainer.finish().unwrap();
    (before, row(&trainer))
}

#[test]
fn weight_decay_is_decoupled() {
    let (before, after) = row_after(0.5, 3);
    for (before, after) in before.into_iter().zip(after) {
        let expected = f64::from(before) * (1.0f64 - 0.01 * 0.5).powi(3);
        let difference = (f64::from(after) - expected).abs();
        assert!(difference <= 4.0 * f64::from(f32::EPSILON) * expected.abs(), "{after} instead of {expected}");
    }
    let (before, after) = row_after(0.0, 3);
    assert_eq!(before, after, "without decay and gradient nothing moves");
}

#[test]
fn first_step_of_a_warm_up_changes_nothing() {
    let device = unsloth_cpu::device();
    let mut trainer = Trainer::new(TinyModel::new(&device, TINY), config()).unwrap();
    let before = trainer.model().snapshot();
    trainer.step(&micro_batches(&device, 0, 4)).unwrap();
    assert!(trainer.model().snapshot() == before, "the rate of the first step is 0");
    let first = trainer.step(&micro_batches(&device, 1, 4)).unwrap().unwrap();
    assert_eq!(first.learning_rate, 0.0);
    assert!(first.grad_norm > 0.0);
    assert!(trainer.model().snapshot() != before, "the rate of the second step is not");
}

#[test]
fn a_parameter_listed_twice_is_stepped_once() {
    let device = unsloth_cpu::device();
    let model = TinyModel::new(&device, TINY);
    let mut parameters = model.parameters();
    parameters.reverse();
    let distinct = parameters.len();
    parameters.push(model.parameter("norm"));
    let parameters: Vec<_> = parameters.into_iter().map(|parameter| (parameter, Role::Weight)).collect();
    let optimizer = Optimizer::new(&device, &parameters, AdamWConfig::default().into()).unwrap();
    let ids: Vec<_> = optimizer.parameters().map(|parameter| parameter.id()).collect();
    assert_eq!(ids.len(), distinct);
    assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "in the order of ids");
}

#[test]
fn moments_are_those_of_the_first_gradient() {
    let device = unsloth_cpu::device();
    let config = TrainerConfig { max_grad_norm: None, ..constant(0.01) };
    let mut trainer = Trainer::new(TinyModel::new(&device, TINY), config).unwrap();
    trainer.step(&micro_batches(&device, 0, 4)).unwrap();
    trainer.finish().unwrap();
    let head = trainer.model().parameter("head");
    let [m, v] = ["m", "v"].map(|name| trainer.optimizer().part(&head, name).unwrap());
    let (m, v) = (m.to_vec::<f32>().unwrap(), v.to_vec::<f32>().unwrap());
    let gradient = trainer.gradients().get(&head).unwrap().to_vec::<f32>().unwrap();
    assert!(gradient.iter().any(|g| g.abs() > 1e-3));
    for ((g, m), v) in gradient.into_iter().zip(m).zip(v) {
        assert!((m - 0.2 * g).abs() <= 1e-6 * g.abs(), "m = {m} for gradient {g}");
        assert!((v - 0.05 * g * g).abs() <= 1e-6 * g * g, "v = {v} for gradient {g}");
    }
}

#[test]
fn rejects_bad_fields() {
    let device = unsloth_cpu::device();
    let adamw = |config: AdamWConfig| TrainerConfig { optimizer: config.into(), ..crate::model::config() };
    let cases = [
        (adamw(AdamWConfig { beta1: 1.0, ..ADAMW }), "beta1 = 1, must be in [0, 1)"),
        (adamw(AdamWConfig { beta2: -0.1, ..ADAMW }), "beta2 = -0.1, must be in [0, 1)"),
        (adamw(AdamWConfig { eps: 0.0, ..ADAMW }), "eps = 0, must be positive and finite"),
        (adamw(AdamWConfig { weight_decay: f32::NAN, ..ADAMW }), "weight_decay = NaN, must be 0 or more and finite"),
        (TrainerConfig { max_grad_norm: Some(0.0), ..config() }, "max_grad_norm = 0, must be positive and finite"),
    ];
    for (config, expected) in cases {
        let error = Trainer::new(TinyModel::new(&device, TINY), config).err().unwrap();
        assert!(matches!(error, Error::InvalidConfig { .. }));
        assert_eq!(error.to_string(), expected);
    }
}
