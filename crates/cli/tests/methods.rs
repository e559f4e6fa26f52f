//! What a run trains, through the binary: whole models, and adapters with dropout or a rank-stabilised scale.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{fs, path::Path};

use serde_json::{Value, json};
use support::*;

/// What the folder of a whole model holds.
const MODEL_FILES: [&str; 9] = [
    "chat_template.jinja",
    "config.json",
    "config.toml",
    "generation_config.json",
    "loss.svg",
    "metrics.jsonl",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];

fn train(model: &Path, data: &Path, output: &Path, options: &str) -> Outcome {
    let mut args = line("train --model {} --data {} --output {}", &[model, data, output]);
    args.extend(line(options, &[]));
    unsloth(args)
}

fn eval_loss(model: &Path, data: &Path) -> f64 {
    unsloth(line("eval --json --model {} --data {}", &[model, data])).succeeded().json()["loss"].as_f64().unwrap()
}

/// The golden run is ten steps long; ours is told to be, too, on the first twenty of the forty documents.
fn full_as_transformers(name: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (root, output) = (fixture(name), folder.path().join("out"));
    let options = "--method full --batch-size 2 --packing false --shuffle false --steps 10 --learning-rate 1e-3 \
        --warmup-steps 2 --weight-decay 0.1";
    let outcome = train(&root.join("model"), &root.join("train.jsonl"), &output, options).succeeded();
    assert!(outcome.stderr.contains("step 10/10"), "{}", outcome.stderr);
    let reference = read_tensors(&fixture("methods").join(format!("{name}.safetensors")));
    let metrics = read_metrics(&output);
    for (field, tensor) in [("loss", "train_losses"), ("grad_norm", "train_grad_norms")] {
        let (actual, expected) = (column(&metrics, field), &reference[tensor].data);
        assert_eq!(actual.len(), 10);
        for (step, (actual, expected)) in actual.iter().zip(expected).enumerate() {
            assert!(
                (actual - expected).abs() <= 1e-4 * expected,
                "step {}: {field} {actual}, expected {expected}",
                step + 1
            );
        }
    }
    let trained = read_tensors(&output.join("model.safetensors"));
    let expected = read_tensors(&root.join("model/model.safetensors"));
    assert!(trained.keys().eq(expected.keys()));
    for (name, values) in &trained {
        assert!(values.shape == expected[name].shape && values.dtype == expected[name].dtype, "{name}");
        let sampled: Vec<f64> = match values.data.len() {
            ..=1024 => values.data.clone(),
            _ => values.data.iter().copied().step_by(13).collect(),
        };
        let error = relative_error(&sampled, &reference[&format!("final.{name}")].data);
        assert!(error <= 1e-3, "{name}: {error}");
        assert!(values.data != expected[name].data, "{name} was not trained");
    }
    assert_eq!(names(&output), MODEL_FILES);
    for file in ["config.json", "generation_config.json", "tokenizer.json"] {
        assert_eq!(fs::read(output.join(file)).unwrap(), fs::read(root.join("model").join(file)).unwrap(), "{file}");
    }
    let data = root.join("train.jsonl");
    assert!(eval_loss(&output, &data) < eval_loss(&root.join("model"), &data));
}

#[test]
fn full_llama() {
    full_as_transformers("tiny-llama");
}

#[test]
fn full_qwen2() {
    full_as_transformers("tiny-qwen2");
}

