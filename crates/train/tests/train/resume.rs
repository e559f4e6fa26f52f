//! A run that goes on from saved state equals one that was never interrupted, bit for bit.

use unsloth_core::{Category, DType, Device, Tensor};
use unsloth_train::{Error, Model, ParameterState, RunState, StepMetrics, Trainer};

use crate::model::{TINY, TinyModel, config, micro_batches};

fn trainer(device: &Device) -> Trainer<TinyModel> {
    Trainer::new(TinyModel::new(device, TINY), config()).unwrap()
}

/// Metrics of these steps, and all that the run holds behind them.
fn run(trainer: &mut Trainer<TinyModel>, steps: std::ops::Range<usize>) -> Vec<StepMetrics> {
    let device = trainer.model().device().clone();
    let mut metrics = Vec::new();
    for step in steps {
        metrics.extend(trainer.step(&micro_batches(&device, step, 2)).unwrap());
    }
    metrics.extend(trainer.finish().unwrap());
    metrics
}

/// Host copies of a trainer's state, as a file would hold them.
type Saved = Vec<(String, [Vec<f32>; 3])>;

fn saved(trainer: &Trainer<TinyModel>) -> Saved {
    let host = |tensor: &Tensor| tensor.to_vec::<f32>().unwrap();
    let state = trainer.state().unwrap().into_iter();
    state.map(|(parameter, s)| (parameter.name().to_owned(), [host(&s.value), host(&s.m), host(&s.v)])).collect()
}

fn bits(saved: &Saved) -> Vec<u32> {
    saved.iter().flat_map(|(_, parts)| parts.iter().flatten().map(|value| value.to_bits())).collect()
}

fn after(num_steps: usize) -> RunState {
    RunState { num_steps, num_skipped: 0, loss_scale: None }
}

fn restored(device: &Device, num_steps: usize, saved: &Saved) -> Trainer<TinyModel> {
    let mut trainer = trainer(device);
    let restore = trainer.restore::<Error>(after(num_steps), |parameter| {
        let (_, parts) = saved.iter().find(|(name, _)| name == parameter.name()).unwrap();
        let [value, m, v] = parts
            .each_ref()
            .map(|part| device.from_slice(part, *parameter.value().shape(), Category::Workspace).unwrap());
        Ok(ParameterState { value, m, v })
    });
    restore.unwrap();
    trainer
}

#[test]
fn a_restored_run_has_the_same_bits() {
    let device = unsloth_cpu::device();
    let mut whole = trainer(&device);
    let expected = run(&mut whole, 0..12);
    for interruption in [1, 5, 11] {
        let mut first = trainer(&device);
        let mut metrics = run(&mut first, 0..interruption);
        let saved_state = saved(&first);
        drop(first);
        let mut second = restored(&device, interruption, &saved_state);
        assert_eq!(second.num_steps(), interruption);
        metrics.extend(run(&mut second, interruption..12));
        assert_eq!(metrics, expected, "after {interruption} steps");
        assert!(bits(&saved(&second)) == bits(&saved(&whole)), "after {interruption} steps");
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
    let _second = restored(&device, 2, &state);
    assert_eq!(live(), expected);
}

#[test]
fn refuses_what_does_not_fit() {
    let device = unsloth_cpu::device();
    let mut first = trainer(&device);
    first.step(&micro_batches(&device, 0, 2)).unwrap();
    assert!(matches!(first.state(), Err(Error::Unread { step: 1 })));
    first.finish().unwrap();
    let message = first.restore::<Error>(after(3), |_| panic!("refused before")).unwrap_err().to_string();
    assert_eq!(message, "trainer = 1 steps on, must be before its first step");

    let own = |device: &Device, shape: unsloth_core::Shape, dtype: DType| {
        device.zeros(shape, dtype, Category::Optimiser).unwrap()
    };
    let elsewhere = unsloth_cpu::device();
    for (part, expected) in
        ["`m` has shape [3], expected", "`v` has dtype bf16, expected f32", "`value` is on cpu"].into_iter().enumerate()
    {
        let error = trainer(&device).restore::<Error>(after(3), |parameter| {
            let shape = *parameter.value().shape();
            let value = own(if part == 2 { &elsewhere } else { &device }, shape, DType::F32);
            let m = own(&device, if part == 0 { [3].into() } else { shape }, DType::F32);
            let v = own(&device, shape, if part == 1 { DType::BF16 } else { DType::F32 });
            Ok(ParameterState { value, m, v })
        });
        let message = error.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}
