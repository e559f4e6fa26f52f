//! The loss scaler against `torch.amp.GradScaler`, and runs that use one.

use unsloth_autograd::{GradStore, Matrix, Parameter, Tape, Var, ops};
use unsloth_core::{
    Category, DType, Device, Shape, Tensor,
    ops::{cross_entropy::LossSpec, elementwise, reduce},
};
use unsloth_train::{
    AdamWConfig, Batch, Error, LossScaleConfig, LossScaleError, LossScaleState, LossScaler, Model, Optimizer, Rates,
    Role, RunState, StateTensor, StepMetrics, Trainer, TrainerConfig, Unscaled,
};

use crate::model::{TINY, TinyModel, constant, micro_batches};

/// Made by `loss_scale.py` in this folder, which explains it.
const TRACES: &str = include_str!("loss_scale.txt");

fn scalar(device: &Device, value: f32) -> Tensor {
    device.from_slice(&[value], [1], Category::Gradients).unwrap()
}

fn scaler(config: LossScaleConfig) -> LossScaler {
    LossScaler::new(config).unwrap()
}

fn loss_scale(scaler: &mut LossScaler) -> f32 {
    scaler.scale_loss(LossSpec::mean(1)).loss_scale
}

/// One step of a script: the gradients of each optimiser by their letters; returns which of them may move.
fn scripted_step(device: &Device, scaler: &mut LossScaler, kinds: &str) -> Vec<bool> {
    loss_scale(scaler);
    let take = |(optimizer, kind): (usize, char)| {
        let value = match kind {
            'g' => 1.0,
            'i' => f32::INFINITY,
            'n' => f32::NAN,
            other => panic!("{other} is no kind of gradient"),
        };
        let gradient = scalar(device, value);
        let finite = |unscaled: Unscaled| unscaled.finite.unwrap().to_vec::<f32>();
        scaler.step(optimizer, &[&gradient], finite).unwrap() == [1.0]
    };
    let taken = kinds.chars().enumerate().map(take).collect();
    scaler.update().unwrap();
    taken
}

#[test]
fn traces_are_those_of_pytorch() {
    let device = unsloth_cpu::device();
    let (mut traces, mut current, mut taken) = (0, None, [0; 2]);
    for line in TRACES.lines() {
        if let Some(header) = line.strip_prefix("trace ") {
            let fields: Vec<&str> = header.split(' ').collect();
            current = Some(scaler(LossScaleConfig {
                initial_scale: fields[1].parse::<f64>().unwrap() as f32,
                growth_factor: fields[2].parse().unwrap(),
                backoff_factor: fields[3].parse().unwrap(),
                growth_interval: fields[4].parse().unwrap(),
                enabled: true,
            }));
            (traces, taken) = (traces + 1, [0; 2]);
            continue;
        }
        let scaler = current.as_mut().unwrap();
        let (script, expected) = line.split_once(" -> ").unwrap();
        match script.strip_prefix("to ") {
            Some(scale) => {
                loss_scale(scaler);
                scaler.update_to(scale.parse().unwrap()).unwrap();
            }
            None => {
                let (kinds, times) = script.split_once('*').unwrap();
                for _ in 0..times.parse().unwrap() {
                    let moved = scripted_step(&device, scaler, kinds);
                    moved.into_iter().enumerate().for_each(|(optimizer, moved)| taken[optimizer] += usize::from(moved));
                }
            }
        }
        let mut expected = expected.split(' ');
        let state = scaler.state().unwrap();
        assert_eq!(state.scale, expected.next().unwrap().parse::<f64>().unwrap() as f32, "{line}");
        assert_eq!(state.growth_tracker, expected.next().unwrap().parse::<u32>().unwrap(), "{line}");
        for (optimizer, steps) in expected.enumerate() {
            assert_eq!(taken[optimizer], steps.parse::<usize>().unwrap(), "optimiser {optimizer}: {line}");
        }
    }
    assert_eq!(traces, 7);
}

fn refused<T: std::fmt::Debug>(result: unsloth_train::Result<T>) -> LossScaleError {
    match result.unwrap_err() {
        Error::LossScale(error) => error,
        other => panic!("{other} is no error of a loss scaler"),
    }
}

