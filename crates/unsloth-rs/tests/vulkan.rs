//! Training on the first Vulkan device, through the facade.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::Path;

use unsloth_rs::{
    DType, device,
    llm::{
        adapter::AdapterConfig,
        decoder::{Decoder, LoadOptions, Targets},
    },
    train::{Batch, Document, LoraConfig, Schedule, ScheduleKind, Trainer, TrainerConfig},
};

/// A step leaves the device alone; its loss and its state are read while the next one is under way, and nothing else ever is.
#[test]
fn the_host_reads_two_tensors_a_step_and_one_step_late() {
    let device = device("vulkan:0").unwrap();
    println!("running on {}", device.name());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/tests/fixtures/tiny-llama/model");
    let mut model = Decoder::load(&folder, &device, LoadOptions::frozen(DType::F32)).unwrap();
    let lora = LoraConfig { dropout: 0.1, ..LoraConfig::new(4, 8.0) };
    model.add_adapters(&AdapterConfig::new(lora, Targets::AllLinear), 0).unwrap();
    let (kind, total_steps) = (ScheduleKind::Constant, 4);
    let schedule = Schedule { kind, learning_rate: 1e-3, total_steps, ..Schedule::default() };
    let config = TrainerConfig { schedule, ..TrainerConfig::default() };
    let mut trainer = Trainer::new(model, config).unwrap();
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
