//! Bad input ends with one clear message and leaves nothing half-written.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{fs, path::PathBuf};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::json;
use support::*;
use tempfile::TempDir;

/// A run to be spoiled in one way.
struct Run {
    folder: TempDir,
    model: PathBuf,
    data: PathBuf,
    output: PathBuf,
}

impl Run {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = copy_model("tiny-llama", folder.path());
        let data = folder.path().join("data.jsonl");
        fs::copy(fixture("tiny-llama").join("train.jsonl"), &data).unwrap();
        let output = folder.path().join("out");
        Self { folder, model, data, output }
    }

    fn with_data(text: &str) -> Self {
        let run = Self::new();
        fs::write(&run.data, text).unwrap();
        run
    }

    fn train(&self, options: &str) -> Outcome {
        let adapter = fixture("tiny-llama").join("adapter");
        let mut args =
            line("train --model {} --data {} --output {} --steps 3", &[&self.model, &self.data, &self.output]);
        args.extend(line(options, &[&adapter]));
        unsloth(args)
    }

    /// Asserts that training fails with one line that holds all of these, and writes nothing.
    #[track_caller]
    fn fails(&self, options: &str, parts: &[&str]) {
        self.train(options).failed_with(parts);
        assert!(!self.output.exists(), "something was written");
    }

    fn config(&self, field: &str, value: serde_json::Value) -> &Self {
        set_config(&self.model, field, value);
        self
    }

    fn weights(&self) -> PathBuf {
        self.model.join("model.safetensors")
    }

    /// Rewrites the checkpoint with one tensor changed.
    fn change_tensor(&self, name: &str, change: impl Fn(&mut Vec<usize>, &mut Vec<u8>)) {
        let bytes = fs::read(self.weights()).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = file
            .iter()
            .map(|(name, view)| (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec()))
            .collect();
        let found = tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap();
        change(&mut found.2, &mut found.3);
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        let bytes = safetensors::serialize(views, None).unwrap();
        fs::write(self.weights(), bytes).unwrap();
    }
}

#[test]
fn missing_model_folder() {
    let run = Run::new();
    fs::remove_dir_all(&run.model).unwrap();
    run.fails("", &["config.json", "No such file"]);
}

#[cfg(not(feature = "hub"))]
#[test]
fn a_name_on_the_hub_without_the_feature() {
    let rule = "`org/no-such-folder` is not a folder";
    let feature = "cargo build --release --features hub";
    unsloth(line("generate --model org/no-such-folder --prompt a", &[])).failed_with(&[rule, feature]);
    unsloth(line("plan --model org/no-such-folder --seq 8", &[])).failed_with(&[rule, feature]);
    let run = Run::new();
    unsloth(line("eval --model org/no-such-folder --data {}", &[&run.data])).failed_with(&[rule, feature]);
    let args = line("train --model org/no-such-folder --data {} --output {}", &[&run.data, &run.output]);
    unsloth(args).failed_with(&[rule, feature]);
    assert!(!run.output.exists(), "something was written");
}

#[test]
fn missing_weights() {
    let run = Run::new();
    fs::remove_file(run.weights()).unwrap();
    run.fails("", &[run.model.to_str().unwrap(), "model.safetensors", "found"]);
}

#[test]
fn truncated_weights() {
    let run = Run::new();
    let bytes = fs::read(run.weights()).unwrap();
    for length in [0, 7, 1000, bytes.len() / 2, bytes.len() - 1] {
        fs::write(run.weights(), &bytes[..length]).unwrap();
        run.fails("", &["model.safetensors"]);
    }
}

#[test]
fn misshaped_weights() {
    let run = Run::new();
    run.change_tensor("model.layers.2.mlp.up_proj.weight", |shape, _| shape.reverse());
    run.fails("", &["model.safetensors", "model.layers.2.mlp.up_proj.weight", "[64, 176]", "[176, 64]"]);
}

