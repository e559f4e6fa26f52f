//! `config.json` and `generation_config.json`.

use std::fs;

use serde_json::{Value, json};
use unsloth_core::{
    DType,
    ops::{
        attention::Window,
        rope_table::{RopeSpec, Scaling},
    },
};
use unsloth_llm::{
    Error, Result,
    config::{DecoderConfig, LayerConfig},
};

use crate::{common::Folder, refused};

pub(crate) fn config(model: &str, fields: &[(&str, Value)]) -> Result<DecoderConfig> {
    let folder = Folder::copy(model, "model");
    for (field, value) in fields {
        folder.set("config.json", field, value.clone());
    }
    DecoderConfig::load(folder.path())
}

#[test]
fn config_fields_out_of_range_or_unsupported() {
    let cases = [
        ("vocab_size", json!(0), "a whole number from 1"),
        ("vocab_size", json!(-5), "a whole number from 1"),
        ("vocab_size", json!(3_000_000_000u64), "a whole number from 1 to 2147483647"),
        ("hidden_size", json!("64"), "a whole number"),
        ("hidden_size", Value::Null, "a whole number"),
        ("num_hidden_layers", json!(2.5), "a whole number"),
        ("num_key_value_heads", json!(3), "a divisor of num_attention_heads"),
        ("head_dim", json!(15), "even number of channels"),
        ("head_dim", json!(258), "at most 256"),
        ("rms_norm_eps", json!(0.0), "positive"),
        ("rms_norm_eps", json!(-1.0), "positive"),
        ("hidden_act", json!("relu"), "silu, swish, gelu"),
        ("eos_token_id", json!([2, -1]), "a token id or a list"),
        ("tie_word_embeddings", json!("no"), "true or false"),
        ("pretraining_tp", json!(2), "1: split matrices"),
        ("partial_rotary_factor", json!(0.5), "1: partly rotated"),
        ("attention_dropout", json!(0.1), "0: dropout"),
        ("is_causal", json!(false), "true: attention to later tokens"),
        ("use_bidirectional_attention", json!(true), "false: attention to later tokens"),
        ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "absent: quantised checkpoints"),
        ("num_experts", json!(8), "absent: mixtures of experts"),
        ("architectures", json!("LlamaForCausalLM"), "a list of class names"),
        ("rope_scaling", json!("yarn"), "an object"),
    ];
    for (field, value, rule) in cases {
        let shown = if value.is_null() { "missing".to_owned() } else { value.to_string() };
        refused(config("tiny-llama", &[(field, value)]), &["config.json`", &format!("`{field}` = {shown}"), rule]);
    }
}

#[test]
fn eps_that_underflows() {
    refused(config("tiny-llama", &[("rms_norm_eps", json!(1e-60))]), &["`rms_norm_eps` = 1", "e-60, must be positive"]);
}

#[test]
fn unsupported_architectures() {
    refused(
        config("tiny-llama", &[("model_type", json!("mamba"))]),
        &["config.json", "`mamba`", "llama, mistral, qwen2, qwen3, gemma2, gemma3_text"],
    );
    let class = json!(["LlamaForSequenceClassification"]);
    refused(config("tiny-llama", &[("architectures", class)]), &["`LlamaForSequenceClassification`"]);
    refused(config("tiny-llama", &[("model_type", Value::Null)]), &["`model_type` = missing", "a model family"]);
    refused(config("tiny-qwen2", &[("num_key_value_heads", Value::Null)]), &["`num_key_value_heads` = missing"]);
}

