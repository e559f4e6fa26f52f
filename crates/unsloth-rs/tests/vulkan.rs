//! Training on the first Vulkan device, through the facade.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::{Path, PathBuf};

use unsloth_rs::{
    Category, DType, Device,
    autograd::{GradStore, Tape},
    core::{
        Place,
        ops::{cross_entropy::LossSpec, linear_cross_entropy},
    },
    cube::{CubeOptions, vulkan},
    device,
    llm::{
        adapter::AdapterConfig,
        decoder::{Decoder, LoadOptions, Targets},
    },
    plan::{PlanBackend, PlanOptions, Target},
    recipe::{
        EvalConfig, evaluate,
        quickstart::{QuickstartConfig, Size, quickstart},
    },
    train::{
        Batch, Checkpointing, Document, LoraConfig, Model, Paging, Schedule, ScheduleKind, StateTensor, Trainer,
        TrainerConfig,
    },
};

/// `tiny-llama` with an adapter that drops a tenth.
fn adapted(device: &Device, dtype: DType) -> Decoder {
    let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/tests/fixtures/tiny-llama/model");
    let mut model = Decoder::load(&folder, device, LoadOptions::frozen(dtype)).unwrap();
    let lora = LoraConfig { dropout: 0.1, ..LoraConfig::new(4, 8.0) };
    model.add_adapters(&AdapterConfig::new(lora, Targets::AllLinear), 0).unwrap();
    model
}

/// Bits of the loss and of every gradient of an adapter.
fn gradient_bits(model: &Decoder, batch: &Batch) -> Vec<Vec<u32>> {
    let parameters = model.parameters();
    let mut store = GradStore::new(&parameters).unwrap();
    let tape = Tape::new();
    let loss = model.loss(&tape, batch, LossSpec::mean(batch.num_targets)).unwrap();
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let mut all = vec![bits(loss.tensor().to_vec().unwrap())];
    tape.backward(&loss, &mut store).unwrap();
    all.extend(parameters.iter().map(|parameter| bits(store.get(parameter).unwrap().to_vec().unwrap())));
    all
}