#[test]
fn missing_tensor() {
    let run = Run::new();
    // One layer more than the checkpoint has.
    run.config("num_hidden_layers", json!(5)).fails("", &["model.layers.4.", "is missing"]);
}

#[test]
fn unknown_architecture() {
    let run = Run::new();
    run.config("model_type", json!("mamba")).config("architectures", json!(["MambaForCausalLM"]));
    run.fails("", &["config.json", "amba"]);
}

#[test]
fn unknown_rope_type() {
    let run = Run::new();
    run.config("rope_parameters.rope_type", json!("spiral")).fails("", &["config.json", "rope_type", "spiral"]);
}

#[test]
fn malformed_config() {
    let run = Run::new();
    fs::write(run.model.join("config.json"), "{\"vocab_size\": ").unwrap();
    run.fails("", &["config.json", "line 1"]);
}

#[test]
fn missing_data_file() {
    let run = Run::new();
    fs::remove_file(&run.data).unwrap();
    run.fails("", &["data.jsonl", "No such file"]);
}

#[test]
fn malformed_jsonl() {
    Run::with_data("{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 2\n").fails("", &["data.jsonl`, line 2, column 19"]);
    Run::with_data("{\"input_ids\": [1, 2]}\n{\"labels\": [1]}\n").fails("", &["line 2", "missing field `input_ids`"]);
    Run::with_data("{\"input_ids\": [1, \"two\"]}\n").fails("", &["line 1", "`input_ids`", "string \"two\""]);
}

