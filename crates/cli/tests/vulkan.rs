//! The first Vulkan device beside the CPU, through the binary.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{fs, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use support::*;

/// What `unsloth devices` says of the first Vulkan device.
fn described() -> Value {
    let devices = unsloth(line("devices --json", &[])).succeeded().json();
    devices.as_array().unwrap().iter().find(|device| device["name"] == "vulkan:0").unwrap().clone()
}

/// Twenty steps of a model of four layers, with all that is drawn at random: the adapter, the order of the documents, dropout.
#[test]
fn a_seed_gives_the_same_run_on_both_devices() {
    let folder = tempfile::tempdir().unwrap();
    let root = fixture("tiny-llama");
    let run = |device: &str, seed: u32| {
        let output = folder.path().join(format!("{}-{seed}", &device[..3]));
        let options = format!(
            "train --quiet --steps 20 --batch-size 2 --learning-rate 1e-3 --warmup-steps 3 --rank 4 --dropout 0.2 --seed {seed} \
             --device {device} --model {{}} --data {{}} --output {{}}"
        );
        unsloth(line(&options, &[&root.join("model"), &root.join("train.jsonl"), &output])).succeeded();
        (read_metrics(&output), read_tensors(&output.join("adapter_model.safetensors")))
    };
    let ((cpu, cpu_adapter), (vulkan, vulkan_adapter)) = (run("cpu", 7), run("vulkan:0", 7));
    assert_eq!((cpu.len(), vulkan.len()), (20, 20));
    for (cpu, vulkan) in cpu.iter().zip(&vulkan) {
        assert_eq!(cpu["tokens"], vulkan["tokens"], "the documents are in the same order");
        for field in ["loss", "grad_norm"] {
            let (expected, actual) = (cpu[field].as_f64().unwrap(), vulkan[field].as_f64().unwrap());
            // The bound of the golden runs on this device.
            assert!((actual - expected).abs() <= 5e-4, "step {}: {field} {actual}, on the CPU {expected}", cpu["step"]);
        }
    }
    for (name, expected) in &cpu_adapter {
        let error = relative_error(&vulkan_adapter[name].data, &expected.data);
        assert!(error <= 1e-3, "{name}: {error}");
    }
    // What is drawn counts: another seed is further away than the bound.
    let (other, _) = run("cpu", 8);
    let differs = |(a, b): (&Value, &Value)| (a["loss"].as_f64().unwrap() - b["loss"].as_f64().unwrap()).abs() > 5e-4;
    assert!(cpu.iter().zip(&other).any(differs));
}

#[test]
fn bf16_where_the_device_has_none() {
    let folder = tempfile::tempdir().unwrap();
    let (root, output) = (fixture("tiny-llama"), folder.path().join("out"));
    let paths: [&Path; 3] = [&root.join("model"), &root.join("train.jsonl"), &output];
    let args = line("train --steps 1 --dtype bf16 --device vulkan:0 --model {} --data {} --output {}", &paths);
    let has_bf16 = described()["dtypes"].as_array().unwrap().iter().any(|dtype| dtype == "bf16");
    if has_bf16 {
        unsloth(args).succeeded();
    } else {
        unsloth(args).failed_with(&["dtype bf16 is not supported on vulkan:0"]);
        assert!(!output.exists(), "a run that was refused leaves nothing");
    }
}

/// Puts zeros of this shape in the place of a tensor.
fn enlarge(path: &Path, name: &str, shape: [usize; 2]) {
    let (bytes, zeros) = (fs::read(path).unwrap(), vec![0u8; shape[0] * shape[1] * 4]);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let zeros = TensorView::new(Dtype::F32, shape.to_vec(), &zeros).unwrap();
    let views = file.iter().map(|(other, view)| (other, if other == name { zeros.clone() } else { view }));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A tied embedding of 150 MiB, where Mesa's software driver binds 128 MiB to a kernel.
#[test]
fn a_matrix_that_is_larger_than_the_device_binds() {
    const VOCAB_SIZE: usize = 600_000;
    let folder = tempfile::tempdir().unwrap();
    let model = copy_model("tiny-qwen2", folder.path());
    let device = described();
    let features = device["features"].as_array().unwrap();
    let limit = features
        .iter()
        .filter_map(Value::as_str)
        .find_map(|feature| feature.strip_prefix("buffers up to ")?.strip_suffix(" MiB")?.parse::<usize>().ok());
    set_config(&model, "vocab_size", VOCAB_SIZE.into());
    enlarge(&model.join("model.safetensors"), "model.embed_tokens.weight", [VOCAB_SIZE, 64]);
    let outcome = unsloth(line("generate --tokens 5,6 --max-new-tokens 2 --device vulkan:0 --model {}", &[&model]));
    if limit.unwrap() << 20 >= VOCAB_SIZE * 64 * 4 {
        outcome.succeeded();
    } else {
        outcome.failed_with(&[
            "tensor `model.embed_tokens.weight`",
            "153600000 bytes of weights",
            "vulkan:0 binds at most",
        ]);
    }
}
