//! A run that goes on from saved state equals one that was never interrupted, bit for bit.

use unsloth_core::{Category, DType, Device, Element, Tensor};
use unsloth_train::{
    Error, Model, OptimizerConfig, OptimizerKind, PARAMETER, RunState, SgdConfig, StateTensor, StepMetrics, Trainer,
    TrainerConfig,
};

use crate::model::{Sizes, TINY, TinyModel, config, micro_batches};

/// Table and head have enough elements for moments in 8 bits, the rest has not.
pub(crate) const LARGER: Sizes = Sizes { vocab_size: 96, hidden_size: 64, inner_size: 48, rank: 2 };

fn larger(device: &Device, optimizer: OptimizerConfig) -> Trainer<TinyModel> {
    Trainer::new(TinyModel::new(device, LARGER), TrainerConfig { optimizer, ..config() }).unwrap()
}

fn trainer(device: &Device) -> Trainer<TinyModel> {
    Trainer::new(TinyModel::new(device, TINY), config()).unwrap()
}

/// Metrics of these steps, and all that the run holds behind them.
pub(crate) fn run(trainer: &mut Trainer<TinyModel>, steps: std::ops::Range<usize>) -> Vec<StepMetrics> {
    let device = trainer.model().device().clone();
    let mut metrics = Vec::new();
    for step in steps {
        metrics.extend(trainer.step(&micro_batches(&device, step, 2)).unwrap());
    }
    metrics.extend(trainer.finish().unwrap());
    metrics
}

/// A host copy of a tensor of a trainer's state, as a file would hold it.
#[derive(Clone, PartialEq)]
pub(crate) struct Saved {
    parameter: String,
    part: &'static str,
    dtype: DType,
    bytes: Vec<u8>,
}

pub(crate) fn saved(trainer: &Trainer<TinyModel>) -> Vec<Saved> {
    let host = |state: StateTensor| {
        let (parameter, bytes) = (state.parameter.name().to_owned(), state.tensor().unwrap().to_bytes().unwrap());
        Saved { parameter, part: state.part, dtype: state.dtype(), bytes }
    };
    trainer.state().unwrap().into_iter().map(host).collect()
}

fn after(num_steps: usize) -> RunState {
    RunState { num_steps, num_skipped: 0, loss_scale: None }
}

fn elements<T: Element>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// Puts a trainer where another one was.
fn restore(trainer: &mut Trainer<TinyModel>, num_steps: usize, saved: &[Saved]) {
    let device = trainer.model().device().clone();
    let restored = trainer.restore::<Error>(after(num_steps), |parameter, part, (shape, dtype)| {
        let found = saved.iter().find(|saved| saved.parameter == parameter.name() && saved.part == part).unwrap();
        assert_eq!(found.dtype, dtype, "{part}");
        Ok(match dtype {
            DType::I32 => device.from_slice(&elements::<i32>(&found.bytes), shape, Category::Workspace)?,
            DType::BF16 => device.from_slice(&elements::<half::bf16>(&found.bytes), shape, Category::Workspace)?,
            _ => device.from_slice(&elements::<f32>(&found.bytes), shape, Category::Workspace)?,
        })
    });
    restored.unwrap();
}

#[test]
fn a_restored_run_has_the_same_bits() {
    let device = unsloth_cpu::device();
    let nesterov = OptimizerConfig::Sgd(SgdConfig { nesterov: true, ..SgdConfig::default() });
    let plain = OptimizerConfig::Sgd(SgdConfig { momentum: 0.0, ..SgdConfig::default() });
    let defaults = OptimizerKind::ALL.map(OptimizerKind::with_defaults);
    for optimizer in defaults.into_iter().chain([nesterov, plain]) {
        goes_on(&format!("{optimizer:?}"), || larger(&device, optimizer));
    }
}

/// What is rounded at random depends on the step, not on when the run began.
#[test]
fn a_restored_run_draws_the_same_numbers() {
    let device = unsloth_cpu::device();
    for optimizer in OptimizerKind::ALL.map(OptimizerKind::with_defaults) {
        let config = TrainerConfig { optimizer, stochastic_rounding: true, ..config() };
        let rounded = || Trainer::new(TinyModel::new(&device, LARGER).in_bf16(), config).unwrap();
        goes_on(&format!("{optimizer:?} in bf16"), rounded);
    }
}

/// Twelve steps of a trainer, in one run and in two.
pub(crate) fn goes_on(what: &str, make: impl Fn() -> Trainer<TinyModel>) {
    let mut whole = make();
    let expected = run(&mut whole, 0..12);
    for interruption in [1, 5, 11] {
        let mut first = make();
        let mut metrics = run(&mut first, 0..interruption);
        let state = saved(&first);
        drop(first);
        let mut second = make();
        restore(&mut second, interruption, &state);
        assert_eq!(second.num_steps(), interruption);
        metrics.extend(run(&mut second, interruption..12));
        assert_eq!(metrics, expected, "{what} after {interruption} steps");
        assert!(saved(&second) == saved(&whole), "{what} after {interruption} steps");
    }
}

#[test]
fn restored_tensors_keep_their_category() {
    let device = unsloth_cpu::device();
    let mut first = trainer(&device);
    run(&mut first, 0..2);
    let state = saved(&first);
    let categories = [Category::Optimiser, Category::Weights, Category::Adapters, Category::Gradients];
    let live = || categories.map(|category| device.usage().live_bytes[category.index()]);
    let expected = live();
    drop(first);
    let mut second = trainer(&device);
    restore(&mut second, 2, &state);
    assert_eq!(live(), expected);
}

#[test]
fn refuses_what_does_not_fit() {
    let device = unsloth_cpu::device();
    let mut first = trainer(&device);
    first.step(&micro_batches(&device, 0, 2)).unwrap();
    assert!(matches!(first.state(), Err(Error::Unread { step: 1 })));
    first.finish().unwrap();
    let message = first.restore::<Error>(after(3), |_, _, _| panic!("refused before")).unwrap_err().to_string();
    assert_eq!(message, "trainer = 1 steps on, must be before its first step");
    let skipped = RunState { num_skipped: 4, ..after(3) };
    let message =
        trainer(&device).restore::<Error>(skipped, |_, _, _| panic!("refused before")).unwrap_err().to_string();
    assert_eq!(message, "num_skipped = 4, must be at most the number of steps");

    let elsewhere = unsloth_cpu::device();
    type Spoil<'a> = Box<dyn Fn(&mut Tensor) + 'a>;
    let zeros =
        |device: &Device, shape: unsloth_core::Shape, dtype| device.zeros(shape, dtype, Category::Optimiser).unwrap();
    let cases: [(&str, &str, Spoil<'_>); 3] = [
        ("m", "`m` has shape [3], expected", Box::new(|m| *m = zeros(&device, [3].into(), DType::F32))),
        ("v", "`v` has dtype bf16, expected f32", Box::new(|v| *v = zeros(&device, *v.shape(), DType::BF16))),
        (PARAMETER, "`parameter` is on cpu", Box::new(|value| *value = zeros(&elsewhere, *value.shape(), DType::F32))),
    ];
    for (spoilt, expected, spoil) in cases {
        let error = trainer(&device).restore::<Error>(after(3), |_, part, (shape, dtype)| {
            let mut tensor = zeros(&device, shape, dtype);
            if part == spoilt {
                spoil(&mut tensor);
            }
            Ok(tensor)
        });
        let message = error.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}