#[test]
fn scratch_needs_no_weights_and_its_model_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_model("tiny-qwen2", folder.path());
    fs::remove_file(model.join("model.safetensors")).unwrap();
    set_config(&model, "dtype", "bfloat16".into());
    let data = fixture("tiny-qwen2").join("train.jsonl");
    let options = "--method scratch --quiet --epochs 4 --batch-size 4 --packing false --learning-rate 1e-2";
    let outputs = ["a --seed 5", "b --seed 5", "c --seed 6"].map(|run| {
        let (name, seed) = run.split_once(' ').unwrap();
        let output = folder.path().join(name);
        train(&model, &data, &output, &format!("{options} {seed}")).succeeded();
        output
    });
    let bytes = |output: &Path| fs::read(output.join("model.safetensors")).unwrap();
    assert!(bytes(&outputs[0]) == bytes(&outputs[1]), "the same seed gives the same bits");
    assert!(bytes(&outputs[0]) != bytes(&outputs[2]), "another seed gives another model");
    assert_eq!(names(&outputs[0]), MODEL_FILES);
    let config: Value = serde_json::from_slice(&fs::read(outputs[0].join("config.json")).unwrap()).unwrap();
    assert_eq!(config["dtype"], "float32");
    let losses = column(&read_metrics(&outputs[0]), "loss");
    assert!((losses[0] - 1024f64.ln()).abs() < 0.2, "{losses:?}");
    let learnt = eval_loss(&outputs[0], &data);
    assert!(learnt < losses[0] - 1.0, "{learnt} after {losses:?}");

    // A folder like any other: it can be trained further, adapted and continued.
    let further = folder.path().join("further");
    train(&outputs[0], &data, &further, "--method full --quiet --steps 4 --learning-rate 1e-3").succeeded();
    let first = column(&read_metrics(&further), "loss")[0];
    assert!((first - learnt).abs() < 1.0, "{first} and {learnt}");
    train(&further, &data, &folder.path().join("adapter"), "--quiet --steps 2 --rank 2").succeeded();
    let text = unsloth(line("generate --model {} --tokens 5,6 --max-new-tokens 3 --ignore-eos --json", &[&further]));
    assert_eq!(text.succeeded().json()["tokens"].as_array().unwrap().len(), 3);
}

#[test]
fn checkpointing_and_bf16() {
    let folder = tempfile::tempdir().unwrap();
    let root = fixture("tiny-llama");
    let run = |name: &str, options: &str| {
        let output = folder.path().join(name);
        let options = format!("--method full --quiet --steps 3 --learning-rate 1e-3 {options}");
        train(&root.join("model"), &root.join("train.jsonl"), &output, &options).succeeded();
        (fs::read(output.join("model.safetensors")).unwrap(), column(&read_metrics(&output), "loss"))
    };
    for dtype in ["f32", "bf16"] {
        let kept = run(&format!("{dtype}-kept"), &format!("--dtype {dtype}"));
        let recomputed = run(&format!("{dtype}-every"), &format!("--dtype {dtype} --checkpointing every:1"));
        assert!(kept == recomputed, "{dtype}");
    }
}

#[test]
fn dropout_and_rank_stabilised_scale_stay_with_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("tiny-llama").join("model"), fixture("tiny-llama").join("train.jsonl"));
    let run = |name: &str, options: &str, adapter: Option<&Path>| {
        let output = folder.path().join(name);
        let mut args = line("train --quiet --steps 3 --model {} --data {} --output {}", &[&model, &data, &output]);
        args.extend(line(options, &[]));
        args.extend(adapter.map(|adapter| line("--adapter {}", &[adapter])).unwrap_or_default());
        (output, unsloth(args))
    };
    let config = |output: &Path| -> Value {
        serde_json::from_slice(&fs::read(output.join("adapter_config.json")).unwrap()).unwrap()
    };
    let settings = |output: &Path| {
        let config = config(output);
        Value::from(["r", "lora_alpha", "lora_dropout", "use_rslora"].map(|field| config[field].clone()).to_vec())
    };
    let (first, outcome) = run("first", "--rank 4 --alpha 6 --dropout 0.1 --rslora --learning-rate 1e-2", None);
    outcome.succeeded();
    assert_eq!(settings(&first), json!([4, 6, 0.1, true]));
    for (name, options, dropout) in
        [("kept", "", 0.1), ("said", "--rslora --dropout 0.1", 0.1), ("changed", "--dropout 0", 0.0)]
    {
        let (next, outcome) = run(name, options, Some(&first));
        outcome.succeeded();
        assert_eq!(settings(&next), json!([4, 6, dropout, true]), "{name}");
    }
    let losses = ["kept", "said", "changed"].map(|name| column(&read_metrics(&folder.path().join(name)), "loss"));
    assert!(losses[0] == losses[1] && losses[0] != losses[2], "{losses:?}");
    let (plain, outcome) = run("plain", "--rank 4", None);
    outcome.succeeded();
    let (_, outcome) = run("other", "--rslora", Some(&plain));
    outcome.failed_with(&["rslora = true, must be false, as the adapter in"]);

    // Nothing is dropped in an evaluation: another share makes no difference.
    let eval = || {
        let args = line("eval --json --model {} --adapter {} --data {}", &[&model, &first, &data]);
        unsloth(args).succeeded().stdout
    };
    let loss = eval();
    let mut changed = config(&first);
    changed["lora_dropout"] = 0.9.into();
    fs::write(first.join("adapter_config.json"), changed.to_string()).unwrap();
    assert_eq!(eval(), loss);
}

