//! Safetensors files, shards and their index.

use std::fs;

use safetensors::Dtype;
use serde_json::{Value, json};
use unsloth_core::DType;
use unsloth_llm::{
    decoder::{Decoder, LoadOptions},
    weights::{Checkpoint, Wanted, WeightSource},
};

use crate::{
    WEIGHTS,
    common::{Folder, fixture},
    decoder, refused,
};

#[test]
fn damaged_weights() {
    let whole = fs::read(fixture("tiny-llama").join("model").join(WEIGHTS)).unwrap();
    let mut long_header = whole.clone();
    long_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut no_json = whole.clone();
    no_json[8] = b'x';
    let cases: [(&[u8], &str); 6] = [
        (&[], "header"),
        (&whole[..5], "header"),
        (&whole[..1000], "invalid header length"),
        (&whole[..whole.len() - 1], "incomplete metadata"),
        (&long_header, "header too large"),
        (&no_json, "invalid JSON in header"),
    ];
    for (bytes, what) in cases {
        let folder = Folder::copy("tiny-llama", "model");
        fs::write(folder.file(WEIGHTS), bytes).unwrap();
        refused(decoder(&folder), &["model.safetensors", "not a complete safetensors file", what]);
    }
}

#[test]
fn tensors_that_do_not_fit_the_config() {
    let up = "model.layers.1.mlp.up_proj.weight";
    let folder = Folder::copy("tiny-llama", "model");
    folder.edit_tensors(WEIGHTS, |tensors| drop(tensors.remove(up)));
    refused(decoder(&folder), &["model.safetensors", up, "is missing"]);

    let folder = Folder::copy("tiny-llama", "model");
    folder.edit_tensors(WEIGHTS, |tensors| tensors.get_mut(up).unwrap().shape.reverse());
    refused(decoder(&folder), &["model.safetensors", up, "shape [64, 176], expected [176, 64]"]);

    let folder = Folder::copy("tiny-llama", "model");
    folder.edit_tensors(WEIGHTS, |tensors| tensors.get_mut(up).unwrap().dtype = Dtype::I32);
    refused(decoder(&folder), &["model.safetensors", up, "dtype I32, must be F32, F16 or BF16"]);

    let folder = Folder::copy("tiny-llama", "model");
    folder.set("config.json", "vocab_size", json!(2048));
    refused(decoder(&folder), &["model.embed_tokens.weight", "shape [1024, 64], expected [2048, 64]"]);

    // Untied, but there is no head.
    let folder = Folder::copy("tiny-llama3", "model");
    folder.set("config.json", "tie_word_embeddings", json!(false));
    refused(decoder(&folder), &["lm_head.weight", "is missing"]);
}

#[test]
fn missing_weights_and_shards() {
    let folder = Folder::copy("tiny-llama", "model");
    let index = |weight_map: Value| {
        fs::write(folder.file("model.safetensors.index.json"), json!({ "weight_map": weight_map }).to_string())
            .unwrap();
    };
    fs::rename(folder.file(WEIGHTS), folder.file("model-1.safetensors")).unwrap();
    refused(decoder(&folder), &["neither `model.safetensors` nor `model.safetensors.index.json`"]);
    index(json!({"model.norm.weight": "model-2.safetensors"}));
    refused(decoder(&folder), &["model.safetensors.index.json", "shard `model-2.safetensors` is missing"]);
    index(json!({"model.other.weight": "model-1.safetensors"}));
    refused(decoder(&folder), &["index.json", "`model.other.weight` is not in the shard that the index names"]);
    index(json!({"model.norm.weight": "../model-1.safetensors"}));
    refused(
        decoder(&folder),
        &["index.json", "`weight_map.model.norm.weight` = \"../model-1.safetensors\"", "same folder"],
    );
    index(json!({"model.norm.weight": "model-1.safetensors"}));
    refused(decoder(&folder), &["index.json", "`model.embed_tokens.weight` is missing"]);
    index(json!([1]));
    refused(decoder(&folder), &["index.json", "`weight_map` = [1]"]);
}

#[test]
fn unused_tensors_are_told() {
    let folder = Folder::copy("tiny-llama", "model");
    folder.edit_tensors(WEIGHTS, |tensors| {
        let norm = tensors["model.norm.weight"].clone();
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), norm.clone());
        tensors.insert("vision.weight".to_owned(), norm);
    });
    assert_eq!(decoder(&folder).unwrap().unused_tensors(), ["vision.weight"]);
}

#[test]
fn weights_wanted_as_they_are_stored_are_not_copied() {
    let device = unsloth_cpu::device();
    let path = fixture("tiny-llama").join("model").join(WEIGHTS);
    let checkpoint = Checkpoint::open_file(&path).unwrap();
    assert_eq!(checkpoint.stored_shape("model.norm.weight").unwrap(), [64]);
    let take = |dtype| {
        let category = unsloth_core::Category::Weights;
        let wanted = Wanted { name: "lm_head.weight", shape: [1024, 64].into(), dtype, category };
        checkpoint.tensor(&device, &wanted).unwrap()
    };
    // A mapped tensor is read-only even when nobody shares it.
    let mut mapped = take(DType::F32);
    let values = mapped.to_vec::<f32>().unwrap();
    assert!(matches!(mapped.write(&values), Err(unsloth_core::Error::Shared { .. })));
    let mut converted = take(DType::BF16);
    let values = converted.to_vec::<half::bf16>().unwrap();
    converted.write(&values).unwrap();
}

#[test]
fn activations_must_be_floats() {
    let folder = fixture("tiny-llama").join("model");
    let result = Decoder::load(&folder, &unsloth_cpu::device(), LoadOptions::frozen(DType::I32));
    refused(result, &["i32", "f32, f16 or bf16"]);
}
