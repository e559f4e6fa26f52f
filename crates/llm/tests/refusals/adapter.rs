//! Adapter folders, targets and ranks.

use std::{fs, path::Path};

use serde_json::{Value, json};
use unsloth_core::Device;
use unsloth_llm::{Result, decoder::Targets, peft};
use unsloth_train::LoraConfig;

use crate::{
    common::{Folder, fixture, load},
    refused,
};

const ADAPTER: &str = "adapter_config.json";

fn adapter(device: &Device, folder: &Path) -> Result<LoraConfig> {
    let mut decoder = load(device, "tiny-llama");
    let result = peft::load(folder, &mut decoder);
    assert_eq!(result.is_err(), decoder.linears().all(|linear| linear.adapter.is_none()), "a failure changes nothing");
    result
}

#[test]
fn adapter_settings() {
    let device = unsloth_cpu::device();
    let cases = [
        ("r", json!(0), "a whole number from 1"),
        ("r", Value::Null, "a whole number from 1"),
        ("lora_alpha", json!("16"), "a finite number"),
        ("peft_type", json!("IA3"), "LORA"),
        ("task_type", json!("SEQ_CLS"), "CAUSAL_LM"),
        ("use_dora", json!(true), "false: DoRA"),
        ("bias", json!("all"), "none: trained biases"),
        ("modules_to_save", json!(["lm_head"]), "fully trained modules"),
        ("fan_in_fan_out", json!(true), "false: transposed"),
        ("layers_to_transform", json!([0, 1]), "target_modules"),
        ("rank_pattern", json!({"q_proj": 4}), "one rank"),
        ("alpha_pattern", json!({"q_proj": 4}), "one alpha"),
        ("init_lora_weights", json!("pissa"), "leaves the base weights as they are"),
        ("target_modules", json!([]), "a list of names"),
        ("target_modules", Value::Null, "a list of names or a string"),
    ];
    for (field, value, rule) in cases {
        let folder = Folder::copy("tiny-llama", "adapter");
        let shown = if value.is_null() { "missing".to_owned() } else { value.to_string() };
        folder.set(ADAPTER, field, value);
        refused(adapter(&device, folder.path()), &[ADAPTER, &format!("`{field}` = {shown}"), rule]);
    }
    let folder = Folder::copy("tiny-llama", "adapter");
    folder.set(ADAPTER, "lora_dropout", json!(0.05));
    folder.set(ADAPTER, "target_modules", json!("all-linear"));
    adapter(&device, folder.path()).unwrap();
}

#[test]
fn adapter_files() {
    const FILE: &str = "adapter_model.safetensors";
    let device = unsloth_cpu::device();
    let q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let edited = |edit: &dyn Fn(&Folder)| {
        let folder = Folder::copy("tiny-llama", "adapter");
        edit(&folder);
        adapter(&device, folder.path())
    };
    refused(edited(&|f| fs::remove_file(f.file(ADAPTER)).unwrap()), &["cannot read", ADAPTER]);
    refused(edited(&|f| fs::remove_file(f.file(FILE)).unwrap()), &["cannot read", FILE]);
    refused(edited(&|f| fs::write(f.file(FILE), b"").unwrap()), &[FILE, "not a complete safetensors file"]);
    let missing = edited(&|f| f.edit_tensors(FILE, |tensors| drop(tensors.remove(q))));
    refused(missing, &[FILE, q, "is missing"]);
    let rank = edited(&|f| f.set(ADAPTER, "r", json!(4)));
    refused(rank, &[FILE, q, "shape [8, 64], expected [4, 64]"]);
    let shape = edited(&|f| f.edit_tensors(FILE, |tensors| tensors.get_mut(q).unwrap().shape = vec![64, 8]));
    refused(shape, &[FILE, q, "shape [64, 8], expected [8, 64]"]);
    let unexpected = edited(&|f| f.set(ADAPTER, "target_modules", json!(["k_proj"])));
    refused(unexpected, &[FILE, "does not belong to any targeted layer"]);
    let unknown = edited(&|f| f.set(ADAPTER, "target_modules", json!(["c_attn"])));
    refused(unknown, &["`c_attn`", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"]);
}

#[test]
fn adapters_are_added_once_and_saved_only_where_there_are_some() {
    let device = unsloth_cpu::device();
    let mut decoder = load(&device, "tiny-llama");
    let folder = tempfile::tempdir().unwrap();
    refused(peft::save(folder.path(), &decoder), &["no adapter to save"]);
    let config = LoraConfig::new(8, 16.0);
    decoder.add_adapters(&config, &"q_proj".parse().unwrap(), 0).unwrap();
    let again = decoder.add_adapters(&config, &Targets::AllLinear, 0);
    refused(again, &["model.layers.0.self_attn.q_proj", "has an adapter already"]);
    let loaded = peft::load(&fixture("tiny-llama").join("adapter"), &mut decoder);
    refused(loaded, &["model.layers.0.self_attn.q_proj", "has an adapter already"]);

    decoder.add_adapters(&LoraConfig::new(4, 8.0), &"k_proj".parse().unwrap(), 0).unwrap();
    refused(peft::save(folder.path(), &decoder), &["k_proj", "rank 4, the others have 8"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn unwritable_output() {
    let device = unsloth_cpu::device();
    let mut decoder = load(&device, "tiny-llama");
    decoder.add_adapters(&LoraConfig::new(1, 1.0), &"q_proj".parse().unwrap(), 0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "not a folder").unwrap();
    refused(peft::save(&file.join("out"), &decoder), &["cannot create", "file/out"]);
}

#[test]
fn bad_targets_and_ranks() {
    let device = unsloth_cpu::device();
    let mut decoder = load(&device, "tiny-llama");
    let mut add = |rank, targets: &str| decoder.add_adapters(&LoraConfig::new(rank, 1.0), &targets.parse()?, 0);
    refused(add(8, "q_proj,c_attn"), &["`c_attn`", "the model has: down_proj, gate_proj"]);
    // Whole parts of a path only.
    refused(add(8, "proj"), &["`proj`"]);
    refused(add(8, "lm_head"), &["`lm_head`", "head are not supported"]);
    refused(add(8, "q_proj,,k_proj"), &["targets", "separated by commas"]);
    refused(add(0, "all-linear"), &["rank = 0"]);
    // k_proj has 32 outputs; q_proj, which comes first, would do with 64.
    refused(add(64, "q_proj,k_proj"), &["k_proj", "rank = 64", "32"]);
    assert!(decoder.linears().all(|linear| linear.adapter.is_none()), "a failure changes nothing");
}
