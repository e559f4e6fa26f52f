//! What a run trains: whole models, from a checkpoint and from random weights, and adapters with dropout or a rank-stabilised
//! scale; against transformers and PEFT in f32 on the CPU.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap fails the test")]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use common::{
    F32, Folder, Golden, batch, fixture, gradients, max_difference, relative_difference, stored, under_every_policy,
};
use half::bf16;
use safetensors::{Dtype, SafeTensors};

use unsloth_core::{DType, Device};
use unsloth_llm::{
    Error,
    decoder::{Decoder, LoadOptions},
    export, peft,
};
use unsloth_train::{
    AdamWConfig, Batch, Draw, LoraConfig, Model, Schedule, ScheduleKind, StepMetrics, Trainer, TrainerConfig,
};

/// As in `fixtures/methods/reference.py`.
const STRIDE: usize = 13;
const WHOLE: usize = 1024;

macro_rules! for_each_model {
    ($($test:ident),* $(,)?) => {
        mod tiny_llama { $(#[test] fn $test() { super::$test("tiny-llama"); })* }
        mod tiny_qwen2 { $(#[test] fn $test() { super::$test("tiny-qwen2"); })* }
    };
}

for_each_model!(
    every_gradient,
    training_curve,
    checkpointing_is_bitwise_equal,
    bf16_activations_under_f32_weights,
    saved_model_round_trips,
    random_weights_as_transformers_makes_them,
    rank_stabilised_as_peft,
    checkpointing_drops_the_same,
);

/// Numbers of whole-model training.
fn reference(model: &str) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(fixture("methods").join(format!("{model}.safetensors"))).unwrap();
    let float = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8]| data.chunks_exact(4).map(float).collect();
    tensors.iter().map(|(name, view)| (name.to_owned(), values(view.data()))).collect()
}

fn sample(values: &[f32]) -> Vec<f32> {
    if values.len() <= WHOLE { values.to_vec() } else { values.iter().copied().step_by(STRIDE).collect() }
}

fn trainable(model: &str, device: &Device, dtype: DType) -> Decoder {
    Decoder::load(&fixture(model).join("model"), device, LoadOptions::trainable(dtype)).unwrap()
}

fn values(decoder: &Decoder) -> BTreeMap<String, Vec<f32>> {
    let value = |parameter: &unsloth_autograd::Parameter| parameter.value().to_vec().unwrap();
    decoder.parameters().iter().map(|parameter| (parameter.name().to_owned(), value(parameter))).collect()
}

fn logits(decoder: &Decoder, batch: &Batch) -> Vec<f32> {
    decoder.logits(batch).unwrap()
}

fn every_gradient(model: &str) {
    let (device, golden, reference) = (unsloth_cpu::device(), Golden::open(model), reference(model));
    let decoder = trainable(model, &device, DType::F32);
    let (loss, gradients) = gradients(&decoder, &batch(&device, &golden.rows()));
    assert!((loss - golden.f32("base_loss")[0]).abs() <= 1e-5, "loss {loss}");
    let names = |prefix: &str| reference.keys().filter_map(|name| name.strip_prefix(prefix)).collect::<Vec<_>>();
    assert!(gradients.keys().eq(names("grad.")), "every parameter once, a tied head not at all");
    for (name, gradient) in &gradients {
        let difference = relative_difference(&sample(gradient), &reference[&format!("grad.{name}")]);
        assert!(difference <= 1e-4, "{name}: max|difference| / max|gradient| = {difference}");
        let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let expected = f64::from(reference[&format!("grad_norm.{name}")][0]);
        assert!((norm - expected).abs() <= 1e-4 * expected, "{name}: norm {norm}, expected {expected}");
    }
}

/// Every kind of weight that a family has, in models whose shapes are odd and whose checkpoints are bf16.
fn every_gradient_of_odd_shapes(family: &str) {
    let model = &format!("shapes/{family}");
    let (device, golden) = (unsloth_cpu::device(), Golden::open(model));
    let (_, gradients) = gradients(&trainable(model, &device, DType::F32), &batch(&device, &golden.rows()));
    assert!(gradients.keys().eq(&golden.names("full.")), "every weight once");
    for (name, gradient) in &gradients {
        let difference = relative_difference(gradient, &golden.f32(&format!("full.{name}")));
        assert!(difference <= 1e-4, "{name}: max|difference| / max|gradient| = {difference}");
    }
}

mod odd_shapes {
    macro_rules! families {
        ($($family:ident)*) => {$(
            #[test]
            fn $family() {
                super::every_gradient_of_odd_shapes(stringify!($family));
            }
        )*};
    }
    families!(llama mistral qwen2 qwen3 gemma2 gemma3);
}

fn training_curve(model: &str) {
    let (device, golden, reference) = (unsloth_cpu::device(), Golden::open(model), reference(model));
    let schedule = Schedule {
        kind: ScheduleKind::Cosine,
        learning_rate: 1e-3,
        warmup_steps: 2,
        total_steps: 10,
        ..Schedule::default()
    };
    let adamw = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
    let config = TrainerConfig { optimizer: adamw.into(), schedule, ..TrainerConfig::default() };
    let mut trainer = Trainer::new(trainable(model, &device, DType::F32), config).unwrap();
    let mut metrics: Vec<StepMetrics> = Vec::new();
    for step in 0..10 {
        metrics.extend(trainer.step(&[batch(&device, &golden.train_rows(step))]).unwrap());
    }
    metrics.extend(trainer.finish().unwrap());
    let losses: Vec<f32> = metrics.iter().map(|m| m.loss).collect();
    let difference = max_difference(&losses, &reference["train_losses"]);
    assert!(difference <= 1e-4, "losses differ by {difference}: {losses:?}");
    for (metrics, expected) in metrics.iter().zip(&reference["train_grad_norms"]) {
        let difference = (metrics.grad_norm - expected).abs() / expected;
        assert!(difference <= 1e-4, "step {}: norm {}, expected {expected}", metrics.step, metrics.grad_norm);
    }
    for (name, value) in values(trainer.model()) {
        let difference = relative_difference(&sample(&value), &reference[&format!("final.{name}")]);
        assert!(difference <= 1e-3, "{name}: max|difference| / max|value| = {difference}");
    }
}

fn checkpointing_is_bitwise_equal(model: &str) {
    let (device, golden) = (unsloth_cpu::device(), Golden::open(model));
    let batch = batch(&device, &golden.rows());
    for dtype in [DType::F32, DType::BF16] {
        let mut decoder = trainable(model, &device, dtype);
        let bits = |decoder: &Decoder| -> BTreeMap<String, Vec<u32>> {
            let bits = |(name, values): (String, Vec<f32>)| (name, values.into_iter().map(f32::to_bits).collect());
            gradients(decoder, &batch).1.into_iter().map(bits).collect()
        };
        let kept = bits(&decoder);
        under_every_policy(&mut decoder, |decoder, policy| assert_eq!(bits(decoder), kept, "{dtype}, {policy}"));
    }
}

/// The limits are those that adapted models are held to in bf16 (`golden.rs`): each result is rounded to 8 bits.
fn bf16_activations_under_f32_weights(model: &str) {
    let (device, golden, reference) = (unsloth_cpu::device(), Golden::open(model), reference(model));
    let decoder = trainable(model, &device, DType::BF16);
    assert!(decoder.parameters().iter().all(|parameter| parameter.value().dtype() == DType::F32));
    let (loss, gradients) = gradients(&decoder, &batch(&device, &golden.rows()));
    let expected = golden.f32("base_loss")[0];
    assert!((loss - expected).abs() <= expected * 2.0 * 0.026 / 8.0, "loss {loss}, expected {expected}");
    for (name, gradient) in gradients {
        let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let expected = f64::from(reference[&format!("grad_norm.{name}")][0]);
        assert!((norm - expected).abs() <= 2.0 * 0.026 * expected, "{name}: norm {norm}, expected {expected}");
    }
}

fn saved_model_round_trips(model: &str) {
    let device = unsloth_cpu::device();
    let source = fixture(model).join("model");
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("made/by/save");
    export::save(&output, &trainable(model, &device, DType::BF16)).unwrap();

    let (written, expected) = (stored(&output.join("model.safetensors")), stored(&source.join("model.safetensors")));
    assert_eq!(written.keys().collect::<BTreeSet<_>>(), expected.keys().collect::<BTreeSet<_>>());
    for (name, tensor) in &expected {
        let written = &written[name];
        assert!((written.dtype, &written.shape) == (tensor.dtype, &tensor.shape), "{name}");
        assert!(written.bytes == tensor.bytes, "{name}");
    }
    for name in ["config.json", "generation_config.json"] {
        assert_eq!(std::fs::read(output.join(name)).unwrap(), std::fs::read(source.join(name)).unwrap(), "{name}");
    }
    let names: Vec<_> = std::fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "no temporary file stays: {names:?}");
}

/// Mean and variance of elements that should be normal with this deviation, within six standard errors.
fn check_normal(name: &str, values: &[f32], std: f64) {
    let count = values.len() as f64;
    let moment = |power: i32| values.iter().map(|&v| (f64::from(v) / std).powi(power)).sum::<f64>() / count;
    assert!(moment(1).abs() <= 6.0 / count.sqrt(), "{name}: mean {}", moment(1));
    assert!((moment(2) - 1.0).abs() <= 6.0 * (2.0 / count).sqrt(), "{name}: variance {}", moment(2));
}

fn random_weights_as_transformers_makes_them(model: &str) {
    let device = unsloth_cpu::device();
    let folder = Folder::copy(model, "model");
    std::fs::remove_file(folder.file("model.safetensors")).unwrap();
    folder.set("config.json", "initializer_range", 0.05.into());
    let random =
        |seed: u64| values(&Decoder::random(folder.path(), &device, LoadOptions::trainable(DType::F32), seed).unwrap());
    let made = random(3);
    let shapes = |decoder: &Decoder| -> Vec<(String, Vec<usize>)> {
        decoder.parameters().iter().map(|p| (p.name().to_owned(), p.value().shape().to_vec())).collect()
    };
    let decoder = Decoder::random(folder.path(), &device, LoadOptions::trainable(DType::BF16), 3).unwrap();
    assert_eq!(shapes(&decoder), shapes(&trainable(model, &device, DType::F32)));
    assert_eq!(values(&decoder), made, "the type of activations does not matter");
    for (name, values) in &made {
        if name.ends_with(".bias") {
            assert!(values.iter().all(|&value| value == 0.0), "{name}");
        } else if name.contains("norm") {
            assert!(values.iter().all(|&value| value == 1.0), "{name}");
        } else if name.contains("embed_tokens") {
            let (pad, rest) = values.split_at(64);
            assert!(pad.iter().all(|&value| value == 0.0), "the padding token is 0 in these models");
            check_normal(name, rest, 0.05);
        } else {
            check_normal(name, values, 0.05);
        }
    }
    let matrices = |values: &BTreeMap<String, Vec<f32>>| -> Vec<u32> {
        let drawn = values.iter().filter(|(name, _)| !name.contains("norm") && !name.ends_with(".bias"));
        drawn.map(|(_, values)| values[values.len() - 1].to_bits()).collect()
    };
    let drawn = matrices(&made);
    assert_eq!(drawn.iter().collect::<BTreeSet<_>>().len(), drawn.len(), "no two matrices are alike");
    assert!(matrices(&random(4)).iter().zip(&drawn).all(|(a, b)| a != b), "another seed gives another model");
}

/// Norms that add 1 to their weight start at 0, all of them.
#[test]
fn norms_of_gemma_start_at_zero() {
    let folder = fixture("shapes/gemma3").join("model");
    let made =
        values(&Decoder::random(&folder, &unsloth_cpu::device(), LoadOptions::trainable(DType::F32), 0).unwrap());
    let norms: Vec<_> = made.iter().filter(|(name, _)| name.contains("norm")).collect();
    assert_eq!(norms.len(), 3 * 6 + 1);
    assert!(norms.iter().all(|(_, values)| values.iter().all(|&value| value == 0.0)));
}

/// Neither the number of layers nor the other weights change what a weight starts as.
#[test]
fn a_random_weight_depends_on_its_name_and_shape_alone() {
    let device = unsloth_cpu::device();
    let folder = Folder::copy("tiny-llama", "model");
    let random = || values(&Decoder::random(folder.path(), &device, LoadOptions::trainable(DType::F32), 0).unwrap());
    let four = random();
    folder.set("config.json", "num_hidden_layers", 2.into());
    folder.set("config.json", "tie_word_embeddings", true.into());
    folder.set("config.json", "attention_bias", true.into());
    let two = random();
    assert!(!two.contains_key("lm_head.weight") && two.contains_key("model.layers.1.self_attn.q_proj.bias"));
    for (name, values) in two.iter().filter(|(name, _)| !name.ends_with(".bias")) {
        assert!(values == &four[name], "{name}");
    }
}

#[test]
fn a_model_from_random_weights_learns() {
    let (device, golden) = (unsloth_cpu::device(), Golden::open("tiny-qwen2"));
    let schedule = Schedule {
        kind: ScheduleKind::Constant,
        learning_rate: 1e-2,
        warmup_steps: 0,
        total_steps: 20,
        ..Schedule::default()
    };
    let config = TrainerConfig { schedule, ..TrainerConfig::default() };
    let decoder =
        Decoder::random(&fixture("tiny-qwen2").join("model"), &device, LoadOptions::trainable(DType::F32), 1).unwrap();
    let mut trainer = Trainer::new(decoder, config).unwrap();
    let batch = batch(&device, &golden.rows());
    let loss =
        |trainer: &Trainer<Decoder>| unsloth_train::evaluate(trainer.model(), std::slice::from_ref(&batch)).unwrap();
    // A model that knows nothing gives each of the 1024 tokens about the same share.
    let before = loss(&trainer);
    assert!((before - 1024f32.ln()).abs() <= 0.2, "{before}");
    for _ in 0..20 {
        trainer.step(std::slice::from_ref(&batch)).unwrap();
    }
    trainer.finish().unwrap();
    let after = loss(&trainer);
    assert!(after < 0.5 * before, "{before} {after}");
}

/// Weights of a checkpoint in bf16 are trained in f32 and stored in bf16 again, rounded to nearest even.
#[test]
fn a_bf16_checkpoint_stays_one() {
    let device = unsloth_cpu::device();
    let folder = Folder::copy("tiny-llama", "model");
    folder.edit_tensors("model.safetensors", |tensors| {
        for tensor in tensors.values_mut() {
            let value = |bytes: &[u8]| bf16::from_f32(f32::from_le_bytes(bytes.try_into().unwrap()));
            tensor.bytes = tensor.bytes.chunks_exact(4).map(value).flat_map(bf16::to_le_bytes).collect();
            tensor.dtype = Dtype::BF16;
        }
    });
    folder.set("config.json", "dtype", "bfloat16".into());
    std::fs::remove_file(folder.file("generation_config.json")).unwrap();
    let decoder = Decoder::load(folder.path(), &device, LoadOptions::trainable(DType::F32)).unwrap();
    for parameter in decoder.parameters() {
        // Three quarters of the way to the next bf16, up or down.
        let moved: Vec<f32> = parameter.value().to_vec::<f32>().unwrap().iter().map(|v| v * (1.0 + 0.006)).collect();
        parameter.update(|value| value.write(&moved)).unwrap();
    }
    let output = tempfile::tempdir().unwrap();
    export::save(output.path(), &decoder).unwrap();
    let written = stored(&output.path().join("model.safetensors"));
    for (name, values) in values(&decoder) {
        let expected: Vec<u8> = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        assert!(written[&name].dtype == Dtype::BF16 && written[&name].bytes == expected, "{name}");
    }
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(output.path().join(name)).unwrap()).unwrap()
    };
    assert_eq!(read("config.json")["dtype"], "bfloat16");
    let tokens =
        serde_json::json!({ "_from_model_config": true, "bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0 });
    assert_eq!(read("generation_config.json"), tokens);
}

/// Random weights are f32, whatever type the configuration names, in either spelling.
#[test]
fn a_random_model_is_saved_as_f32() {
    let device = unsloth_cpu::device();
    for (field, other) in [("dtype", "torch_dtype"), ("torch_dtype", "dtype")] {
        let folder = Folder::copy("tiny-qwen2", "model");
        folder.edit("config.json", |map| {
            map.remove(other);
            map.insert(field.to_owned(), "bfloat16".into());
        });
        let decoder = Decoder::random(folder.path(), &device, LoadOptions::trainable(DType::F32), 0).unwrap();
        let output = tempfile::tempdir().unwrap();
        export::save(output.path(), &decoder).unwrap();
        let text = std::fs::read(output.path().join("config.json")).unwrap();
        let config: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&text).unwrap();
        assert_eq!((config.get(field), config.get(other)), (Some(&"float32".into()), None));
        let again = Decoder::load(output.path(), &device, F32).unwrap();
        let batch = batch(&device, &Golden::open("tiny-qwen2").rows());
        assert_eq!(logits(&again, &batch), logits(&decoder, &batch));
    }
}

