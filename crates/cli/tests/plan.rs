//! `unsloth plan` against what `unsloth train` measures.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use support::{shapes::*, *};

/// Options that `plan` and `train` have in common, and the shape of a batch.
struct Run<'a> {
    model: &'a Path,
    seq_len: usize,
    batch_size: usize,
    options: &'a str,
}

impl Run<'_> {
    fn plan(&self) -> Value {
        let Run { seq_len, batch_size, options, .. } = self;
        let text = format!("plan --model {{}} --seq {seq_len} --batch {batch_size} --json {options}");
        unsloth(line(&text, &[self.model])).succeeded().json()
    }

    /// Peak of two steps of training on as many documents of that length as a batch has.
    fn measure(&self) -> u64 {
        let Run { seq_len, batch_size, options, .. } = self;
        let folder = tempfile::tempdir().unwrap();
        let (data, output) = (folder.path().join("data.jsonl"), folder.path().join("out"));
        let document =
            |i: usize| json!({"input_ids": (0..*seq_len).map(|j| (7 * i + 3 * j) % 1000).collect::<Vec<_>>()});
        fs::write(&data, (0..*batch_size).map(|i| format!("{}\n", document(i))).collect::<String>()).unwrap();
        let text = format!(
            "train --model {{}} --data {{}} --output {{}} --steps 2 --batch-size {batch_size} --packing false \
             --max-seq-len {seq_len} --quiet {options}"
        );
        unsloth(line(&text, &[self.model, &data, &output])).succeeded();
        read_metrics(&output).last().unwrap()["peak_bytes"].as_u64().unwrap()
    }

    /// Holds the plan to 5% of what training measures, and gives it.
    fn check(&self) -> u64 {
        let Run { seq_len, batch_size, options, .. } = self;
        let plan = self.plan();
        let (planned, measured) = (plan["peak_bytes"].as_u64().unwrap(), self.measure());
        let error = planned as f64 / measured as f64 - 1.0;
        println!("{batch_size} x {seq_len} {options}: planned {planned}, measured {measured}, {:+.3}%", 100.0 * error);
        assert!(error.abs() <= 0.05, "{batch_size} x {seq_len} {options}: planned {planned}, measured {measured}");
        planned
    }
}

/// Three lengths, with and without checkpointing, which must save memory wherever there is much.
fn check_lengths(model: &Path, lengths: [usize; 3]) {
    for seq_len in lengths {
        let [none, every] = ["--checkpointing none", "--checkpointing every:1"]
            .map(|options| Run { model, seq_len, batch_size: 1, options }.check());
        assert!(every < none, "{seq_len}: {every} with checkpointing, {none} without");
    }
}

fn tiny() -> PathBuf {
    fixture("tiny-llama").join("model")
}

/// Norms of heads and of results, a scaled embedding, caps, two rotary tables: what families add is planned too.
#[test]
fn families_as_measured() {
    for name in ["tiny-mistral", "tiny-qwen3", "tiny-gemma2", "tiny-gemma3"] {
        for options in ["", "--checkpointing every:1 --dtype bf16"] {
            Run { model: &fixture(name).join("model"), seq_len: 150, batch_size: 2, options }.check();
        }
    }
}

#[test]
fn tiny_llama_as_measured() {
    check_lengths(&tiny(), [64, 128, 256]);
}

#[test]
fn small_as_measured() {
    let model = tempfile::tempdir().unwrap();
    SMALL.write(model.path());
    check_lengths(model.path(), [128, 512, 1024]);
    for options in [
        "--checkpointing sqrt --dtype bf16 --rank 4 --targets q_proj,down_proj",
        "--method full --checkpointing every:2",
    ] {
        Run { model: model.path(), seq_len: 300, batch_size: 2, options }.check();
    }
}

#[test]
fn medium_as_measured() {
    let model = tempfile::tempdir().unwrap();
    MEDIUM.write(model.path());
    check_lengths(model.path(), [128, 256, 512]);
}

#[test]
fn options_as_measured() {
    for options in [
        "--dtype bf16",
        "--dtype f16",
        "--rank 2 --targets v_proj",
        "--threads 1",
        "--checkpointing every:3",
        "--dropout 0.1",
        "--dora",
        "--lora-init pissa",
        "--modules-to-save lm_head --bias all",
        "--dropout 0.1 --mlp-tile 32",
        "--mlp-tile 64 --method full --checkpointing every:2 --offload disk --dtype bf16",
        "--checkpointing layers:1,2 --offload host",
        "--checkpointing selective --dtype f16",
        "--method full --offload-optimizer host",
        "--method full --dtype bf16 --optimizer adamw8bit --offload-optimizer disk",
        "--method full --dtype bf16",
        "--method full --dtype bf16 --stochastic-rounding",
        "--method scratch",
        "--method full --optimizer adamw8bit",
        "--optimizer sgd",
        "--optimizer lion",
        "--method full --optimizer adafactor",
        "--method full --optimizer muon",
    ] {
        Run { model: &tiny(), seq_len: 100, batch_size: 3, options }.check();
    }
}

