//! Training on the first Vulkan device, through the facade.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::Path;

use unsloth_rs::{
    Category, DType, Device,
    core::Place,
    device,
    llm::{
        adapter::AdapterConfig,
        decoder::{Decoder, LoadOptions, Targets},
    },
    train::{Batch, Document, LoraConfig, Paging, Schedule, ScheduleKind, StateTensor, Trainer, TrainerConfig},
};

/// A trainer of an adapter on the first Vulkan device, what is kept of earlier gradients in a place of its own.
fn trainer(place: Option<Place>) -> (Device, Trainer<Decoder>) {
    let device = device("vulkan:0").unwrap();
    println!("running on {}", device.name());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/tests/fixtures/tiny-llama/model");
    let mut model = Decoder::load(&folder, &device, LoadOptions::frozen(DType::F32)).unwrap();
    let lora = LoraConfig { dropout: 0.1, ..LoraConfig::new(4, 8.0) };
    model.add_adapters(&AdapterConfig::new(lora, Targets::AllLinear), 0).unwrap();
    let (kind, total_steps) = (ScheduleKind::Constant, 4);
    let schedule = Schedule { kind, learning_rate: 1e-3, total_steps, ..Schedule::default() };
    let config = TrainerConfig { schedule, ..TrainerConfig::default() };
    let paging = place.map(|place| Paging::new(device.store(&place).unwrap()));
    let trainer = Trainer::with_paging(model, config, paging).unwrap();
    (device, trainer)
}

/// A step leaves the device alone; its loss and its state are read while the next one is under way, and nothing else ever is.
#[test]
fn the_host_reads_two_tensors_a_step_and_one_step_late() {
    let (device, mut trainer) = trainer(None);
    let (ids, targets): (Vec<i32>, Vec<i32>) = (0..24).map(|i| (5 + i * 7 % 900, 5 + i * 11 % 900)).unzip();

    let reads = || device.backend().num_reads();
    let before = reads();
    for step in 0..4 {
        let batch = Batch::new(&device, &[Document { ids: &ids, targets: &targets }]).unwrap();
        let metrics = trainer.step(&[batch.clone(), batch]).unwrap();
        assert_eq!(metrics.map(|metrics| metrics.step), (step > 0).then_some(step), "metrics are one step late");
        assert_eq!(reads() - before, 2 * step as u64, "after step {}", step + 1);
    }
    assert_eq!(trainer.finish().unwrap().unwrap().step, 4);
    assert_eq!(reads() - before, 8);
}

/// What an optimiser keeps has the same bits in host memory between steps, and takes nothing of the device's meanwhile.
#[test]
fn moments_wait_in_host_memory() {
    let (ids, targets): (Vec<i32>, Vec<i32>) = (0..24).map(|i| (5 + i * 7 % 900, 5 + i * 11 % 900)).unzip();
    let run = |place: Option<Place>| {
        let (device, mut trainer) = trainer(place);
        let batch = Batch::new(&device, &[Document { ids: &ids, targets: &targets }]).unwrap();
        let mut losses = Vec::new();
        for _ in 0..4 {
            losses.extend(trainer.step(std::slice::from_ref(&batch)).unwrap().map(|metrics| metrics.loss.to_bits()));
        }
        losses.extend(trainer.finish().unwrap().map(|metrics| metrics.loss.to_bits()));
        let kept = device.usage().live_bytes[Category::Optimiser.index()];
        let bytes = |tensor: &StateTensor| tensor.tensor().unwrap().to_bytes().unwrap();
        let state: Vec<_> = trainer.state().unwrap().iter().map(bytes).collect();
        (losses, state, kept, trainer.optimizer().paging().map(|paging| paging.store.usage()))
    };
    let (losses, state, kept, _) = run(None);
    let (losses_elsewhere, state_elsewhere, kept_elsewhere, usage) = run(Some(Place::Host));
    assert_eq!(losses.len(), 4);
    assert!(losses == losses_elsewhere && state == state_elsewhere);
    let usage = usage.unwrap();
    // The scalars of a step stay.
    assert_eq!((kept_elsewhere, usage.live_bytes), (256, kept - 256));
    // Put at the beginning; taken and put again at each of four steps, and once more to be read.
    assert_eq!(6 * usage.taken.bytes, 5 * usage.put.bytes);
}