/// With `B` not zero and with dropout, whole and in tiles, in both types that the driver has.
#[test]
fn gradients_have_the_same_bits_under_every_policy() {
    const POLICIES: [&str; 9] = [
        "every:1",
        "every:2",
        "every:3",
        "sqrt",
        "layers:0",
        "layers:1,2",
        "selective",
        "selective:norm",
        "selective:glu",
    ];
    let device = device("vulkan:0").unwrap();
    let (ids, targets): (Vec<i32>, Vec<i32>) = (0..24).map(|i| (5 + i * 7 % 900, 5 + i * 11 % 900)).unzip();
    let batch = Batch::new(&device, &[Document { ids: &ids, targets: &targets }]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let places = [None, Some(Place::Host), Some(Place::Disk { folder: folder.path().to_owned() })];
    for dtype in [DType::F32, DType::F16] {
        let mut model = adapted(&device, dtype);
        for linear in model.linears() {
            let lora_b = &linear.adapter.as_ref().unwrap().lora_b;
            let values: Vec<f32> = (0..lora_b.value().num_elements()).map(|i| 0.02 * (i as f32).sin()).collect();
            let value = device.from_slice(&values, *lora_b.value().shape(), Category::Adapters).unwrap();
            lora_b
                .update(|old| {
                    *old = value;
                    Ok(())
                })
                .unwrap();
        }
        for (tile, policies) in [(None, &POLICIES[..]), (Some(9), &["every:1", "sqrt", "selective"])] {
            model.set_mlp_tile(tile).unwrap();
            model.set_checkpointing(Checkpointing::None).unwrap();
            model.set_offload(None);
            let kept = gradient_bits(&model, &batch);
            assert!(kept.iter().all(|values| values.iter().any(|&bits| f32::from_bits(bits) != 0.0)));
            for &policy in policies {
                model.set_checkpointing(policy.parse().unwrap()).unwrap();
                for place in &places {
                    let store = place.as_ref().map(|place| device.store(place).unwrap());
                    model.set_offload(store.clone());
                    assert!(gradient_bits(&model, &batch) == kept, "{dtype}, {policy}, {place:?}, tiles of {tile:?}");
                    if let (Some(store), "every:1") = (store, policy) {
                        assert!(store.usage().put.num > 0 && store.usage().live_bytes == 0, "{place:?}");
                    }
                }
            }
        }
    }
}

/// A trainer of an adapter on the first Vulkan device, what is kept of earlier gradients in a place of its own.
fn trainer(place: Option<Place>) -> (Device, Trainer<Decoder>) {
    let device = device("vulkan:0").unwrap();
    println!("running on {}", device.name());
    let model = adapted(&device, DType::F32);
    let (kind, total_steps) = (ScheduleKind::Constant, 4);
    let schedule = Schedule { kind, learning_rate: 1e-3, total_steps, ..Schedule::default() };
    let config = TrainerConfig { schedule, ..TrainerConfig::default() };
    let paging = place.map(|place| Paging::new(device.store(&place).unwrap()));
    let trainer = Trainer::with_paging(model, config, paging).unwrap();
    (device, trainer)
}

/// The README's first command on the device, and what it gives evaluated under the other name that the device has.
#[test]
fn the_quickstart_and_an_evaluation() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("quickstart");
    let size = Size { num_stories: 96, num_lessons: 64, num_held_out: 4, ..Size::TINY };
    let config = QuickstartConfig { size, ..QuickstartConfig::new(output.clone()) };
    let report = quickstart(&device("vulkan:0").unwrap(), &config, &mut |_| ()).unwrap();
    assert!(report.pretraining.last_loss < report.pretraining.first_loss - 0.2, "{:?}", report.pretraining);
    assert!(report.fine_tuning.last_loss < report.fine_tuning.first_loss, "{:?}", report.fine_tuning);
    assert_eq!(report.after.score.total, 4);
    let held_out = EvalConfig {
        model: output.join("model"),
        adapter: Some(output.join("adapter")),
        data: vec![output.join("data/held-out.jsonl")],
        train_on: None,
        dtype: DType::F32,
        batch_size: 4,
        max_seq_len: None,
    };
    let [here, cpu] = ["wgpu", "cpu"].map(|name| evaluate(&device(name).unwrap(), &held_out).unwrap());
    assert_eq!(here.tokens, cpu.tokens);
    assert!((here.loss - cpu.loss).abs() <= 1e-4, "{} and {}", here.loss, cpu.loss);
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

/// How many logits exist at a time depends on the device's memory.
#[test]
fn scratch_of_the_loss_is_as_planned() {
    let taken = |device: &Device, dtypes: (DType, DType), needs_dx: bool| {
        let (x, weight) = ([400, 2], [50_000, 2]);
        let x = device.zeros(x, dtypes.0, Category::Activations).unwrap();
        let weight = device.prepare_weight(device.zeros(weight, dtypes.1, Category::Weights).unwrap()).unwrap();
        let targets = device.from_slice(&[7i32; 400], [400], Category::Activations).unwrap();
        device.backend().reset_peak();
        linear_cross_entropy::forward(&x, &weight, &targets, LossSpec::mean(400), needs_dx, None).unwrap();
        device.usage().total_peak_bytes()
    };
    for memory_bytes in [None, Some(12 << 30), Some(1 << 40)] {
        let device = vulkan(0, CubeOptions { memory_bytes, ..Default::default() }).unwrap();
        let target = Target::of(&device);
        let planned = Device::new(PlanBackend::new(PlanOptions { target, budget_bytes: None }).unwrap());
        for dtypes in [(DType::F32, DType::F16), (DType::F16, DType::F16), (DType::F16, DType::F32)] {
            for needs_dx in [true, false] {
                let (planned, taken) = (taken(&planned, dtypes, needs_dx), taken(&device, dtypes, needs_dx));
                // The loss itself, which a plan enters when scratch is gone.
                let rest = planned.abs_diff(taken);
                assert!(rest <= 256, "{memory_bytes:?}, {dtypes:?}, {needs_dx}: {planned} planned, {taken} taken");
            }
        }
    }
}