/// The same documents in other micro-batches have the same zeros.
#[test]
fn dropout_does_not_depend_on_the_split() {
    let folder = tempfile::tempdir().unwrap();
    let root = fixture("tiny-llama");
    let run = |name: &str, options: &str| {
        let output = folder.path().join(name);
        let common = "train --quiet --steps 6 --packing false --learning-rate 1e-2 --warmup-steps 0";
        let paths: [&Path; 4] = [&root.join("model"), &root.join("train.jsonl"), &root.join("adapter"), &output];
        let mut args = line(&format!("{common} --model {{}} --data {{}} --adapter {{}} --output {{}}"), &paths);
        args.extend(line(options, &[]));
        unsloth(args).succeeded();
        column(&read_metrics(&output), "loss")
    };
    let whole = run("whole", "--dropout 0.3 --batch-size 4");
    for (name, options) in
        [("two", "--batch-size 2 --grad-accum 2"), ("four", "--grad-accum 4 --checkpointing every:2")]
    {
        let error = relative_error(&run(name, &format!("--dropout 0.3 {options}")), &whole);
        assert!(error <= 1e-5, "{name}: {error}");
    }
    let (off, other) = (run("off", "--batch-size 4"), run("seed", "--dropout 0.3 --batch-size 4 --shuffle false"));
    assert!(relative_error(&off, &whole) > 1e-4 && relative_error(&other, &whole) > 1e-4);
}

#[test]
fn bad_input() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_model("tiny-llama", folder.path());
    let data = fixture("tiny-llama").join("train.jsonl");
    let output = folder.path().join("out");
    let run = |options: &str| train(&model, &data, &output, options);
    for (option, field) in
        [("--rank 4", "rank"), ("--alpha 4", "alpha"), ("--targets q_proj", "targets"), ("--adapter x", "adapter")]
    {
        for method in ["full", "scratch"] {
            let rule = format!("method = {method}, must be lora where {field} is given");
            run(&format!("--method {method} {option}")).failed_with(&[&rule]);
        }
    }
    assert_eq!(run("--method both").status, 2);
    run("--dropout 1").failed_with(&["dropout = 1, must be in [0, 1)"]);
    for method in ["full", "scratch"] {
        let into_itself = train(&model, &data, &model, &format!("--method {method}"));
        into_itself.failed_with(&["output = `", "must be another folder than that of the model"]);
    }
    fs::remove_file(model.join("model.safetensors")).unwrap();
    run("--method full").failed_with(&["neither `model.safetensors` nor"]);
    set_config(&model, "initializer_range", (-1.0).into());
    run("--method scratch").failed_with(&["config.json", "`initializer_range` = -1.0, must be 0 or more"]);
    assert!(!output.exists());
}