#[test]
fn chats_of_no_known_form() {
    let run = Run::with_data("{\"dialogue\": [\"a\", \"b\"], \"id\": 3}\n");
    run.fails("", &["data.jsonl`, line 1", "found `dialogue`, `id`", "expected `messages`"]);
    let good = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    for (line, parts) in [
        (r#"{"text": "a"}"#, &["`messages` is missing"][..]),
        (r#"{"messages": []}"#, &["`messages` is empty"]),
        (r#"{"messages": [{"role": "user", "content": 1}]}"#, &["message 1", "`content` is a number"]),
        (r#"{"messages": [{"role": "wizard", "content": "a"}]}"#, &["role `wizard` in message 1"]),
        (
            r#"{"messages": [{"from": "human", "value": "a"}, {"from": "wizard", "value": "b"}]}"#,
            &["message 2", "`from` is `wizard`"],
        ),
    ] {
        let run = Run::with_data(&format!("{good}\n{line}\n"));
        run.fails("", &[&["data.jsonl`, line 2"][..], parts].concat());
    }
    Run::with_data("{\"text\": \"a\"}\n")
        .fails("--train-on answers", &["train_on = answers", "all for plain text", "data.jsonl"]);
    Run::with_data("{\"input_ids\": [1, 2]}\n").fails("--train-on all", &["train_on = all", "labels of its own"]);
}

#[test]
fn chats_that_the_template_refuses() {
    let chat = |first: &str, second: &str| {
        format!(
            "{{\"messages\": [{{\"role\": \"{first}\", \"content\": \"a\"}}, {{\"role\": \"{second}\", \"content\": \"b\"}}]}}\n"
        )
    };
    let run = Run::with_data(&(chat("user", "assistant") + &chat("user", "user")));
    let template = run.model.join("chat_template.jinja");
    let source = "{% for m in messages %}\n{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\n\
        {{ raise_exception('roles must alternate, not ' + m.role) }}\n{% endif %}\n{{ m.content }}\n{% endfor %}";
    fs::write(&template, source).unwrap();
    run.fails("", &["data.jsonl`, line 2", "chat_template.jinja`, line 3 of", ": roles must alternate, not user"]);
    fs::write(&template, "{{ messages[0].content + 1 }}").unwrap();
    run.fails("", &["data.jsonl`, line 1", "chat_template.jinja`, line 1 of", "invalid operation"]);
    fs::write(&template, "\n{% if %}").unwrap();
    run.fails("", &["chat_template.jinja`, line 2 of", "syntax error"]);
    fs::remove_file(&template).unwrap();
    fs::write(run.model.join("tokenizer_config.json"), "{}").unwrap();
    run.fails("", &[run.model.to_str().unwrap(), "has no chat template"]);
    unsloth(line("generate --model {} --chat hello", &[&run.model])).failed_with(&["has no chat template"]);
}

#[test]
fn labels_of_another_length() {
    let run = Run::with_data("{\"input_ids\": [1, 2, 3], \"labels\": [1, 2]}\n");
    run.fails("", &["data.jsonl`, line 1", "`labels` has 2 entries", "`input_ids` has 3"]);
}

#[test]
fn ids_beyond_the_vocabulary() {
    let run = Run::with_data("{\"input_ids\": [1, 2]}\n\n{\"input_ids\": [3, 1024]}\n");
    run.fails("", &["data.jsonl`, line 3", "`input_ids` holds 1024 at index 1", "vocabulary size 1024"]);
    Run::with_data("{\"input_ids\": [-1, 2]}\n").fails("", &["`input_ids` holds -1 at index 0"]);
}

#[test]
fn labels_out_of_range() {
    let run = Run::with_data("{\"input_ids\": [1, 2], \"labels\": [-100, 2000]}\n");
    run.fails("", &["data.jsonl`, line 1", "`labels` holds 2000 at index 1", "-100"]);
}

#[test]
fn empty_file() {
    Run::with_data("").fails("", &["data.jsonl`", "no examples"]);
}

#[test]
fn empty_example() {
    Run::with_data("{\"input_ids\": []}\n").fails("", &["data.jsonl`, line 1", "`input_ids` is empty"]);
}

#[test]
fn all_labels_masked() {
    let run = Run::with_data("{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, -100]}\n");
    run.fails("", &["data.jsonl`", "none of the 1 examples has a target"]);
}

#[test]
fn second_file_is_named() {
    let run = Run::new();
    let second = run.folder.path().join("second.jsonl");
    fs::write(&second, "{\"input_ids\": [1, 2]}\n[1, 2]\n").unwrap();
    run.fails(&format!("--data {}", second.display()), &["second.jsonl`, line 2"]);
}

#[test]
fn options_out_of_range() {
    let run = Run::new();
    for (options, parts) in [
        ("--rank 0", ["rank = 0", "at least 1"]),
        ("--rank 65", ["rank = 65", "64"]),
        ("--alpha nan", ["alpha = NaN", "finite"]),
        ("--learning-rate inf", ["learning_rate = inf", "finite"]),
        ("--batch-size 0", ["batch_size = 0", "at least 1"]),
        ("--grad-accum 0", ["grad_accum = 0", "at least 1"]),
        ("--max-seq-len 0", ["max_seq_len = 0", "at least 1"]),
        ("--max-seq-len 1", ["none of the 40 examples", "first 1 tokens"]),
        ("--warmup-ratio 2", ["warmup_ratio = 2", "[0, 1]"]),
        ("--beta1 1", ["beta1 = 1", "[0, 1)"]),
        ("--max-grad-norm 0", ["max_grad_norm = 0", "positive"]),
        ("--optimizer sgd --momentum 1", ["momentum = 1", "[0, 1)"]),
        ("--optimizer sgd --beta1 0.8", ["beta1 = 0.8", "used with adamw"]),
        ("--nesterov", ["nesterov = 1", "used with sgd"]),
        ("--decay-steps 3", ["decay_steps = 3", "wsd"]),
        ("--schedule polynomial --end-learning-rate 1", ["end_learning_rate = 1", "below the learning rate"]),
        ("--threads 0", ["num_threads = 0", "at least 1"]),
        ("--device npu", ["name = npu", "cpu, vulkan:N, wgpu or cuda:N"]),
        ("--device vulkan:99", ["name = vulkan:99", if cfg!(feature = "wgpu") { "device" } else { "--features wgpu" }]),
        ("--device cuda:99", ["name = cuda:99", if cfg!(feature = "cuda") { "device" } else { "--features" }]),
        ("--device vulkan:0 --threads 2", ["--threads", "vulkan:0"]),
        ("--targets q_proj,z_proj", ["z_proj", "gate_proj"]),
        ("--adapter {} --rank 4", ["rank = 4", "8, as the adapter in"]),
        ("--adapter {} --alpha 8", ["alpha = 8", "16, as the adapter in"]),
        ("--adapter {} --targets q_proj", ["targets = q_proj", "differs"]),
    ] {
        run.fails(options, &parts);
    }
}

#[test]
fn missing_and_damaged_adapter() {
    let run = Run::new();
    let adapter = run.folder.path().join("adapter");
    let option = format!("--adapter {}", adapter.display());
    run.fails(&option, &["adapter_config.json", "No such file"]);
    fs::create_dir(&adapter).unwrap();
    let source = fixture("tiny-llama").join("adapter");
    fs::copy(source.join("adapter_config.json"), adapter.join("adapter_config.json")).unwrap();
    run.fails(&option, &["adapter_model.safetensors"]);
    let bytes = fs::read(source.join("adapter_model.safetensors")).unwrap();
    fs::write(adapter.join("adapter_model.safetensors"), &bytes[..bytes.len() - 4]).unwrap();
    run.fails(&option, &["adapter_model.safetensors"]);
}

#[test]
fn unwritable_output() {
    let run = Run::new();
    fs::write(&run.output, "a file").unwrap();
    // Found out before the model is read: there is none.
    fs::remove_dir_all(&run.model).unwrap();
    run.train("").failed_with(&["cannot create", run.output.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(&run.output).unwrap(), "a file");
    let below = run.output.join("deeper");
    let args = line("train --model {} --data {} --output {}", &[&run.model, &run.data, &below]);
    unsloth(args).failed_with(&["cannot create", below.to_str().unwrap()]);
}

#[cfg(target_os = "linux")]
#[test]
fn read_only_output() {
    let run = Run::new();
    // A file system that even root cannot write to.
    let args = line("train --model {} --data {} --output /proc/unsloth", &[&run.model, &run.data]);
    unsloth(args).failed_with(&["cannot create `/proc/unsloth`"]);
    let args = line("train --model {} --data {} --output /proc", &[&run.model, &run.data]);
    unsloth(args).failed_with(&["cannot write to `/proc`"]);
}

#[test]
fn examples_longer_than_the_limit_are_cut() {
    let run = Run::with_data(&format!("{{\"input_ids\": {:?}}}\n", vec![7; 5000]));
    let outcome = run.train("--max-seq-len 33").succeeded();
    assert!(outcome.stderr.contains("data: 1 examples, 33 tokens"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("1 examples cut to the limit (limit 33 tokens)"), "{}", outcome.stderr);
}

#[test]
fn wrong_usage() {
    let run = Run::new();
    for options in [
        "--offload tape",
        "--paged-optimizer",
        "--resume --overwrite",
        "--eval-data x --eval-split 0.1",
        "--steps 2 --epochs 1",
        "--warmup-steps 2 --warmup-ratio 0.1",
        "--packing maybe",
        "--train-on questions",
        "--schedule sawtooth",
        "--checkpointing every:0",
        "--dtype int8",
        "--rank -1",
        "--targets q_proj,,v_proj",
        "surplus",
    ] {
        let outcome = run.train(options);
        assert_eq!(outcome.status, 2, "{options}: {}", outcome.stderr);
        assert!(outcome.stderr.starts_with("error: ") && outcome.stdout.is_empty(), "{}", outcome.stderr);
        assert!(!run.output.exists());
    }
    for args in [
        "",
        "train",
        "eval --model x",
        "generate --model x",
        "generate --model x --prompt a --tokens 1",
        "generate --model x --prompt a --chat b",
        "fly",
    ] {
        let outcome = unsloth(line(args, &[]));
        assert_eq!(outcome.status, 2, "{args}: {}", outcome.stderr);
    }
    assert_eq!(unsloth(["train", "--help"]).status, 0);
}

#[test]
fn nan_in_the_checkpoint_stops_the_first_step() {
    let run = Run::new();
    run.change_tensor("model.norm.weight", |_, data| data[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    run.train("--adapter {} --learning-rate 1").failed_with(&[
        "after step 0 is saved",
        run.output.to_str().unwrap(),
        "step 1",
        "NaN",
    ]);
    let saved = read_tensors(&run.output.join("adapter_model.safetensors"));
    assert_eq!(saved, read_tensors(&fixture("tiny-llama").join("adapter/adapter_model.safetensors")));
    assert!(run.output.join("tokenizer.json").exists());
    assert!(read_metrics(&run.output).is_empty());
}

#[test]
fn divergence_keeps_the_last_good_step() {
    // The first step is finite and moves every parameter by about 1e20; the second overflows.
    let options = "--warmup-steps 0 --schedule constant --learning-rate 1e20 --weight-decay 0 --rank 4";
    let diverging = Run::new();
    let outcome = diverging.train(options).failed_with(&["after step 1 is saved", "step 2"]);
    assert!(!outcome.stderr.contains("step 3"));
    assert_eq!(read_metrics(&diverging.output).len(), 1);
    let one_step = Run::new();
    let args =
        line("train --model {} --data {} --output {} --steps 1", &[&one_step.model, &one_step.data, &one_step.output]);
    unsloth(args.into_iter().chain(line(options, &[]))).succeeded();
    assert_eq!(adapter_bytes(&diverging.output), adapter_bytes(&one_step.output));
    assert!(!names(&diverging.output).iter().any(|name| name.contains("tmp") || name.contains("partial")));
}

#[test]
fn eval_and_generate_refuse_as_clearly() {
    let run = Run::with_data("{\"input_ids\": [1, 9999]}\n");
    let eval = |options: &str| {
        let mut args = line("eval --model {} --data {}", &[&run.model, &run.data]);
        args.extend(line(options, &[]));
        let outcome = unsloth(args);
        assert!(outcome.stdout.is_empty());
        outcome
    };
    eval("").failed_with(&["data.jsonl`, line 1", "9999"]);
    eval("--batch-size 0").failed_with(&["batch_size = 0"]);
    eval("--adapter nowhere").failed_with(&["nowhere/adapter_config.json"]);
    let generate = |options: &str| unsloth(line(&format!("generate --model {{}} {options}"), &[&run.model]));
    generate("--tokens 1,1024").failed_with(&["prompt", "1024", "1023"]);
    generate("--tokens=-1").failed_with(&["prompt", "-1"]);
    generate("--tokens 1 --temperature=-1").failed_with(&["temperature = -1", "0 (greedy) or more"]);
    generate("--tokens 1 --temperature inf").failed_with(&["temperature = inf", "finite"]);
    generate("--tokens 1 --top-k 0").failed_with(&["top_k = 0", "at least 1"]);
    generate("--tokens 1 --top-p 1.5").failed_with(&["top_p = 1.5", "in [0, 1]"]);
    generate("--tokens 1 --min-p=-0.5").failed_with(&["min_p = -0.5", "in [0, 1]"]);
    run.change_tensor("model.norm.weight", |_, data| data[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    generate("--tokens 1,2").failed_with(&["logits"]);
    fs::write(&run.data, "{\"input_ids\": [1, 2]}\n").unwrap();
    eval("--json").failed_with(&["loss", "NaN"]);
}