#[test]
fn calls_out_of_turn_are_refused_as_by_pytorch() {
    use LossScaleError as E;
    let device = unsloth_cpu::device();
    let gradient = scalar(&device, 1.0);
    let gradients = [&gradient];
    let nothing = |_: Unscaled| Ok(());
    let mut scaler = scaler(LossScaleConfig::default());
    assert_eq!(refused(scaler.unscale(0, &gradients)), E::NotScaled { call: "unscale" });
    assert_eq!(refused(scaler.step(0, &gradients, nothing)), E::NotScaled { call: "step" });
    assert_eq!(refused(scaler.update()), E::NotScaled { call: "update" });
    assert_eq!(refused(scaler.update_to(1.0)), E::NotScaled { call: "update" });

    loss_scale(&mut scaler);
    assert_eq!(refused(scaler.update()), E::NothingChecked);
    assert_eq!(refused(scaler.step(0, &[], nothing)), E::NothingToCheck { optimizer: 0 });
    scaler.unscale(0, &gradients).unwrap();
    assert_eq!(refused(scaler.unscale(0, &gradients)), E::AlreadyUnscaled { optimizer: 0 });
    scaler.unscale(1, &gradients).unwrap();
    scaler.step(0, &gradients, nothing).unwrap();
    assert_eq!(refused(scaler.unscale(0, &gradients)), E::UnscaledAfterStep { optimizer: 0 });
    assert_eq!(refused(scaler.step(0, &gradients, nothing)), E::AlreadyStepped { optimizer: 0 });
    scaler.step(1, &gradients, nothing).unwrap();
    scaler.update().unwrap();
    assert_eq!(scaler.state().unwrap().growth_tracker, 1);

    // A scale that has been set holds from step to step, as PyTorch's does.
    scaler.unscale(0, &gradients).unwrap();
    scaler.update().unwrap();
    let half = device.zeros([2], DType::F16, Category::Gradients).unwrap();
    assert_eq!(refused(scaler.unscale(3, &[&gradient, &half])), E::HalfGradients { optimizer: 3 });
    assert_eq!(refused(scaler.step(3, &[&half], nothing)), E::HalfGradients { optimizer: 3 });
    let message = Error::from(E::AlreadyUnscaled { optimizer: 2 }).to_string();
    assert_eq!(message, "optimiser 2: unscale has been called since the last update");
}

#[test]
fn fields_out_of_range_are_refused() {
    let good = LossScaleConfig::default();
    for (config, expected) in [
        (LossScaleConfig { growth_factor: 1.0, ..good }, "growth_factor = 1, must be above 1 and finite"),
        (LossScaleConfig { backoff_factor: 1.0, ..good }, "backoff_factor = 1, must be above 0 and below 1"),
        (LossScaleConfig { backoff_factor: f64::NAN, ..good }, "backoff_factor = NaN, must be above 0 and below 1"),
        (LossScaleConfig { initial_scale: 0.0, ..good }, "initial_scale = 0, must be positive and finite"),
        (LossScaleConfig { growth_interval: 0, ..good }, "growth_interval = 0, must be at least 1"),
    ] {
        assert_eq!(LossScaler::new(config).unwrap_err().to_string(), expected);
        let config = TrainerConfig { loss_scale: Some(config), ..constant(0.1) };
        assert_eq!(config.validate().unwrap_err().to_string(), expected);
    }
}

#[test]
fn state_round_trips() {
    let device = unsloth_cpu::device();
    let config = LossScaleConfig { growth_interval: 3, ..LossScaleConfig::default() };
    let mut first = scaler(config);
    for kinds in ["g", "i", "g", "g"] {
        scripted_step(&device, &mut first, kinds);
    }
    let state = first.state().unwrap();
    let expected = LossScaleState {
        scale: 32_768.0,
        growth_factor: 2.0,
        backoff_factor: 0.5,
        growth_interval: 3,
        growth_tracker: 2,
    };
    assert_eq!(state, expected);
    // Factors and interval come from the state too.
    let mut second = scaler(LossScaleConfig { growth_factor: 8.0, ..LossScaleConfig::default() });
    second.load(Some(state)).unwrap();
    assert_eq!(second.scale(), 32_768.0, "before anything has been scaled");
    for kinds in ["g", "n", "g", "g", "g"] {
        scripted_step(&device, &mut first, kinds);
        scripted_step(&device, &mut second, kinds);
        assert_eq!(first.state(), second.state());
    }
    assert_eq!(refused(second.load(None)), LossScaleError::EmptyState);
}