#[test]
fn refusals() {
    let device = unsloth_cpu::device();
    let frozen = common::load(&device, "tiny-llama");
    let error = export::save(Path::new("nowhere"), &frozen).unwrap_err();
    assert!(matches!(error, Error::NothingTrained { .. }), "{error}");
    assert!(!Path::new("nowhere").exists());

    let folder = Folder::copy("tiny-llama", "model");
    for (field, value, rule) in [
        ("initializer_range", serde_json::json!(-0.1), "0 or more"),
        ("initializer_range", "wide".into(), "a finite number"),
        ("pad_token_id", 1024.into(), "a token id below vocab_size"),
        ("pad_token_id", (-2).into(), "a token id"),
        ("pad_token_id", 1.5.into(), "a token id"),
    ] {
        let before = std::fs::read(folder.file("config.json")).unwrap();
        folder.set("config.json", field, value.clone());
        let error =
            Decoder::random(folder.path(), &device, LoadOptions::trainable(DType::F32), 0).err().unwrap().to_string();
        std::fs::write(folder.file("config.json"), before).unwrap();
        assert!(error.contains(&format!("`{field}` = {value}, must be {rule}")), "{error}");
    }
    for absent in [serde_json::Value::Null, (-1).into()] {
        folder.set("config.json", "pad_token_id", absent);
        let decoder = Decoder::random(folder.path(), &device, LoadOptions::trainable(DType::F32), 0).unwrap();
        assert!(values(&decoder)["model.embed_tokens.weight"][0] != 0.0);
    }
}