#[test]
fn files_that_are_not_a_config() {
    let folder = Folder::copy("tiny-llama", "model");
    fs::write(folder.file("config.json"), "{\"model_type\": \"llama\",\n \"vocab_size\": }").unwrap();
    refused(DecoderConfig::load(folder.path()), &["config.json", "line 2"]);
    fs::write(folder.file("config.json"), "[1, 2]").unwrap();
    refused(DecoderConfig::load(folder.path()), &["config.json", "expected a map"]);
    fs::remove_file(folder.file("config.json")).unwrap();
    refused(DecoderConfig::load(folder.path()), &["cannot read", "config.json"]);
    let folder = Folder::copy("tiny-llama", "model");
    folder.set("generation_config.json", "eos_token_id", json!("</s>"));
    refused(DecoderConfig::load(folder.path()), &["generation_config.json", "`eos_token_id` = \"</s>\""]);
}

#[test]
fn defaults_of_old_configs_and_harmless_fields() {
    let removed = ["num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "architectures"];
    let mut fields: Vec<(&str, Value)> = removed.map(|field| (field, Value::Null)).to_vec();
    fields.extend([("max_sequence_length", json!(99)), ("transformers.js_config", json!({"dtype": "q4"}))]);
    let config = config("tiny-llama", &fields).unwrap();
    assert_eq!((config.num_kv_heads, config.head_dim, config.max_position_embeddings), (4, 16, 2048));
    let rope = RopeSpec { head_dim: 16, theta: 10_000.0, scaling: Scaling::Default };
    assert_eq!(config.layers, [LayerConfig { window: Window::Full, rope }; 4]);
}

#[test]
fn end_of_sequence_ids_come_from_generation_config_first() {
    let folder = Folder::copy("tiny-llama", "model");
    folder.set("generation_config.json", "eos_token_id", json!([7, 9]));
    assert_eq!(DecoderConfig::load(folder.path()).unwrap().eos_token_ids, [7, 9]);
    folder.set("generation_config.json", "eos_token_id", Value::Null);
    assert_eq!(DecoderConfig::load(folder.path()).unwrap().eos_token_ids, [4]);
    fs::remove_file(folder.file("generation_config.json")).unwrap();
    assert_eq!(DecoderConfig::load(folder.path()).unwrap().eos_token_ids, [4]);
}

/// Rope of a configuration with the given `rope_scaling` in the spelling of transformers 4.
fn rope(scaling: Value) -> Result<Scaling> {
    let fields = [("rope_parameters", Value::Null), ("rope_theta", json!(5e5)), ("rope_scaling", scaling)];
    let config = config("tiny-llama", &fields)?;
    let rope = config.layers[0].rope;
    assert!(config.layers.iter().all(|layer| layer.rope == rope));
    assert_eq!((rope.theta, rope.head_dim), (5e5, 16));
    Ok(rope.scaling)
}

#[test]
fn rope_types() {
    assert_eq!(rope(json!({"type": "linear", "factor": 2.0})).unwrap(), Scaling::Linear { factor: 2.0 });
    let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4});
    let expected = Scaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        // Not in the object: the model's own limit.
        original_max_position_embeddings: 512,
    };
    assert_eq!(rope(llama3).unwrap(), expected);
    // `rope_type` wins over the older `type`.
    assert_eq!(rope(json!({"type": "mrope", "rope_type": "default"})).unwrap(), Scaling::Default);
    assert_eq!(rope(json!({})).unwrap(), Scaling::Default);
}

fn yarn(fields: Value) -> Result<(f64, f64, bool, usize)> {
    let mut scaling =
        json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "finetuned": true});
    scaling.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    match rope(scaling)? {
        Scaling::Yarn {
            factor,
            attention_factor,
            truncate,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
        } => {
            assert_eq!((beta_fast, beta_slow), (32.0, 1.0));
            Ok((factor, attention_factor, truncate, original_max_position_embeddings))
        }
        other => panic!("{other:?}"),
    }
}