#[test]
fn a_scaler_that_is_not_enabled_does_nothing() {
    let mut scaler = scaler(LossScaleConfig { enabled: false, ..LossScaleConfig::default() });
    assert_eq!((scaler.scale(), loss_scale(&mut scaler)), (1.0, 1.0));
    let device = unsloth_cpu::device();
    let infinite = scalar(&device, f32::INFINITY);
    for _ in 0..2 {
        scaler.unscale(0, &[&infinite]).unwrap();
        scaler
            .step(0, &[], |unscaled| {
                assert!(unscaled.finite.is_none() && unscaled.loss_scale == 1.0);
                Ok(())
            })
            .unwrap();
    }
    scaler.update().unwrap();
    scaler.update_to(7.0).unwrap();
    assert_eq!((scaler.state(), scaler.scale()), (None, 1.0));
    let state = scaler_state();
    scaler.load(Some(state)).unwrap();
    scaler.load(None).unwrap();
    assert_eq!(scaler.scale(), 1.0);
}

fn scaler_state() -> LossScaleState {
    scaler(LossScaleConfig::default()).state().unwrap()
}

/// Of two optimisers the one whose gradients are finite takes its step; the scale shrinks for both.
#[test]
fn optimisers_skip_on_their_own() {
    let device = unsloth_cpu::device();
    let parameter = |name: &str| Parameter::new(name, device.from_slice(&[1.0f32], [1, 1], Category::Weights).unwrap());
    let parameters = [parameter("a"), parameter("b")];
    let config = AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() };
    let mut optimizers =
        parameters.each_ref().map(|p| Optimizer::new(&device, &[(p.clone(), Role::Weight)], config.into()).unwrap());
    let mut stores = parameters.each_ref().map(|p| GradStore::new(std::slice::from_ref(p)).unwrap());
    let mut scaler = scaler(LossScaleConfig::default());
    loss_scale(&mut scaler);
    for (index, value) in [2.0, f32::INFINITY].into_iter().enumerate() {
        set_gradient(&mut stores[index], &parameters[index], value);
        let (optimizer, store) = (&mut optimizers[index], &stores[index]);
        let step = |unscaled: Unscaled| {
            optimizer.control(unscaled, (&reduce::grad_norm(&store.tensors())?, &[]), None)?;
            optimizer.step(store, Rates::same(0.25), 0)
        };
        scaler.step(index, &store.tensors(), step).unwrap();
    }
    scaler.update().unwrap();
    let values = parameters.each_ref().map(|p| p.value().to_vec::<f32>().unwrap()[0]);
    assert!((values[0] - 0.75).abs() < 1e-3 && values[1] == 1.0, "{values:?}");
    assert_eq!(scaler.scale(), 32_768.0);
    // The first moment is that of the gradient without its scale.
    let m = optimizers[0].part(&parameters[0], "m").unwrap().to_vec::<f32>().unwrap();
    assert_eq!(m, [(1.0 - 0.9f32) * (2.0 / 65_536.0)]);
}

/// By a backward pass, as there is no other way into a store.
fn set_gradient(store: &mut GradStore, parameter: &Parameter, value: f32) {
    let device = parameter.value().device().clone();
    let ids = device.from_slice(&[0], [1], Category::Activations).unwrap();
    let gradient = device.from_slice(&[value], [1, 1], Category::Activations).unwrap();
    let tape = Tape::new();
    let row = ops::embedding(&tape, &Matrix::Trainable(parameter.clone()), &ids, DType::F32).unwrap();
    tape.backward_from(vec![(&row, gradient)], store).unwrap();
}

/// Metrics of these steps and the bits of all parameters behind them; micro-batches of `size` documents.
fn run(config: TrainerConfig, size: usize) -> (Vec<StepMetrics>, Vec<u32>) {
    let device = unsloth_cpu::device();
    let mut trainer = Trainer::new(TinyModel::new(&device, TINY), config).unwrap();
    let mut metrics = Vec::new();
    for step in 0..12 {
        metrics.extend(trainer.step(&micro_batches(&device, step, size)).unwrap());
    }
    metrics.extend(trainer.finish().unwrap());
    (metrics, trainer.into_model().snapshot())
}