/// An adapter of a model, with settings of `adapter_config.json` changed.
fn adapted(
    model: &str,
    device: &Device,
    dtype: DType,
    settings: &[(&str, serde_json::Value)],
) -> (Decoder, LoraConfig) {
    let folder = Folder::copy(model, "adapter");
    for (field, value) in settings {
        folder.set("adapter_config.json", field, value.clone());
    }
    let mut decoder = Decoder::load(&fixture(model).join("model"), device, LoadOptions::frozen(dtype)).unwrap();
    let config = peft::load(folder.path(), &mut decoder).unwrap();
    (decoder, config.lora)
}

fn saved_config(decoder: &Decoder) -> (tempfile::TempDir, serde_json::Value) {
    let output = tempfile::tempdir().unwrap();
    peft::save(output.path(), decoder).unwrap();
    let config = serde_json::from_slice(&std::fs::read(output.path().join("adapter_config.json")).unwrap()).unwrap();
    (output, config)
}

fn rank_stabilised_as_peft(model: &str) {
    let (device, golden, reference) = (unsloth_cpu::device(), Golden::open(model), reference(model));
    let (decoder, config) = adapted(model, &device, DType::F32, &[("use_rslora", true.into())]);
    assert_eq!(config, LoraConfig { rslora: true, ..golden.adapter() });
    assert_eq!(config.scale(), reference["rslora_scale"][0]);
    let batch = batch(&device, &golden.rows());
    let loss = unsloth_train::evaluate(&decoder, &[batch]).unwrap();
    assert!((loss - reference["rslora_loss"][0]).abs() <= 1e-5, "{loss}");

    let (output, saved) = saved_config(&decoder);
    assert_eq!((&saved["use_rslora"], &saved["lora_alpha"]), (&true.into(), &16.into()));
    let mut again = common::load(&device, model);
    assert_eq!(peft::load(output.path(), &mut again).unwrap().lora, config);
}

