//! What two runs have in common, and what a run leaves behind.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use support::*;
use tempfile::TempDir;

/// A short run on `tiny-llama` with these options; gives its output folder.
fn train(folder: &TempDir, name: &str, options: &str) -> PathBuf {
    let (root, output) = (fixture("tiny-llama"), folder.path().join(name));
    let common = "train --quiet --model {} --data {} --output {} --learning-rate 1e-2 --warmup-steps 0";
    let mut args = line(common, &[&root.join("model"), &root.join("train.jsonl"), &output]);
    args.extend(line(options, &[&root.join("adapter")]));
    let outcome = unsloth(args).succeeded();
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""));
    output
}

#[test]
fn same_seed_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let options = "--steps 6 --batch-size 2 --max-seq-len 100 --rank 4 --seed";
    let runs = [7, 7, 8].map(|seed| format!("{options} {seed}"));
    let outputs = [0, 1, 2].map(|run: usize| train(&folder, &run.to_string(), &runs[run]));
    assert_eq!(adapter_bytes(&outputs[0]), adapter_bytes(&outputs[1]));
    assert_ne!(adapter_bytes(&outputs[0]), adapter_bytes(&outputs[2]));
    assert_eq!(column(&read_metrics(&outputs[0]), "loss"), column(&read_metrics(&outputs[1]), "loss"));
    // Two documents of 48 tokens fit into 100: four of them are a micro-batch of two sequences.
    assert_eq!(column(&read_metrics(&outputs[0]), "tokens"), [1, 2, 3, 4, 5, 6].map(|step| f64::from(step * 192)));
}

/// Neither what is computed again nor where the rest waits shows in a run with dropout.
fn checkpointing_changes_no_bit(device: &str, policies: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, policy: &str| {
        let options = format!("--steps 3 --adapter {{}} --dropout 0.2 --device {device} --checkpointing {policy}");
        train(&folder, name, &options)
    };
    let plain = run("none", "none");
    for (index, policy) in policies.iter().enumerate() {
        let output = run(&index.to_string(), policy);
        assert_eq!(adapter_bytes(&output), adapter_bytes(&plain), "{policy} on {device}");
        assert_eq!(column(&read_metrics(&output), "grad_norm"), column(&read_metrics(&plain), "grad_norm"), "{policy}");
        let names: Vec<_> = fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!names.iter().any(|name| name.to_string_lossy().contains("tmp")), "{names:?}");
    }
    println!("checkpointing: passed on {device}");
}

#[test]
fn checkpointing_changes_no_bit_on_the_cpu() {
    let all = [
        "every:1",
        "every:1 --offload host",
        "every:1 --offload disk",
        "every:3",
        "sqrt --offload disk",
        "layers:0",
        "selective",
    ];
    checkpointing_changes_no_bit("cpu", &all);
}

#[cfg(feature = "wgpu")]
#[test]
fn checkpointing_changes_no_bit_on_vulkan() {
    // Each run compiles its kernels anew.
    checkpointing_changes_no_bit("vulkan:0", &["every:1 --offload host", "layers:0 --offload disk", "selective"]);
}

#[test]
fn accumulated_micro_batches_equal_one_batch() {
    let folder = tempfile::tempdir().unwrap();
    let common = "--steps 8 --adapter {} --packing false --shuffle false";
    let whole = train(&folder, "whole", &format!("{common} --batch-size 2"));
    let parts = train(&folder, "parts", &format!("{common} --grad-accum 2"));
    let (whole_metrics, parts_metrics) = (read_metrics(&whole), read_metrics(&parts));
    for field in ["loss", "grad_norm"] {
        let error = relative_error(&column(&parts_metrics, field), &column(&whole_metrics, field));
        assert!(error <= 1e-5, "{field}: {error}");
    }
    assert_eq!(column(&parts_metrics, "tokens"), column(&whole_metrics, "tokens"));
    let expected = read_tensors(&whole.join("adapter_model.safetensors"));
    for (name, values) in read_tensors(&parts.join("adapter_model.safetensors")) {
        let error = relative_error(&values.data, &expected[&name].data);
        assert!(error <= 1e-3, "{name}: {error}");
    }
}

#[test]
fn epochs_cover_the_data() {
    let folder = tempfile::tempdir().unwrap();
    // 40 documents in micro-batches of 3: 14 an epoch, 21 for one and a half.
    let output = train(&folder, "out", "--epochs 1.5 --packing false --batch-size 3 --rank 2 --targets q_proj");
    let tokens = column(&read_metrics(&output), "tokens");
    assert_eq!((tokens.len(), tokens[13]), (21, 40.0 * 48.0));
}