/// In f32 a power of two scales without rounding: clipping and accumulation give the same bits with it as without.
#[test]
fn a_power_of_two_changes_no_bit_in_f32() {
    for (size, max_grad_norm) in [(4, Some(0.8)), (1, Some(0.8)), (2, None)] {
        let plain = TrainerConfig { max_grad_norm, ..constant(1e-2) };
        let growing = LossScaleConfig { growth_interval: 4, ..LossScaleConfig::default() };
        let (expected, parameters) = run(plain, size);
        let (metrics, scaled) = run(TrainerConfig { loss_scale: Some(growing), ..plain }, size);
        assert!(scaled == parameters, "micro-batches of {size}");
        assert_eq!(
            metrics.iter().map(|m| m.loss_scale).collect::<Vec<_>>()[3..9],
            [65_536.0, 131_072.0, 131_072.0, 131_072.0, 131_072.0, 262_144.0]
        );
        let without_scale: Vec<_> = metrics.into_iter().map(|m| StepMetrics { loss_scale: 1.0, ..m }).collect();
        assert_eq!(without_scale, expected);
    }
}

/// Steps whose gradients overflow leave no trace but a smaller scale: neither in parameters nor in the count of steps that
/// corrects the moments.
#[test]
fn steps_that_overflow_are_skipped() {
    let device = unsloth_cpu::device();
    let huge = LossScaleConfig { initial_scale: 2f32.powi(127), ..LossScaleConfig::default() };
    let train = |loss_scale: Option<LossScaleConfig>, num_steps: usize| {
        // A clip factor over a scale as large would be below the normal numbers, and so rounded.
        let config = TrainerConfig { loss_scale, max_grad_norm: None, ..constant(1e-2) };
        let mut trainer = Trainer::new(Loud(TinyModel::new(&device, TINY)), config).unwrap();
        let mut metrics = Vec::new();
        for _ in 0..num_steps {
            metrics.extend(trainer.step(&micro_batches(&device, 0, 2)).unwrap());
        }
        metrics.extend(trainer.finish().unwrap());
        (metrics, trainer.run_state(), trainer.into_model().0.snapshot())
    };
    let (metrics, state, parameters) = train(Some(huge), 12);
    let skipped = metrics.iter().take_while(|m| m.skipped).count();
    assert!((2..10).contains(&skipped), "{skipped} steps were skipped");
    assert!(metrics[skipped..].iter().all(|m| !m.skipped));
    assert_eq!((state.num_steps, state.num_skipped), (12, skipped));
    assert_eq!(state.loss_scale.unwrap().scale, 2f32.powi(127 - skipped as i32));
    for (index, metrics) in metrics.iter().enumerate() {
        assert_eq!(metrics.loss_scale, 2f32.powi(127 - index.min(skipped) as i32));
        assert_eq!(metrics.grad_norm.is_finite(), !metrics.skipped);
    }
    let (_, _, expected) = train(None, 12 - skipped);
    assert!(parameters == expected);
}

/// The model with 32 times the logits, and so with larger gradients.
struct Loud(TinyModel);

impl Model for Loud {
    fn loss(&self, tape: &Tape, batch: &Batch, loss: LossSpec) -> unsloth_core::Result<Var> {
        self.0.loss(tape, batch, LossSpec { logit_scale: 32.0, ..loss })
    }
    fn parameters(&self) -> Vec<Parameter> {
        self.0.parameters()
    }
    fn device(&self) -> &Device {
        self.0.device()
    }
}

/// An adapter under activations in f16 and a loss that is 2^-24 of what it could be, as the mean over the targets of a large
/// step: what a target adds to the gradient of an activation is below the smallest number in f16.
struct Faint(TinyModel);

impl Model for Faint {
    fn loss(&self, tape: &Tape, batch: &Batch, loss: LossSpec) -> unsloth_core::Result<Var> {
        self.0.loss(tape, batch, LossSpec { num_targets: loss.num_targets << 24, ..loss })
    }
    fn parameters(&self) -> Vec<Parameter> {
        self.0.parameters().into_iter().filter(|parameter| parameter.name().contains("lora")).collect()
    }
    fn device(&self) -> &Device {
        self.0.device()
    }
}

/// Losses of 40 steps over one batch.
fn faint_losses(dtype: DType, loss_scale: Option<LossScaleConfig>) -> Vec<f64> {
    let device = unsloth_cpu::device();
    let adamw = AdamWConfig { eps: 1e-14, weight_decay: 0.0, ..AdamWConfig::default() };
    let config = TrainerConfig { optimizer: adamw.into(), loss_scale, ..constant(1e-2) };
    let mut trainer = Trainer::new(Faint(TinyModel::new(&device, TINY).with_activations(dtype)), config).unwrap();
    let mut metrics = Vec::new();
    for _ in 0..40 {
        metrics.extend(trainer.step(&micro_batches(&device, 0, 2)).unwrap());
    }
    metrics.extend(trainer.finish().unwrap());
    metrics.into_iter().map(|m| f64::from(m.loss) * f64::from(1 << 24)).collect()
}