/// Factors are those of transformers' `_compute_yarn_parameters`.
#[test]
fn yarn_attention_factor() {
    let from_factor = 0.1 * 4f64.ln() + 1.0;
    assert_eq!(yarn(json!({})).unwrap(), (4.0, from_factor, true, 128));
    assert_eq!(yarn(json!({"attention_factor": 1.5, "mscale": 1.0})).unwrap().1, 1.5);
    let both = (0.1 * 0.7 * 4f64.ln() + 1.0) / (0.1 * 1.4 * 4f64.ln() + 1.0);
    assert_eq!(yarn(json!({"mscale": 0.7, "mscale_all_dim": 1.4})).unwrap().1, both);
    // One of the two, or a zero, does not count.
    assert_eq!(yarn(json!({"mscale": 0.7})).unwrap().1, from_factor);
    assert_eq!(yarn(json!({"mscale": 0.7, "mscale_all_dim": 0, "beta_fast": 0})).unwrap().1, from_factor);
    assert!(!yarn(json!({"truncate": false})).unwrap().2);
    // No factor: the ratio of the two lengths.
    assert_eq!(yarn(json!({"factor": null})).unwrap().0, 4.0);
}

#[test]
fn bad_rope_settings() {
    let cases = [
        (
            json!({"type": "dynamic", "factor": 2.0}),
            "`rope_scaling.type` = \"dynamic\"",
            "default, linear, llama3 or yarn",
        ),
        (
            json!({"rope_type": "longrope"}),
            "`rope_scaling.rope_type` = \"longrope\"",
            "default, linear, llama3 or yarn",
        ),
        (json!({"rope_type": "linear"}), "`rope_scaling.factor` = missing", "a finite number"),
        (json!({"rope_type": "linear", "factor": 0.5}), "`rope_scaling.factor` = 0.5", "1 or more"),
        (json!({"rope_type": "linear", "factor": "2"}), "`rope_scaling.factor` = \"2\"", "a finite number"),
        (json!({"rope_type": "llama3", "factor": 8}), "`rope_scaling.low_freq_factor` = missing", "a finite number"),
        (
            json!({"type": "yarn", "factor": 2, "beta_fast": 0.5}),
            "`rope_scaling.beta_fast` = 0.5",
            "at least beta_slow",
        ),
        (
            json!({"type": "yarn", "factor": 2, "attention_factor": -1}),
            "`rope_scaling.attention_factor` = -1",
            "positive",
        ),
        (json!({"rope_theta": -1.0}), "`rope_scaling.rope_theta` = -1", "positive"),
        (json!({"type": "yarn", "factor": 2, "rope_theta": 1.0}), "`rope_scaling.rope_theta` = 1", "finite"),
        (json!({"rope_type": "default", "mrope_section": [1]}), "`rope_scaling.mrope_section` = [1]", "not a setting"),
        (json!({"partial_rotary_factor": 0.25}), "`rope_scaling.partial_rotary_factor` = 0.25", "1: partly rotated"),
    ];
    for (scaling, field, rule) in cases {
        refused(rope(scaling), &["config.json", field, rule]);
    }
}

#[test]
fn errors_can_be_matched() {
    let result = config("tiny-llama", &[("model_type", json!("gpt2"))]);
    assert!(matches!(result, Err(Error::UnsupportedArchitecture { name, .. }) if name == "gpt2"));
}

#[test]
fn type_of_weights_that_are_not_there() {
    let stored = |fields: &[(&str, Value)]| {
        let folder = Folder::copy("tiny-llama", "model");
        folder.set("config.json", "dtype", Value::Null);
        fields.iter().for_each(|(field, value)| folder.set("config.json", field, value.clone()));
        DecoderConfig::stored_dtype(folder.path())
    };
    assert_eq!(stored(&[]).unwrap(), DType::F32);
    assert_eq!(stored(&[("torch_dtype", json!("bfloat16"))]).unwrap(), DType::BF16);
    assert_eq!(stored(&[("torch_dtype", json!("bfloat16")), ("dtype", json!("float16"))]).unwrap(), DType::F16);
    refused(stored(&[("torch_dtype", json!("int8"))]), &["config.json", "torch_dtype", "float32, float16 or bfloat16"]);
    refused(stored(&[("dtype", json!(32))]), &["config.json", "dtype", "a string"]);
}
