//! What families read of `config.json`, each in its own way, and what they refuse.

use serde_json::{Value, json};
use unsloth_core::ops::{
    attention::Window,
    glu::Activation,
    rope_table::{RopeSpec, Scaling},
};
use unsloth_llm::{Result, config::DecoderConfig};

use crate::{config::config, refused};

/// For each layer the earlier tokens that it sees; `None` for all.
fn windows(config: &DecoderConfig) -> Vec<Option<usize>> {
    let left = |window| match window {
        Window::Full => None,
        Window::Sliding { left } => Some(left),
    };
    config.layers.iter().map(|layer| left(layer.window)).collect()
}

#[test]
fn families_differ_in_biases() {
    let llama = config("tiny-llama", &[("attention_bias", json!(true)), ("hidden_act", json!("gelu"))]).unwrap();
    assert_eq!((llama.qkv_bias, llama.o_bias, llama.mlp_bias), (true, true, false));
    assert_eq!(llama.activation, Activation::GeluErf);
    let qwen2 = config("tiny-qwen2", &[]).unwrap();
    assert_eq!((qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias), (true, false, false));
    assert!(qwen2.tie_word_embeddings);
}

/// The configuration of a fixture with fields taken out, which is not always the same as `null`, and others set.
fn without(model: &str, removed: &[&str], fields: &[(&str, Value)]) -> Result<DecoderConfig> {
    let folder = crate::common::Folder::copy(model, "model");
    folder.edit("config.json", |map| removed.iter().for_each(|field| drop(map.remove(*field))));
    fields.iter().for_each(|(field, value)| folder.set("config.json", field, value.clone()));
    DecoderConfig::load(folder.path())
}

#[test]
fn windows_by_the_older_fields() {
    let seen = |model, removed: &[&str], fields: &[(&str, Value)]| windows(&without(model, removed, fields).unwrap());
    let types = &["layer_types"][..];
    assert_eq!(seen("tiny-mistral", &[], &[]), [Some(15); 4]);
    assert_eq!(seen("tiny-mistral", &[], &[("sliding_window", Value::Null)]), [None; 4]);
    assert_eq!(seen("tiny-mistral", &["sliding_window"], &[]), [Some(4095); 4]);
    // As Qwen2 is published: a window that is not used.
    let unused = [("sliding_window", json!(32)), ("use_sliding_window", json!(false)), ("max_window_layers", json!(1))];
    assert_eq!(seen("tiny-qwen2", types, &unused), [None; 4]);
    let used = [("sliding_window", json!(32)), ("use_sliding_window", json!(true)), ("max_window_layers", json!(1))];
    for model in ["tiny-qwen2", "tiny-qwen3"] {
        assert_eq!(seen(model, types, &used), [None, Some(31), Some(31), Some(31)]);
        // Layer 28 and the following, of which there are none.
        assert_eq!(seen(model, &["layer_types", "max_window_layers"], &used[..2]), [None; 4]);
    }
    assert_eq!(seen("tiny-gemma2", types, &[]), [Some(15), None, Some(15), None]);
    let every = |number: usize| [("sliding_window_pattern", json!(number))];
    assert_eq!(seen("tiny-gemma3", types, &every(3)), [Some(15), Some(15), None, Some(15)]);
    assert_eq!(seen("tiny-gemma3", types, &[]), [Some(15); 4]);
    assert_eq!(seen("tiny-gemma3", &["layer_types", "sliding_window"], &every(1)), [None; 4]);
    // `layer_types` wins.
    assert_eq!(seen("tiny-gemma3", &[], &every(3)), [Some(15), Some(15), Some(15), None]);
}

#[test]
fn layer_types_that_do_not_fit() {
    let (full, sliding) = ("full_attention", "sliding_attention");
    let list = "a list of full_attention and sliding_attention, one for each layer";
    for (model, types, rule) in [
        ("tiny-llama", json!([full, full, full, sliding]), "full_attention alone"),
        ("tiny-mistral", json!([sliding, full, sliding, full]), "sliding_attention alone if"),
        ("tiny-gemma2", json!([sliding, full]), list),
        ("tiny-gemma2", json!([sliding, full, "chunked_attention", full]), list),
        ("tiny-gemma2", json!("full_attention"), list),
    ] {
        refused(config(model, &[("layer_types", types)]), &["config.json", "`layer_types` = ", rule]);
    }
    config("tiny-llama", &[("layer_types", json!([full, full, full, full]))]).unwrap();
    let rule = "a number of tokens: some layers see a window alone";
    refused(config("tiny-gemma2", &[("sliding_window", Value::Null)]), &["`sliding_window` = missing", rule]);
    let mixed = json!([full, full, full, sliding]);
    refused(config("tiny-qwen2", &[("layer_types", mixed)]), &["`sliding_window` = ", rule]);
}

