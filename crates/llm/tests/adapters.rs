//! Adapters of every kind against PEFT, in f32 on the CPU; `fixtures/adapters/README.md` says what the numbers are.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap fails the test")]

mod common;

use std::{collections::BTreeMap, fs, path::Path};

use common::{F32, Folder, Golden, batch, fixture, load, max_difference, relative_difference, stored};
use half::bf16;
use safetensors::Dtype;
use serde_json::{Map, Value};
use unsloth_core::Device;
use unsloth_llm::{
    adapter::{AdapterConfig, SavedModule},
    decoder::{Decoder, Targets},
    export, peft,
};
use unsloth_train::{
    Batch, Checkpointing, LoraConfig, LoraInit, Model, Schedule, ScheduleKind, StepMetrics, Trainer, TrainerConfig,
};

macro_rules! cases {
    ($($case:ident $model:literal),* $(,)?) => {$(
        mod $case {
            const CASE: super::Case = super::Case { name: stringify!($case), model: $model };
            #[test]
            fn loss_and_gradients() { super::loss_and_gradients(CASE); }
            #[test]
            fn training_curve() { super::training_curve(CASE); }
            #[test]
            fn saved_as_peft_does() { super::saved_as_peft_does(CASE); }
            #[test]
            fn merged_as_peft_does() { super::merged_as_peft_does(CASE); }
            #[test]
            fn checkpointing_is_bitwise_equal() { super::checkpointing_is_bitwise_equal(CASE); }
        }
    )*};
}

cases!(
    patterns "shapes/llama", modules "shapes/qwen3", embedding "shapes/qwen3", head "shapes/llama",
    bias_all "shapes/llama", bias_lora_only "shapes/llama", pissa "shapes/llama", dora "shapes/llama", dora_tied "shapes/qwen3",
    loraplus "shapes/llama",
);

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    model: &'static str,
}

impl Case {
    fn folder(self) -> std::path::PathBuf {
        fixture("adapters").join(self.name)
    }

    fn load(self, device: &Device) -> Decoder {
        let mut decoder = load(device, self.model);
        peft::load(&self.folder(), &mut decoder).unwrap();
        decoder
    }

    fn batch(self, device: &Device) -> Batch {
        batch(device, &Golden::open(self.model).rows())
    }

    /// The numbers of PEFT under a prefix, by name.
    fn numbers(self, prefix: &str) -> BTreeMap<String, Vec<f32>> {
        let values = |bytes: &[u8]| {
            bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect::<Vec<f32>>()
        };
        let all = stored(&self.folder().join("numbers.safetensors"));
        let under = |(name, tensor): (&String, &common::Stored)| {
            Some((name.strip_prefix(prefix)?.to_owned(), values(&tensor.bytes)))
        };
        all.iter().filter_map(under).collect()
    }

    fn number(self, name: &str) -> f32 {
        self.numbers(name)[""][0]
    }
}

fn loss(decoder: &Decoder, batch: &Batch) -> f32 {
    unsloth_train::evaluate(decoder, std::slice::from_ref(batch)).unwrap()
}

/// By the names that PEFT saves, which wraps layers with adapters once more.
fn peft_name(decoder: &Decoder, name: &str) -> String {
    let is_adapted = |layer: &str| decoder.linears().any(|linear| linear.name == layer && linear.adapter.is_some());
    match name.strip_suffix(".bias") {
        Some(layer) if is_adapted(layer) => format!("{layer}.base_layer.bias"),
        _ => name.to_owned(),
    }
}

fn gradients(decoder: &Decoder, batch: &Batch) -> BTreeMap<String, Vec<f32>> {
    let (_, gradients) = common::gradients(decoder, batch);
    gradients.into_iter().map(|(name, gradient)| (peft_name(decoder, &name), gradient)).collect()
}

fn compare(actual: &BTreeMap<String, Vec<f32>>, expected: &BTreeMap<String, Vec<f32>>, limit_of: impl Fn(&str) -> f32) {
    assert!(actual.keys().eq(expected.keys()), "{:?}, expected {:?}", actual.keys(), expected.keys());
    for (name, actual) in actual {
        let difference = relative_difference(actual, &expected[name]);
        assert!(difference <= limit_of(name), "{name}: max|difference| / max|value| = {difference}");
    }
}