#[test]
fn written_adapter_is_what_peft_reads() {
    let folder = tempfile::tempdir().unwrap();
    let options = "--steps 2 --rank 4 --alpha 6 --targets q_proj,down_proj";
    let output = train(&folder, "out", options);
    let tensors = read_tensors(&output.join("adapter_model.safetensors"));
    let mut expected = Vec::new();
    for layer in 0..4 {
        for (module, out_features, in_features) in [("mlp.down_proj", 64, 176), ("self_attn.q_proj", 64, 64)] {
            let prefix = format!("base_model.model.model.layers.{layer}.{module}");
            expected.push((format!("{prefix}.lora_A.weight"), vec![4, in_features]));
            expected.push((format!("{prefix}.lora_B.weight"), vec![out_features, 4]));
        }
    }
    let found: Vec<_> = tensors.iter().map(|(name, values)| (name.clone(), values.shape.clone())).collect();
    assert_eq!(found, expected);
    assert!(tensors.values().all(|values| values.dtype == safetensors::Dtype::F32));

    let config: Value = serde_json::from_slice(&std::fs::read(output.join("adapter_config.json")).unwrap()).unwrap();
    for (field, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("r", json!(4)),
        ("bias", json!("none")),
        ("lora_dropout", json!(0.0)),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("use_rslora", json!(false)),
        ("use_dora", json!(false)),
    ] {
        assert_eq!(config[field], value, "{field}");
    }
    assert_eq!(config["lora_alpha"].as_f64(), Some(6.0));
    assert!(config["base_model_name_or_path"].as_str().unwrap().contains("model"));
    let mut targets: Vec<&str> =
        config["target_modules"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    targets.sort_unstable();
    assert_eq!(targets, ["down_proj", "q_proj"]);

    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        let copied = std::fs::read(output.join(name)).unwrap();
        assert_eq!(copied, std::fs::read(fixture("tiny-llama").join("model").join(name)).unwrap(), "{name}");
    }
    let expected = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "config.toml",
        "loss.svg",
        "metrics.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&output), expected);
}

#[test]
fn a_written_adapter_goes_on_training() {
    let folder = tempfile::tempdir().unwrap();
    let first = train(&folder, "first", "--steps 12 --rank 8 --alpha 16");
    let root = fixture("tiny-llama");
    let eval = |adapter: Option<&Path>| {
        let mut args = line("eval --json --model {} --data {}", &[&root.join("model"), &root.join("train.jsonl")]);
        args.extend(adapter.map(|folder| line("--adapter {}", &[folder])).unwrap_or_default());
        unsloth(args).succeeded().json()["loss"].as_f64().unwrap()
    };
    let second = folder.path().join("second");
    let paths: [&Path; 4] = [&root.join("model"), &root.join("train.jsonl"), &first, &second];
    let args =
        line("train --quiet --model {} --data {} --adapter {} --output {} --steps 12 --learning-rate 1e-2", &paths);
    unsloth(args).succeeded();
    let (base, once, twice) = (eval(None), eval(Some(&first)), eval(Some(&second)));
    assert!(once < base - 0.1 && twice < once - 0.1, "{base} {once} {twice}");
}

#[test]
fn bf16_activations_train() {
    let folder = tempfile::tempdir().unwrap();
    let run = |dtype: &str| train(&folder, dtype, &format!("--steps 10 --adapter {{}} --dtype {dtype}"));
    let (wide, narrow) = (column(&read_metrics(&run("f32")), "loss"), column(&read_metrics(&run("bf16")), "loss"));
    // bf16 keeps 8 bits: a loss near 8 agrees to about a hundredth.
    assert!(wide.iter().zip(&narrow).all(|(w, n)| (w - n).abs() < 0.1), "{wide:?} {narrow:?}");
    assert_ne!(wide, narrow);
}

/// The scale of the loss is found within a few steps, which are skipped and say so.
#[test]
fn f16_activations_train_with_a_loss_scale() {
    let folder = tempfile::tempdir().unwrap();
    let run = |dtype: &str| {
        let output = train(&folder, dtype, &format!("--steps 20 --adapter {{}} --schedule constant --dtype {dtype}"));
        read_metrics(&output)
    };
    let (wide, narrow) = (run("f32"), run("f16"));
    assert!(wide.iter().all(|step| step.get("loss_scale").is_none()));
    let mut scale = 65_536.0;
    for step in &narrow {
        assert_eq!(step["loss_scale"], json!(scale));
        scale *= if step["grad_norm"].is_null() { 0.5 } else { 1.0 };
    }
    let num_skipped = narrow.iter().filter(|step| step["grad_norm"].is_null()).count();
    assert!(num_skipped < 10, "{num_skipped} of 20 steps were skipped");
    let (wide, narrow) = (column(&wide, "loss"), column(&narrow, "loss"));
    // f16 keeps 11 bits: a loss near 8 agrees to about a thousandth, where as many steps have been taken on the same data.
    assert!((wide[0] - narrow[0]).abs() < 0.02, "{wide:?} {narrow:?}");
    assert!(narrow[19] < narrow[0] && (wide[19] - narrow[19]).abs() < 0.1, "{wide:?} {narrow:?}");
}