/// What is dropped is drawn again by the second run of a segment: the same bits as without one.
fn checkpointing_drops_the_same(model: &str) {
    let (device, golden) = (unsloth_cpu::device(), Golden::open(model));
    let draw = Draw { seed: 1, step: 4, first_sequence: 2 };
    let whole = batch(&device, &golden.rows());
    let drawn = Batch { draw: Some(draw), ..whole.clone() };
    for dtype in [DType::F32, DType::BF16] {
        let (mut decoder, config) = adapted(model, &device, dtype, &[("lora_dropout", 0.3.into())]);
        assert_eq!(config.dropout, 0.3);
        let bits = |decoder: &Decoder, batch: &Batch| -> BTreeMap<String, Vec<u32>> {
            let bits = |(name, values): (String, Vec<f32>)| (name, values.into_iter().map(f32::to_bits).collect());
            gradients(decoder, batch).1.into_iter().map(bits).collect()
        };
        let kept = bits(&decoder, &drawn);
        under_every_policy(&mut decoder, |decoder, policy| {
            assert_eq!(bits(decoder, &drawn), kept, "{dtype}, {policy}");
        });
        let undrawn = bits(&decoder, &whole);
        assert!(undrawn.iter().zip(&kept).all(|(a, b)| a != b), "every gradient feels what is dropped");
        decoder.set_dropout(0.0).unwrap();
        assert_eq!(bits(&decoder, &drawn), undrawn, "without a draw dropout is off");
    }
}