#[test]
fn fields_of_other_families() {
    for (model, field, value, rule) in [
        ("tiny-llama", "sliding_window", json!(16), "absent: this family has no sliding windows"),
        ("tiny-llama", "use_sliding_window", json!(true), "false: this family has no such switch"),
        ("tiny-mistral", "use_sliding_window", json!(true), "false: this family has no such switch"),
        ("tiny-mistral", "attention_bias", json!(true), "false: this family has no biases in its attention"),
        ("tiny-qwen3", "mlp_bias", json!(true), "false: this family has no biases in its feed-forward part"),
        ("tiny-qwen2", "attn_logit_softcapping", json!(50.0), "absent: this family does not cap attention scores"),
        ("tiny-llama", "final_logit_softcapping", json!(30.0), "absent: this family does not cap logits"),
        ("tiny-gemma3", "attn_logit_softcapping", json!(50.0), "absent: this family does not cap attention scores"),
        ("tiny-qwen3", "query_pre_attn_scalar", json!(256), "absent: this family scales by head_dim"),
        ("tiny-gemma2", "rope_local_base_freq", json!(1e4), "absent: this family has one rotary base"),
        ("tiny-gemma2", "sliding_window_pattern", json!(3), "absent: this family does not alternate windows"),
        ("tiny-gemma2", "query_pre_attn_scalar", json!(0), "positive and finite"),
        ("tiny-gemma2", "final_logit_softcapping", json!(-1.0), "positive and finite"),
        ("tiny-gemma2", "attn_logit_softcapping", json!("50"), "a finite number"),
        ("tiny-gemma3", "hidden_activation", json!("relu"), "silu, swish, gelu"),
        ("tiny-gemma3", "use_bidirectional_attention", json!(true), "false: attention to later tokens"),
        ("tiny-mistral", "sliding_window", json!(0), "a whole number from 1"),
        ("tiny-qwen3", "num_key_value_heads", Value::Null, "a divisor of num_attention_heads"),
    ] {
        let shown = if value.is_null() { "missing".to_owned() } else { value.to_string() };
        refused(config(model, &[(field, value)]), &["config.json`", &format!("`{field}` = {shown}"), rule]);
    }
}

#[test]
fn a_model_with_vision_is_refused_by_name() {
    let fields = [("model_type", json!("gemma3")), ("text_config", json!({ "model_type": "gemma3_text" }))];
    refused(config("tiny-gemma3", &fields), &["`model_type` = \"gemma3\"", "gemma3_text: images are not supported"]);
}

#[test]
fn caps_and_defaults_of_gemma() {
    let cap = |config: DecoderConfig| (config.attention_softcap, config.logit_softcap);
    let fields = ["attn_logit_softcapping", "final_logit_softcapping"];
    assert_eq!(cap(config("tiny-gemma2", &[]).unwrap()), (Some(2.0), Some(6.0)));
    assert_eq!(cap(without("tiny-gemma2", &fields, &[]).unwrap()), (Some(50.0), Some(30.0)));
    assert_eq!(cap(config("tiny-gemma2", &fields.map(|field| (field, Value::Null))).unwrap()), (None, None));
    assert_eq!(cap(without("tiny-gemma3", &fields, &[]).unwrap()), (None, None));
    assert_eq!(cap(config("tiny-gemma3", &[(fields[1], json!(30))]).unwrap()), (None, Some(30.0)));

    let removed =
        ["head_dim", "query_pre_attn_scalar", "hidden_activation", "tie_word_embeddings", "max_position_embeddings"];
    for (model, limit) in [("tiny-gemma2", 8192), ("tiny-gemma3", 131_072)] {
        // `hidden_act` has no say in this family.
        let config = without(model, &removed, &[("hidden_act", json!("silu"))]).unwrap();
        assert_eq!((config.head_dim, config.attention_scale, config.max_position_embeddings), (256, 1.0 / 16.0, limit));
        assert_eq!(config.activation, Activation::GeluTanh);
        assert!(config.tie_word_embeddings && config.scaled_embedding && config.post_norms);
        assert_eq!((config.norm_weight_offset, config.qk_norm), (1.0, model == "tiny-gemma3"));
    }
}