#[test]
fn generate_streams_text_or_ids() {
    let root = fixture("tiny-llama");
    let folder = tempfile::tempdir().unwrap();
    let command = "generate --model {} --tokens 5,6,7 --ignore-eos --max-new-tokens 8";
    let model = copy_model("tiny-llama", folder.path());
    let found = unsloth(line(&format!("{command} --json"), &[&model])).succeeded().json();
    let streamed = unsloth(line(command, &[&root.join("model")])).succeeded().stdout;
    assert_eq!(streamed.trim_end_matches('\n'), found["text"].as_str().unwrap().trim_end_matches('\n'));

    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    let bare = unsloth(line(&format!("{command} --json"), &[&model])).succeeded().json();
    assert_eq!((&bare["text"], &bare["tokens"]), (&Value::Null, &found["tokens"]));
    let streamed = unsloth(line(command, &[&model])).succeeded().stdout;
    let ids: Vec<i64> = streamed.trim().split(',').map(|id| id.trim().parse().unwrap()).collect();
    assert_eq!(json!(ids), found["tokens"]);
    unsloth(line("generate --model {} --prompt x", &[&model])).failed_with(&["tokenizer"]);
}

#[test]
fn sampling_follows_its_seed_and_filters() {
    let model = fixture("tiny-llama").join("model");
    let tokens = |options: &str| {
        let command = "generate --json --model {} --tokens 5,6,7 --ignore-eos --max-new-tokens 12";
        let found = unsloth(line(&format!("{command} {options}"), &[&model])).succeeded().json();
        found["tokens"].clone()
    };
    let greedy = tokens("");
    assert_eq!(tokens("--temperature 1 --top-k 1 --seed 3"), greedy);
    assert_eq!(tokens("--temperature 0 --top-p 0.9 --min-p 0.1 --seed 3"), greedy);
    let drawn = tokens("--temperature 1 --seed 3");
    assert_eq!(tokens("--temperature 1 --seed 3"), drawn);
    let others = [&greedy, &tokens("--temperature 1 --seed 4"), &tokens("--temperature 1 --seed 3 --top-k 5")];
    assert!(others.iter().all(|other| **other != drawn), "{drawn} {others:?}");
}

#[test]
fn chats_are_rendered_trained_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data, output) =
        (fixture("tiny-llama").join("model"), folder.path().join("chats.jsonl"), folder.path().join("out"));
    let chat = |question: &str, answer: &str| {
        let messages = json!([{"role": "user", "content": question}, {"role": "assistant", "content": answer}]);
        format!("{}\n", json!({ "messages": messages }))
    };
    let long = chat("Why?", &"because ".repeat(80));
    std::fs::write(&data, chat("What is it?\u{1b}[31m", "A licence.") + &long).unwrap();
    let options = "--steps 2 --rank 2 --max-seq-len 60";
    let mut args = line("train --model {} --data {} --output {}", &[&model, &data, &output]);
    args.extend(line(options, &[]));
    let outcome = unsloth(args).succeeded();
    let shown = "first example, [[learnt]]:\n    <|im_start|>user\n    What is it?\u{fffd}[31m<|im_end|>\n    \
        <|im_start|>assistant\n    [[A licence.<|im_end|>\n    ]]\n";
    for part in ["data: 2 examples, ", "% of them targets; 1 examples cut to the limit (limit 60 tokens)\n", shown] {
        assert!(outcome.stderr.contains(part), "{part}: {}", outcome.stderr);
    }

    let tokens = |options: &str| {
        let mut args = line("eval --json --model {} --data {}", &[&model, &data]);
        args.extend(line(options, &[]));
        unsloth(args).succeeded().json()["tokens"].as_u64().unwrap()
    };
    assert!(tokens("") < tokens("--train-on all"));

    let generate = |options: [&str; 2]| {
        let common = line("generate --json --max-new-tokens 4 --model {}", &[&model]);
        let args = common.into_iter().chain(options.map(str::to_owned));
        unsloth(args).succeeded().json()["prompt_tokens"].clone()
    };
    // The template of the fixture, written out.
    let prompt = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(generate(["--chat", "What is it?"]), generate(["--prompt", prompt]));
}
