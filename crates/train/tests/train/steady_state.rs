//! Memory from step to step.

use unsloth_core::{Category, Device};
use unsloth_train::{Batch, Document, Trainer};

use crate::model::{Sizes, TinyModel, constant};

/// Activations of `[128, 256]` f32 are large allocations.
const SIZES: Sizes = Sizes { vocab_size: 300, hidden_size: 256, inner_size: 256, rank: 4 };

fn batches(device: &Device) -> Vec<Batch> {
    let ids: Vec<i32> = (0..128).map(|i| i * 7 % 300).collect();
    let targets: Vec<i32> = (0..128).map(|i| i * 11 % 300).collect();
    (0..2).map(|_| Batch::new(device, &[Document { ids: &ids, targets: &targets }]).unwrap()).collect()
}

#[test]
fn later_steps_take_no_fresh_memory() {
    let device = unsloth_cpu::device();
    let batches = batches(&device);
    let mut trainer = Trainer::new(TinyModel::new(&device, SIZES), constant(1e-3)).unwrap();
    let counts = || device.backend().allocation_counts();
    for _ in 0..2 {
        trainer.step(&batches).unwrap();
    }
    let second = counts();
    assert!(second.fresh_large > 0, "the model has large buffers");
    device.backend().reset_peak();
    let live = device.usage().live_bytes;
    for _ in 0..4 {
        trainer.step(&batches).unwrap();
    }
    assert_eq!(counts().fresh_large, second.fresh_large);
    assert!(counts().reused > second.reused, "buffers of a step come from the pool");
    assert_eq!(device.usage().live_bytes, live, "nothing is left behind by a step");
    trainer.finish().unwrap();
}

#[test]
fn state_is_held_under_its_category() {
    let device = unsloth_cpu::device();
    let live = |category: Category| device.usage().live_bytes[category.index()];
    let model = TinyModel::new(&device, SIZES);
    let adapter_bytes = 4 * (SIZES.rank * (SIZES.hidden_size + SIZES.inner_size)) as u64;
    assert_eq!(live(Category::Adapters), adapter_bytes);
    let trainer = Trainer::new(model, constant(1e-3)).unwrap();
    let trained = 2 * SIZES.vocab_size * SIZES.hidden_size + SIZES.inner_size;
    let gradient_bytes = 4 * trained as u64 + adapter_bytes;
    assert_eq!(live(Category::Gradients), gradient_bytes);
    // Two moments, and the scalars of a step, rounded up to 256 bytes.
    assert_eq!(live(Category::Optimiser), 2 * gradient_bytes + 256);
    drop(trainer);
    assert_eq!(device.usage().total_live_bytes(), 0);
}
