//! The numbers of transformers and PEFT, through the binary.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::path::Path;

use serde_json::json;
use support::*;

/// A device, and how far it may be from the numbers.
struct Target {
    device: &'static str,
    /// Of a loss that is evaluated.
    loss: f64,
    /// Of each loss and gradient norm of a run.
    curve: f64,
    /// Of an adapter after a run, relative to its largest element.
    adapter: f64,
}

const CPU: Target = Target { device: "cpu", loss: 1e-5, curve: 1e-4, adapter: 1e-3 };
#[cfg(feature = "wgpu")]
const VULKAN: Target = Target { device: "vulkan:0", loss: 2e-4, curve: 5e-4, adapter: 1e-3 };

/// The command of the golden run.
fn golden_run(name: &str, output: &Path, target: &Target) -> Outcome {
    let root = fixture(name);
    let paths = [&root.join("model"), &root.join("train.jsonl"), &root.join("adapter"), output];
    let mut args = line(
        "train --model {} --data {} --adapter {} --output {} --batch-size 2 --packing false --shuffle false --steps 20 \
         --learning-rate 1e-3 --warmup-steps 3 --weight-decay 0.01 --rank 8 --alpha 16 --dtype f32",
        &paths,
    );
    args.extend(target.option());
    unsloth(args)
}

impl Target {
    fn option(&self) -> [String; 2] {
        ["--device".to_owned(), self.device.to_owned()]
    }

    fn passed(&self, what: &str, name: &str) {
        println!("{what} of {name}: passed on {}", self.device);
    }
}

fn curve_and_adapter(name: &str, target: &Target) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let outcome = golden_run(name, &output, target).succeeded();
    assert!(outcome.stderr.contains("step 20/20"), "{}", outcome.stderr);

    let golden = read_tensors(&fixture(name).join("golden.safetensors"));
    let metrics = read_metrics(&output);
    assert_eq!(metrics.len(), 20);
    for (index, record) in metrics.iter().enumerate() {
        assert_eq!(record["step"], index + 1);
        for (field, tensor, limit) in [
            ("loss", "train_losses", target.curve),
            ("lr", "train_lrs", 1e-9),
            ("grad_norm", "train_grad_norms", target.curve),
        ] {
            let (actual, expected) = (record[field].as_f64().unwrap(), golden[tensor].data[index]);
            let error = (actual - expected).abs();
            assert!(error <= limit, "step {}: {field} {actual}, expected {expected}", index + 1);
        }
        assert_eq!(record["tokens"], 96 * (index + 1));
        assert!(
            record["tokens_per_second"].as_f64().unwrap() > 0.0 && record["peak_bytes"].as_u64().unwrap() > 1 << 20
        );
    }

    let adapter = read_tensors(&output.join("adapter_model.safetensors"));
    assert_eq!(adapter.len(), 4 * 7 * 2);
    for (path, values) in &adapter {
        let path = path.strip_prefix("base_model.model.").unwrap().strip_suffix(".weight").unwrap();
        let expected = &golden[&format!("final.{}", path.replace("lora_", ""))];
        assert_eq!(values.shape, expected.shape, "{path}");
        let error = relative_error(&values.data, &expected.data);
        assert!(error <= target.adapter, "{path}: {error}");
    }
    target.passed("curve and adapter", name);
}

fn eval_losses(name: &str, target: &Target) {
    let root = fixture(name);
    let golden = read_tensors(&root.join("golden.safetensors"));
    let (model, data, adapter) = (root.join("model"), root.join("eval.jsonl"), root.join("adapter"));
    // The first label of a row is nobody's target.
    let targets = golden["labels"].data.chunks(48).flat_map(|row| &row[1..]).filter(|&&label| label != -100.0).count();
    for batch_size in [1, 2] {
        let mut base = line("eval --json --model {} --data {} --batch-size", &[&model, &data]);
        base.push(batch_size.to_string());
        base.extend(target.option());
        let mut adapted = base.clone();
        adapted.extend(line("--adapter {}", &[&adapter]));
        for (args, tensor) in [(base, "base_loss"), (adapted, "loss")] {
            let found = unsloth(args).succeeded().json();
            let (loss, expected) = (found["loss"].as_f64().unwrap(), golden[tensor].data[0]);
            assert!((loss - expected).abs() <= target.loss, "{tensor}: {loss}, expected {expected}");
            assert_eq!(found["tokens"], targets);
            assert!((found["perplexity"].as_f64().unwrap() - loss.exp()).abs() <= 1e-9 * loss.exp());
        }
    }
    target.passed("losses", name);
}