/// Moments that wait elsewhere are not in the device's account, but for what a step brings at a time.
#[test]
fn moments_elsewhere_as_measured() {
    let model = tempfile::tempdir().unwrap();
    SMALL.write(model.path());
    let run = |options: &str| {
        let options = &format!("--method full {options}");
        let run = Run { model: model.path(), seq_len: 200, batch_size: 1, options };
        run.check();
        run.plan()
    };
    let number = |value: &Value| value.as_u64().unwrap();
    let here = run("");
    let [optimiser, peak] = [&here["by_category"]["optimiser"], &here["peak_bytes"]].map(number);
    // What stays: the scalars of this step and of the one before.
    let scalars = 2 * 256;
    assert!(optimiser > 1 << 20, "{optimiser}");
    for place in ["host", "disk"] {
        let away = run(&format!("--offload-optimizer {place}"));
        assert_eq!(number(&away["offloaded_bytes"]), optimiser - scalars, "{place}");
        assert_eq!(number(&away["by_category"]["optimiser"]), scalars, "{place}");
        assert_eq!(number(&away["peak_bytes"]), peak - (optimiser - scalars), "{place}");
    }
}

/// Two models, two lengths, policies, types and methods on a device that CubeCL's kernels run on.
#[cfg(feature = "wgpu")]
#[test]
#[ignore = "full: minutes on a software device"]
fn vulkan_as_measured() {
    let small = tempfile::tempdir().unwrap();
    SMALL.write(small.path());
    let configurations: [(&Path, usize, usize, &str); 16] = [
        (&tiny(), 64, 1, ""),
        (&tiny(), 256, 2, ""),
        (&tiny(), 256, 2, "--checkpointing selective"),
        (&tiny(), 200, 3, "--checkpointing every:1 --offload host"),
        (&tiny(), 100, 3, "--method full"),
        (&tiny(), 100, 2, "--dropout 0.1 --rank 4"),
        (&tiny(), 100, 2, "--dtype f16"),
        (&tiny(), 100, 2, "--dora"),
        (&tiny(), 100, 2, "--method full --optimizer adamw8bit"),
        (&tiny(), 100, 2, "--method full --optimizer adafactor"),
        (&tiny(), 100, 2, "--method full --offload-optimizer host"),
        (small.path(), 128, 1, ""),
        (small.path(), 256, 1, "--checkpointing sqrt"),
        (small.path(), 256, 2, "--checkpointing every:1 --offload disk"),
        (small.path(), 128, 2, "--dtype f16 --checkpointing layers:0,1,2"),
        (small.path(), 96, 1, "--method full --checkpointing every:2"),
    ];
    for (model, seq_len, batch_size, options) in configurations {
        Run { model, seq_len, batch_size, options: &format!("--device vulkan:0 {options}") }.check();
    }
}

#[test]
fn categories_add_up_and_need_no_weights() {
    let (full, bare) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    SMALL.write(full.path());
    SMALL.write_config(bare.path());
    for options in ["", "--dtype bf16"] {
        let [full, bare] =
            [full.path(), bare.path()].map(|model| Run { model, seq_len: 64, batch_size: 2, options }.plan());
        let categories = full["by_category"].as_object().unwrap();
        let sum: u64 = categories.values().map(|bytes| bytes.as_u64().unwrap()).sum();
        assert_eq!((sum, &full["device"]), (full["peak_bytes"].as_u64().unwrap(), &json!("cpu")));
        let names = ["activations", "adapters", "gradients", "kv_cache", "optimiser", "weights", "workspace"];
        assert!(categories.keys().eq(&names), "{categories:?}");
        // Two moments for each of the adapters' parameters; the scalars of this step and of the one before.
        let [adapters, optimiser] = ["adapters", "optimiser"].map(|name| categories[name].as_u64().unwrap());
        assert_eq!(optimiser, 2 * adapters + 2 * 256);
        assert_eq!(full, bare);
    }
    // What the configuration says of the weights counts where there are none.
    let plan =
        || Run { model: bare.path(), seq_len: 64, batch_size: 2, options: "" }.plan()["by_category"]["weights"].clone();
    let wide = plan().as_u64().unwrap();
    set_config(bare.path(), "dtype", Value::Null);
    assert_eq!(plan().as_u64().unwrap(), wide);
    set_config(bare.path(), "torch_dtype", json!("bfloat16"));
    // The rotary tables, 64 positions of 32 channels each, stay f32.
    assert_eq!(2 * plan().as_u64().unwrap(), wide + 2 * 64 * 32 * 4);
}