fn loss_and_gradients(case: Case) {
    let device = unsloth_cpu::device();
    let (decoder, batch) = (case.load(&device), case.batch(&device));
    let (loss, expected) = (loss(&decoder, &batch), case.number("loss"));
    assert!((loss - expected).abs() <= 1e-5, "loss {loss}, expected {expected}");
    compare(&gradients(&decoder, &batch), &case.numbers("grad."), |_| 1e-4);
}

fn training_curve(case: Case) {
    let device = unsloth_cpu::device();
    let trainer = trained(case, &device);
    let model = trainer.model();
    let value = |parameter: &unsloth_autograd::Parameter| parameter.value().to_vec().unwrap();
    let values: BTreeMap<String, Vec<f32>> =
        model.parameters().iter().map(|p| (peft_name(model, p.name()), value(p))).collect();
    // A bias of all keys shifts the scores of a row nearly alike: of its small gradient, which AdamW makes a whole step of, more is
    // rounding.
    let limit_of = |name: &str| if name.contains("k_proj") && name.ends_with(".bias") { 1e-2 } else { 1e-3 };
    compare(&values, &case.numbers("final."), limit_of);
}

/// The trainer after the steps that PEFT's model took.
fn trained(case: Case, device: &Device) -> Trainer<Decoder> {
    let expected = &case.numbers("train_losses")[""];
    let (kind, total_steps) = (ScheduleKind::Constant, expected.len());
    let schedule = Schedule { kind, learning_rate: 1e-2, total_steps, ..Schedule::default() };
    let loraplus_lr_ratio = (case.name == "loraplus").then_some(8.0);
    let config = TrainerConfig { schedule, loraplus_lr_ratio, ..TrainerConfig::default() };
    let mut trainer = Trainer::new(case.load(device), config).unwrap();
    let mut metrics: Vec<StepMetrics> = Vec::new();
    for _ in expected {
        metrics.extend(trainer.step(&[case.batch(device)]).unwrap());
    }
    metrics.extend(trainer.finish().unwrap());
    let losses: Vec<f32> = metrics.iter().map(|metrics| metrics.loss).collect();
    let difference = max_difference(&losses, expected);
    assert!(difference <= 1e-4, "losses differ by {difference}: {losses:?}");
    trainer
}

fn saved_as_peft_does(case: Case) {
    let device = unsloth_cpu::device();
    let (output, batch) = (tempfile::tempdir().unwrap(), case.batch(&device));
    let decoder = case.load(&device);
    peft::save(output.path(), &decoder).unwrap();
    let (written, expected) = (tensors(output.path()), tensors(&case.folder()));
    assert!(written.keys().eq(expected.keys()), "{:?}", written.keys());
    assert!(written == expected, "the tensors are those that were read");
    let (written, mut expected) = (settings(output.path()), settings(&case.folder()));
    let names = expected["target_modules"].as_array_mut().unwrap();
    names.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
    for (field, value) in written.iter().filter(|(field, _)| *field != "base_model_name_or_path") {
        assert_eq!(Some(value), expected.get(field), "{field}");
    }

    // What has been trained computes the same when it is loaded again, onto a base that knows nothing of it.
    peft::save(output.path(), trained(case, &device).model()).unwrap();
    let mut again = load(&device, case.model);
    peft::load(output.path(), &mut again).unwrap();
    let (loss, expected) = (loss(&again, &batch), case.number("final_loss"));
    assert!((loss - expected).abs() <= 1e-4, "loss {loss}, expected {expected}");
}

/// In f32: the model's own bf16 would round what is merged, which PEFT's number does not.
fn merged_as_peft_does(case: Case) {
    let device = unsloth_cpu::device();
    let (base, output) = (Folder::copy(case.model, "model"), tempfile::tempdir().unwrap());
    base.edit_tensors("model.safetensors", |tensors| {
        for tensor in tensors.values_mut().filter(|tensor| tensor.dtype == Dtype::BF16) {
            let wide = |bytes: &[u8]| bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32().to_le_bytes();
            (tensor.bytes, tensor.dtype) = (tensor.bytes.chunks_exact(2).flat_map(wide).collect(), Dtype::F32);
        }
    });
    // The adapter after training, which PEFT merged.
    let saved = output.path().join("adapter");
    peft::save(&saved, trained(case, &device).model()).unwrap();
    let mut decoder = Decoder::load(base.path(), &device, F32).unwrap();
    peft::load(&saved, &mut decoder).unwrap();
    let merged = output.path().join("merged");
    export::save_merged(&merged, &decoder).unwrap();
    let again = Decoder::load(&merged, &device, F32).unwrap();
    assert_eq!(again.unused_tensors(), [] as [String; 0]);
    let (loss, expected) = (loss(&again, &case.batch(&device)), case.number("merged_loss"));
    assert!((loss - expected).abs() <= 1e-4, "loss {loss}, expected {expected}");
}

