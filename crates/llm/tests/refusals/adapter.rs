//! Adapter folders, targets and ranks.

use std::{fs, path::Path};

use serde_json::{Value, json};
use unsloth_core::Device;
use unsloth_llm::{Result, adapter::AdapterConfig, peft};
use unsloth_train::LoraConfig;

use crate::{
    common::{Folder, fixture, load},
    refused,
};

const ADAPTER: &str = "adapter_config.json";

fn adapter(device: &Device, folder: &Path) -> Result<AdapterConfig> {
    let mut decoder = load(device, "tiny-llama");
    let result = peft::load(folder, &mut decoder);
    assert_eq!(result.is_err(), decoder.linears().all(|linear| linear.adapter.is_none()), "a failure changes nothing");
    result
}

fn on(targets: &str, lora: LoraConfig) -> AdapterConfig {
    AdapterConfig::new(lora, targets.parse().unwrap())
}

#[test]
fn settings_that_mean_nothing() {
    let mut decoder = load(&unsloth_cpu::device(), "tiny-llama");
    let plain = on("q_proj,v_proj", LoraConfig::new(2, 1.0));
    let layers = AdapterConfig { layers_to_transform: Some(vec![0, 4]), ..plain.clone() };
    refused(decoder.add_adapters(&layers, 0), &["layers_to_transform = 4", "layers from 0 to 3"]);
    let rank = AdapterConfig { rank_pattern: vec![("k_proj".parse().unwrap(), 3)], ..plain.clone() };
    refused(decoder.add_adapters(&rank, 0), &["rank_pattern = `k_proj`", "a layer with an adapter"]);
    let alpha = AdapterConfig { alpha_pattern: vec![("proj".parse().unwrap(), 3.0)], ..plain.clone() };
    refused(decoder.add_adapters(&alpha, 0), &["alpha_pattern = `proj`", "a layer with an adapter"]);
    let negative = LoraConfig { alpha: -1.0, init: "pissa".parse().unwrap(), ..plain.lora };
    refused(decoder.add_adapters(&on("q_proj", negative), 0), &["alpha = -1", "above 0 with pissa"]);
    assert!(decoder.linears().all(|linear| linear.adapter.is_none()) && decoder.adapters().is_none());
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
        ("bias", json!("some"), "none, all or lora_only"),
        ("modules_to_save", json!(["norm"]), "embed_tokens and lm_head"),
        ("modules_to_save", json!("lm_head"), "a list of"),
        ("fan_in_fan_out", json!(true), "false: transposed"),
        ("layers_to_transform", json!([0, -1]), "a list of layers, from 0"),
        ("layers_pattern", json!("blocks"), "absent or layers"),
        ("rank_pattern", json!({"q_proj": 0}), "ranks of 1 or more"),
        ("rank_pattern", json!({"(?=q)": 4}), "regular expressions without look-around"),
        ("alpha_pattern", json!({"q_proj": 1e39}), "numbers that 32 bits can hold"),
        ("init_lora_weights", json!("olora"), "others change the base weights"),
        ("init_lora_weights", json!("kaiming"), "others change the base weights"),
        ("exclude_modules", json!(["q_proj"]), "name the layers in target_modules"),
        ("trainable_token_indices", json!([3]), "trained tokens"),
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
    decoder.add_adapters(&on("q_proj", config), 0).unwrap();
    let again = decoder.add_adapters(&on("k_proj", config), 0);
    refused(again, &["model.layers.0.self_attn.q_proj", "has an adapter already"]);
    let loaded = peft::load(&fixture("tiny-llama").join("adapter"), &mut decoder);
    refused(loaded, &["model.layers.0.self_attn.q_proj", "has an adapter already"]);

    decoder.linears_mut().next().unwrap().adapter.as_mut().unwrap().config.rank = 4;
    refused(peft::save(folder.path(), &decoder), &["q_proj", "rank 4, the model's adapters have 8"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn unwritable_output() {
    let device = unsloth_cpu::device();
    let mut decoder = load(&device, "tiny-llama");
    decoder.add_adapters(&on("q_proj", LoraConfig::new(1, 1.0)), 0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "not a folder").unwrap();
    refused(peft::save(&file.join("out"), &decoder), &["cannot create", "file/out"]);
}

#[test]
fn bad_targets_and_ranks() {
    let device = unsloth_cpu::device();
    let mut decoder = load(&device, "tiny-llama");
    let mut add = |rank, targets: &str| {
        decoder.add_adapters(&AdapterConfig::new(LoraConfig::new(rank, 1.0), targets.parse()?), 0)
    };
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