#[test]
fn two_rotary_bases() {
    let spec = |theta, scaling| RopeSpec { head_dim: 32, theta, scaling };
    let ropes = |fields: &[(&str, Value)]| {
        let config = without("tiny-gemma3", &["rope_parameters"], fields)?;
        assert!(config.layers[..3].iter().all(|layer| layer.rope == config.layers[0].rope));
        Ok((config.layers[3].rope, config.layers[0].rope))
    };
    let plain = Scaling::Default;
    assert_eq!(ropes(&[]).unwrap(), (spec(1e6, plain), spec(1e4, plain)));
    let older = [("rope_theta", json!(5e5)), ("rope_local_base_freq", json!(2e4))];
    assert_eq!(ropes(&older).unwrap(), (spec(5e5, plain), spec(2e4, plain)));
    // What stretches the frequencies of layers that see everything does not touch the others.
    let linear = json!({ "rope_type": "linear", "factor": 8.0 });
    let expected = (spec(5e5, Scaling::Linear { factor: 8.0 }), spec(2e4, plain));
    assert_eq!(ropes(&[older.as_slice(), &[("rope_scaling", linear.clone())]].concat()).unwrap(), expected);
    let full = json!({ "rope_type": "linear", "factor": 8.0, "rope_theta": 5e5 });
    let newer = json!({ "full_attention": full, "sliding_attention": { "rope_theta": 2e4 } });
    assert_eq!(ropes(&[("rope_parameters", newer.clone())]).unwrap(), expected);
    // The fields beside the object stand in for what it lacks.
    let partly = json!({ "full_attention": linear, "sliding_attention": null });
    assert_eq!(ropes(&[older.as_slice(), &[("rope_parameters", partly)]].concat()).unwrap(), expected);

    for (fields, parts) in [
        (
            vec![("rope_parameters", json!({ "rope_theta": 1e4 }))],
            ["`rope_parameters.rope_theta` = ", "two rotary bases"],
        ),
        (
            vec![("rope_parameters", newer), ("rope_scaling", linear)],
            ["`rope_scaling` = {", "absent where there are rope_parameters"],
        ),
        (
            vec![("rope_parameters", json!({ "sliding_attention": { "rope_theta": -1.0 } }))],
            ["`rope_parameters.sliding_attention.rope_theta` = -1", "positive"],
        ),
        (
            vec![("rope_parameters", json!({ "full_attention": { "rope_type": "spiral" } }))],
            ["`rope_parameters.full_attention.rope_type` = \"spiral\"", "default, linear, llama3 or yarn"],
        ),
        (vec![("rope_local_base_freq", json!(-1.0))], ["`rope_local_base_freq` = -1", "positive"]),
        (
            vec![("rope_parameters", json!({ "full_attention": 3 }))],
            ["`rope_parameters.full_attention` = 3", "an object"],
        ),
    ] {
        refused(ropes(&fields), &parts);
    }
}

/// The fields of published checkpoints that matter here.
#[test]
fn published_configurations() {
    let read = |fields: Value| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, fields.to_string()).unwrap();
        DecoderConfig::from_file(&path).unwrap()
    };
    let mistral = read(json!({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000
    }));
    assert_eq!((mistral.head_dim, windows(&mistral)), (128, vec![Some(4095); 32]));
    let qwen3 = read(json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936
    }));
    assert_eq!((qwen3.qk_norm, qwen3.qkv_bias, windows(&qwen3)), (true, false, vec![None; 28]));
    let gemma2 = read(json!({
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "torch_dtype": "float32", "transformers_version": "4.42.4", "use_cache": true, "vocab_size": 256000
    }));
    assert_eq!(windows(&gemma2)[..4], [Some(4095), None, Some(4095), None]);
    assert!(gemma2.tie_word_embeddings);
    let gemma3 = read(json!({
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144
    }));
    assert_eq!(windows(&gemma3)[..7], [Some(511), Some(511), Some(511), Some(511), Some(511), None, Some(511)]);
    assert_eq!((gemma3.layers[0].rope.theta, gemma3.layers[5].rope.theta), (1e4, 1e6));
    assert_eq!(gemma3.eos_token_ids, [1, 106]);
}
