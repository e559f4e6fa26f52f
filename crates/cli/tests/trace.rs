//! `--trace-nan`, through the binary: where a planted NaN and an overflow come from, and that looking changes nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

mod support;

use std::{fs, path::Path};

use safetensors::{SafeTensors, tensor::TensorView};
use support::{running::results, *};

fn train(model: &Path, output: &Path, options: &str) -> Outcome {
    let common = "train --model {} --data {} --output {} --steps 3 --learning-rate 1e-2 --warmup-steps 0";
    let mut args = line(common, &[model, &fixture("tiny-llama").join("train.jsonl"), output]);
    args.extend(line(options, &[]));
    unsloth(args)
}

/// Changes the elements of an f32 tensor of the model.
fn spoil(model: &Path, tensor: &str, change: impl Fn(usize, f32) -> f32) {
    let path = model.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = file.tensor(tensor).unwrap();
    let element = |(index, bytes): (usize, &[u8])| change(index, f32::from_le_bytes(bytes.try_into().unwrap()));
    let changed: Vec<u8> = values.data().chunks_exact(4).enumerate().map(element).flat_map(f32::to_le_bytes).collect();
    let views = file.tensors().into_iter().map(|(name, view)| {
        let data = if name == tensor { &changed[..] } else { view.data() };
        (name, TensorView::new(view.dtype(), view.shape().to_vec(), data).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Trains a spoilt model and asserts how it fails.
fn fails_at(tensor: &str, change: impl Fn(usize, f32) -> f32, options: &str, parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_model("tiny-llama", folder.path());
    spoil(&model, tensor, change);
    let outcome = train(&model, &folder.path().join("plain"), options);
    assert!(!outcome.failed_with(&["is not finite"]).stderr.contains("was made by"));
    train(&model, &folder.path().join("traced"), &format!("{options} --trace-nan")).failed_with(parts);
}

#[test]
fn a_planted_nan_is_found_where_it_is() {
    let nan = |index, value| if index == 7 { f32::NAN } else { value };
    for (tensor, op, options) in [
        ("model.layers.2.mlp.up_proj.weight", "lora_linear forward", ""),
        ("model.layers.1.input_layernorm.weight", "rms_norm forward", "--checkpointing sqrt"),
        ("model.layers.3.self_attn.o_proj.weight", "linear forward", "--method full"),
        ("lm_head.weight", "linear_cross_entropy", ""),
    ] {
        let place = format!("at `{tensor}`, which holds one itself");
        fails_at(tensor, nan, options, &["step 1", "first infinity or NaN of step 1", op, &place]);
    }
}

#[test]
fn an_overflow_is_found_where_it_happens() {
    // Sums of 64 products with rows of norm 8 pass 65504, which no f16 is above.
    let place = "`model.layers.2.mlp.gate_proj.lora_A.weight`";
    let parts = ["first infinity or NaN of step 1", "lora_linear forward", place];
    fails_at("model.layers.2.mlp.gate_proj.weight", |_, value| 3e4 * value.signum(), "--dtype f16", &parts);
}

#[test]
fn a_run_without_one_is_the_same_run() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("tiny-llama").join("model");
    for options in ["--dropout 0.1 --checkpointing every:1 --offload host", "--dtype f16", "--dtype bf16 --dora"] {
        let [plain, traced] = ["plain", "traced"].map(|name| folder.path().join(name));
        train(&model, &plain, &format!("{options} --overwrite")).succeeded();
        train(&model, &traced, &format!("{options} --overwrite --trace-nan")).succeeded();
        assert!(adapter_bytes(&plain) == adapter_bytes(&traced), "{options}");
        assert_eq!(results(&plain), results(&traced), "{options}");
    }
}