#[test]
fn dropout_is_saved_and_checked() {
    let device = unsloth_cpu::device();
    let (mut decoder, _) = adapted("tiny-llama", &device, DType::F32, &[]);
    decoder.set_dropout(0.1).unwrap();
    let (output, saved) = saved_config(&decoder);
    assert_eq!((&saved["lora_dropout"], &saved["use_rslora"]), (&serde_json::json!(0.1), &false.into()));
    let mut again = common::load(&device, "tiny-llama");
    assert_eq!(peft::load(output.path(), &mut again).unwrap().lora.dropout, 0.1);

    for dropout in [1.0, -0.5, f32::NAN] {
        let error = decoder.set_dropout(dropout).unwrap_err().to_string();
        assert_eq!(error, format!("dropout = {dropout}, must be in [0, 1)"));
    }
    assert_eq!(saved_config(&decoder).1["lora_dropout"], 0.1);
    decoder.linears_mut().next().unwrap().adapter.as_mut().unwrap().config.dropout = 0.2;
    let error = peft::save(output.path(), &decoder).unwrap_err().to_string();
    assert!(error.contains("dropout"), "{error}");
    for value in [serde_json::json!(1), serde_json::json!(-0.1), "much".into()] {
        let folder = Folder::copy("tiny-llama", "adapter");
        folder.set("adapter_config.json", "lora_dropout", value.clone());
        let error = peft::load(folder.path(), &mut common::load(&device, "tiny-llama")).unwrap_err().to_string();
        assert!(error.contains(&format!("`lora_dropout` = {value}, must be")), "{error}");
    }
}