/// One model, several adapters, one at a time; without one it is what it was, to the bit.
#[test]
fn adapters_are_switched() {
    let device = unsloth_cpu::device();
    let model = "shapes/llama";
    let batch = batch(&device, &Golden::open(model).rows());
    let mut decoder = load(&device, model);
    let plain = loss(&decoder, &batch);
    let mut sets = Vec::new();
    for name in ["patterns", "bias_all", "pissa", "head", "dora"] {
        let case = Case { name, model };
        peft::load(&case.folder(), &mut decoder).unwrap();
        let adapted = loss(&decoder, &batch);
        assert!((adapted - case.number("loss")).abs() <= 1e-5, "{name}: {adapted}");
        sets.push((adapted, decoder.take_adapters().unwrap()));
        assert_eq!(loss(&decoder, &batch), plain, "{name}");
        assert!(decoder.adapters().is_none() && decoder.parameters().is_empty());
    }
    assert!(decoder.take_adapters().is_none());
    for (adapted, set) in sets {
        let config = set.config().clone();
        decoder.put_adapters(set).unwrap();
        assert_eq!((loss(&decoder, &batch), decoder.adapters()), (adapted, Some(&config)));
        // What is merged is the set that is on, whatever was on before; the base stays as it is.
        let merged = tempfile::tempdir().unwrap();
        export::save_merged(merged.path(), &decoder).unwrap();
        let merged = loss(&Decoder::load(merged.path(), &device, F32).unwrap(), &batch);
        // The weights' type rounds what is merged; an adapter of principal parts changes nothing before it is trained.
        let rounding = 0.05 * (adapted - plain).abs() + 1e-4;
        assert!((merged - adapted).abs() <= rounding, "{merged}, {adapted}, {plain} without");
        let set = decoder.take_adapters().unwrap();
        assert_eq!(loss(&decoder, &batch), plain);
        let refused = load(&device, model).put_adapters(set).unwrap_err().to_string();
        assert_eq!(refused, "adapters = of another model, must be taken off this model");
    }
}

fn tensors(folder: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let all = stored(&folder.join("adapter_model.safetensors"));
    all.into_iter().map(|(name, tensor)| (name, (tensor.shape, tensor.bytes))).collect()
}

fn settings(folder: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
}

fn checkpointing_is_bitwise_equal(case: Case) {
    let device = unsloth_cpu::device();
    let (mut decoder, batch) = (case.load(&device), case.batch(&device));
    let bits = |decoder: &Decoder| -> Vec<Vec<u32>> {
        gradients(decoder, &batch).into_values().map(|values| values.into_iter().map(f32::to_bits).collect()).collect()
    };
    let kept = bits(&decoder);
    decoder.set_checkpointing(Checkpointing::Every(1)).unwrap();
    assert_eq!(bits(&decoder), kept);
}

/// What PEFT found with LAPACK: the same products, if not the same signs.
#[test]
fn principal_parts_are_those_of_peft() {
    let device = unsloth_cpu::device();
    let case = Case { name: "pissa", model: "shapes/llama" };
    let peft = case.load(&device);
    let mut decoder = load(&device, case.model);
    let config = peft.adapters().unwrap().clone();
    decoder.add_adapters(&config, 0).unwrap();
    for (own, theirs) in decoder.linears().zip(peft.linears()) {
        let (Some(own), Some(theirs)) = (&own.adapter, &theirs.adapter) else {
            assert!(own.adapter.is_none() && theirs.adapter.is_none());
            continue;
        };
        assert_eq!(own.config, theirs.config);
        let difference = relative_difference(&product(own), &product(theirs));
        assert!(difference <= 1e-5, "{}: {difference}", own.lora_a.name());
    }
    let batch = case.batch(&device);
    let difference = (loss(&decoder, &batch) - loss(&load(&device, case.model), &batch)).abs();
    assert!(difference <= 1e-5, "what the adapters have, the weights lack: {difference}");
    let difference = (loss(&decoder, &batch) - loss(&peft, &batch)).abs();
    assert!(difference <= 1e-5, "{difference}");
}