#[test]
fn gradients_that_vanish_in_f16_need_the_scaler() {
    let stalled = faint_losses(DType::F16, None);
    assert!(stalled.iter().all(|loss| *loss == stalled[0]), "{stalled:?}");
    let trained = faint_losses(DType::F16, Some(LossScaleConfig::default()));
    let expected = faint_losses(DType::F32, None);
    assert!(expected[39] < 0.8 * expected[0], "{expected:?}");
    for (step, (trained, expected)) in trained.iter().zip(&expected).enumerate() {
        // An activation in f16 has 11 bits; forty steps add up what they lose.
        assert!((trained - expected).abs() <= 5e-3 * expected, "step {step}: {trained} instead of {expected}");
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_a_scaled_run() {
    let device = unsloth_cpu::device();
    let config = TrainerConfig { loss_scale: Some(LossScaleConfig::default()), ..constant(1e-2) };
    let mut trainer = Trainer::new(TinyModel::new(&device, TINY), config).unwrap();
    trainer.step(&micro_batches(&device, 0, 2)).unwrap();
    let good = trainer.model().snapshot();
    let poison = |tensor: &mut Tensor| {
        let before = tensor.to_vec::<f32>()?;
        tensor.write(&vec![f32::NAN; before.len()])?;
        Ok(before)
    };
    let norm = trainer.model().parameter("norm");
    let before = norm.update(poison).unwrap();
    trainer.step(&micro_batches(&device, 1, 2)).unwrap();
    norm.update(|tensor| tensor.write(&before)).unwrap();
    let error = trainer.step(&micro_batches(&device, 2, 2)).unwrap_err();
    assert!(matches!(error, Error::NonFinite { step: 2, .. }), "{error}");
    assert!(trainer.model().snapshot() == good);
    assert!(matches!(trainer.finish().unwrap_err(), Error::Stopped { step: 2 }));
}

/// A run in f16 that is interrupted while its scale is still to be found goes on with the same bits.
#[test]
fn a_scaled_run_that_is_restored_has_the_same_bits() {
    let device = unsloth_cpu::device();
    let initial_scale = 2f32.powi(30);
    let loss_scale = Some(LossScaleConfig { initial_scale, growth_interval: 3, ..LossScaleConfig::default() });
    let config = TrainerConfig { loss_scale, ..constant(1e-2) };
    let trainer = || Trainer::new(TinyModel::new(&device, TINY).with_activations(DType::F16), config).unwrap();
    let run = |trainer: &mut Trainer<TinyModel>, steps: std::ops::Range<usize>| {
        let mut metrics = Vec::new();
        for step in steps {
            metrics.extend(trainer.step(&micro_batches(&device, step, 2)).unwrap());
        }
        metrics.extend(trainer.finish().unwrap());
        metrics.into_iter().map(|m| (m.loss.to_bits(), m.loss_scale, m.skipped)).collect::<Vec<_>>()
    };
    let mut whole = trainer();
    let expected = run(&mut whole, 0..30);
    assert!(expected.iter().filter(|step| step.2).count() >= 5, "{expected:?}");
    for interruption in [3, 20] {
        let mut first = trainer();
        let mut metrics = run(&mut first, 0..interruption);
        let (state, tensors) = (first.run_state(), first.state().unwrap());
        let mut second = trainer();
        let copy = |parameter: &Parameter, part: &'static str, _: (Shape, DType)| {
            let own = |saved: &&StateTensor| saved.parameter.name() == parameter.name() && saved.part == part;
            Ok(elementwise::copy(&tensors.iter().find(own).unwrap().tensor()?)?)
        };
        second.restore::<Error>(state, copy).unwrap();
        drop(tensors);
        metrics.extend(run(&mut second, interruption..30));
        assert_eq!(metrics, expected, "after {interruption} steps");
        assert!(second.model().snapshot() == whole.model().snapshot());
        assert_eq!(second.run_state(), whole.run_state());
    }
    let unscaled = RunState { num_steps: 1, num_skipped: 0, loss_scale: None };
    let plain = trainer()
        .restore::<Error>(unscaled, |_, _, (shape, dtype)| Ok(device.zeros(shape, dtype, Category::Workspace)?));
    assert!(matches!(plain.unwrap_err(), Error::LossScale(LossScaleError::EmptyState)));
}