#[test]
fn a_table_and_a_limit() {
    let planned =
        Run { model: &tiny(), seq_len: 100, batch_size: 1, options: "" }.plan()["peak_bytes"].as_u64().unwrap();
    let limited = |bytes: u64| unsloth(line(&format!("plan --model {{}} --seq 100 --memory {bytes}"), &[&tiny()]));
    let table = limited(planned).succeeded().stdout;
    let names: Vec<&str> = table.lines().filter_map(|line| line.split(' ').next()).collect();
    let categories = ["weights", "adapters", "gradients", "optimiser", "activations", "workspace", "peak"];
    assert_eq!(names, [&categories[..], &["longest", "largest"]].concat());
    assert!(table.contains("on cpu, fits ") && table.contains("peak  "), "{table}");
    let refused = limited(planned - 1);
    assert_eq!(refused.status, 1);
    for part in
        ["error: the run needs ", "\n  weights ", "\n  activations ", " with --checkpointing selective, which fits"]
    {
        assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
    }
}

#[test]
fn bad_input() {
    let folder = tempfile::tempdir().unwrap();
    SMALL.write_config(folder.path());
    let plan = |options: &str| unsloth(line(&format!("plan --model {{}} {options}"), &[folder.path()]));
    plan("--seq 1").failed_with(&["seq_len = 1, must be at least 2"]);
    plan("--seq 8 --batch 0").failed_with(&["batch_size = 0, must be at least 1"]);
    plan("--seq 70000 --batch 70000").failed_with(&["4900000000, must be below 2^31"]);
    plan("--seq 8 --method full --rank 8").failed_with(&["method = full, must be lora where rank is given"]);
    plan("--seq 8 --stochastic-rounding").failed_with(&["dtype = f32, must be bf16 with stochastic_rounding"]);
    plan("--seq 8 --rank 0").failed_with(&["rank = 0"]);
    plan("--seq 8 --rank 300").failed_with(&["k_proj: rank = 300, must be 1 to 256"]);
    plan("--seq 8 --threads 0").failed_with(&["num_threads = 0, must be at least 1"]);
    plan("--seq 8 --targets x_proj").failed_with(&["no linear layer is named `x_proj`"]);
    for usage in ["", "--seq x", "--seq 8 --memory lots", "--seq 8 --checkpointing every:0", "--seq 8 --method half"] {
        assert_eq!(plan(usage).status, 2, "{usage}");
    }
    set_config(folder.path(), "dtype", json!("float64"));
    plan("--seq 8").failed_with(&["config.json", "`dtype` = \"float64\", must be float32, float16 or bfloat16"]);
    fs::write(folder.path().join("model.safetensors"), "").unwrap();
    plan("--seq 8").failed_with(&["model.safetensors", "not a complete safetensors file"]);
    let nowhere = folder.path().join("nowhere");
    unsloth(line("plan --model {} --seq 8", &[&nowhere])).failed_with(&["cannot read", "nowhere/config.json"]);
}

/// What an optimiser keeps is the same everywhere; only scratch depends on the device.
#[test]
fn every_optimiser_on_every_device() {
    let plan = |options: &str, device| {
        let text = format!("plan --model {{}} --seq 8 --method full {options} --device {device} --json");
        unsloth(line(&text, &[&tiny()])).succeeded().json()
    };
    let optimizers = ["adamw", "adamw8bit", "sgd", "lion", "adafactor", "muon"];
    let mut variants: Vec<_> = optimizers.iter().map(|name| format!("--optimizer {name}")).collect();
    variants.push("--dtype bf16 --stochastic-rounding".to_owned());
    for options in &variants {
        let [cpu, card] = ["cpu", "cuda:0"].map(|device| plan(options, device)["by_category"].take());
        for category in ["weights", "gradients", "optimiser"] {
            assert!(cpu[category].as_u64().unwrap() > 0, "{options}: {category}");
            assert_eq!(cpu[category], card[category], "{options}: {category}");
        }
    }
}