/// `B A`
fn product(adapter: &unsloth_train::Adapter) -> Vec<f32> {
    let values = |parameter: &unsloth_autograd::Parameter| parameter.value().to_vec::<f32>().unwrap();
    let (a, b, rank) = (values(&adapter.lora_a), values(&adapter.lora_b), adapter.config.rank);
    let columns = a.len() / rank;
    let element = |row: &[f32], column: usize| row.iter().zip(0..).map(|(b, r)| b * a[r * columns + column]).sum();
    b.chunks_exact(rank).flat_map(|row| (0..columns).map(move |column| element(row, column))).collect()
}

#[test]
fn approximate_principal_parts_are_found_again() {
    let device = unsloth_cpu::device();
    let init = LoraInit::Pissa { num_iterations: Some(1) };
    let config = AdapterConfig::new(LoraConfig { init, ..LoraConfig::new(3, 4.0) }, Targets::AllLinear);
    let mut decoder = load(&device, "shapes/llama");
    decoder.add_adapters(&config, 5).unwrap();
    let output = tempfile::tempdir().unwrap();
    peft::save(output.path(), &decoder).unwrap();
    assert_eq!(settings(output.path())["init_lora_weights"], "pissa_niter_1");
    let mut again = load(&device, "shapes/llama");
    assert_eq!(peft::load(output.path(), &mut again).unwrap().lora, config.lora);
    let batch = batch(&device, &Golden::open("shapes/llama").rows());
    assert_eq!(loss(&again, &batch), loss(&decoder, &batch));
}

#[test]
fn gaussian_matrices_have_the_deviation_of_peft() {
    let device = unsloth_cpu::device();
    let lora = LoraConfig { init: LoraInit::Gaussian, ..LoraConfig::new(16, 4.0) };
    let mut decoder = load(&device, "tiny-llama");
    decoder.add_adapters(&AdapterConfig::new(lora, Targets::AllLinear), 5).unwrap();
    let mut all: Vec<f64> = Vec::new();
    for adapter in decoder.linears().filter_map(|linear| linear.adapter.as_ref()) {
        all.extend(adapter.lora_a.value().to_vec::<f32>().unwrap().into_iter().map(f64::from));
        assert!(adapter.lora_b.value().to_vec::<f32>().unwrap().iter().all(|value| *value == 0.0));
    }
    let variance = all.iter().map(|value| value * value).sum::<f64>() / all.len() as f64;
    // The variance of the square of a normal number is twice the square of its variance: four standard errors.
    let (expected, limit) = (1.0 / 256.0, 4.0 * (2.0 / all.len() as f64).sqrt());
    assert!((variance / expected - 1.0).abs() <= limit, "{variance}, expected {expected}");
    let output = tempfile::tempdir().unwrap();
    peft::save(output.path(), &decoder).unwrap();
    assert_eq!(settings(output.path())["init_lora_weights"], "gaussian");
}

/// A tied head stays what it was when the table is trained, and the other way round.
#[test]
fn a_tied_model_is_untied_where_one_side_is_trained() {
    let device = unsloth_cpu::device();
    let config = |modules: &[SavedModule]| AdapterConfig {
        modules_to_save: modules.to_vec(),
        ..AdapterConfig::new(LoraConfig::new(2, 4.0), "q_proj".parse().unwrap())
    };
    for modules in [&[SavedModule::Embedding][..], &[SavedModule::Head], &SavedModule::ALL] {
        let mut decoder = load(&device, "shapes/qwen3");
        decoder.add_adapters(&config(modules), 0).unwrap();
        let parameters = decoder.parameters();
        let whole: Vec<&str> = parameters.iter().map(|p| p.name()).filter(|name| !name.contains("lora")).collect();
        assert_eq!(whole, modules.iter().map(|module| module.parameter()).collect::<Vec<_>>());
    }
}