/// Greedy tokens after a prompt given in this way, without and with the adapter.
fn greedy_tokens(name: &str, option: &str, prompt: &str, target: &Target) {
    let root = fixture(name);
    let golden = read_tensors(&root.join("golden.safetensors"));
    let ids = |tensor: &str| golden[tensor].data.iter().map(|&id| id as i64).collect::<Vec<_>>();
    for (adapter, expected) in [("", "gen_base"), ("--adapter {}", "gen_lora")] {
        let command = format!("generate --model {{}} {adapter} --ignore-eos --max-new-tokens 32 --json");
        let mut args = line(&command, &[&root.join("model"), &root.join("adapter")]);
        args.extend([option.to_owned(), prompt.to_owned()]);
        args.extend(target.option());
        let found = unsloth(args).succeeded().json();
        assert_eq!(found["prompt_tokens"], json!(ids("gen_prompt")));
        assert_eq!(found["tokens"], json!(ids(expected)), "{expected}");
        assert_eq!(found["stop_reason"], "length");
        assert!(!found["text"].as_str().unwrap().is_empty());
        assert!(found["tokens_per_second"].as_f64().unwrap() > 0.0);
    }
    target.passed("greedy tokens", name);
}

fn greedy_tokens_after_ids(name: &str, target: &Target) {
    let golden = read_tensors(&fixture(name).join("golden.safetensors"));
    let ids: Vec<String> = golden["gen_prompt"].data.iter().map(f64::to_string).collect();
    greedy_tokens(name, "--tokens", &ids.join(","), target);
}

// Not for tiny-qwen2: transformers puts the family's own digit splitting in place of what its `tokenizer.json` says.
#[test]
fn greedy_tokens_after_text() {
    let text = "Licensed under the Apache License, Version 2.0; you may not use this file except in";
    for name in ["tiny-llama", "tiny-llama3", "tiny-mistral", "tiny-gemma2", "tiny-gemma3"] {
        greedy_tokens(name, "--prompt", text, &CPU);
    }
}

macro_rules! golden {
    ($($(#[$full:meta])? $module:ident: $name:literal on $target:ident),+) => {$(
        mod $module {
            #[test]
            $(#[$full])?
            fn curve_and_adapter() {
                super::curve_and_adapter($name, &super::$target);
            }
            #[test]
            $(#[$full])?
            fn eval_losses() {
                super::eval_losses($name, &super::$target);
            }
            #[test]
            $(#[$full])?
            fn greedy_tokens() {
                super::greedy_tokens_after_ids($name, &super::$target);
            }
        }
    )+};
}

golden!(
    llama: "tiny-llama" on CPU,
    llama3: "tiny-llama3" on CPU,
    qwen2: "tiny-qwen2" on CPU,
    qwen3: "tiny-qwen3" on CPU,
    mistral: "tiny-mistral" on CPU,
    gemma2: "tiny-gemma2" on CPU,
    gemma3: "tiny-gemma3" on CPU
);
#[cfg(feature = "wgpu")]
golden!(
    llama_vulkan: "tiny-llama" on VULKAN,
    qwen2_vulkan: "tiny-qwen2" on VULKAN,
    #[ignore = "full: a minute more on a software device"] llama3_vulkan: "tiny-llama3" on VULKAN,
    #[ignore = "full: a minute more on a software device"] qwen3_vulkan: "tiny-qwen3" on VULKAN,
    #[ignore = "full: a minute more on a software device"] mistral_vulkan: "tiny-mistral" on VULKAN,
    #[ignore = "full: a minute more on a software device"] gemma2_vulkan: "tiny-gemma2" on VULKAN,
    #[ignore = "full: a minute more on a software device"] gemma3_vulkan: "tiny-gemma3" on VULKAN
);

/// A checkpoint in bf16, which this device need not have: its values are read as they are.
#[cfg(feature = "wgpu")]
#[test]
fn a_bf16_checkpoint_on_vulkan() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_model("tiny-llama", folder.path());
    store_as_bf16(&model.join("model.safetensors"));
    let root = fixture("tiny-llama");
    let mut args = line("eval --json --model {} --data {}", &[&model, &root.join("eval.jsonl")]);
    args.extend(VULKAN.option());
    let loss = unsloth(args).succeeded().json()["loss"].as_f64().unwrap();
    // The fixtures' weights are bf16 values in f32, so nothing is lost.
    let expected = read_tensors(&root.join("golden.safetensors"))["base_loss"].data[0];
    assert!((loss - expected).abs() <= VULKAN.loss, "{loss}, expected {expected}");
}
