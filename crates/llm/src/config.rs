//! `config.json` of a Hugging Face folder.
//!
//! Both forms are read: that of transformers 5 (`rope_parameters`, `dtype`) and that of transformers 4 (`rope_theta`,
//! `rope_scaling`, `torch_dtype`). A field that would make the model compute something else than this crate does is an error,
//! never ignored. Fields that only describe (`transformers_version`, `use_cache`, `initializer_range`, ..) have no effect.

use std::path::Path;

use serde_json::Value;
use unsloth_core::{
    DType,
    ops::{glu::Activation, rope_table::RopeSpec},
};

use crate::{
    Error, Result,
    fields::{Fields, Neutral, read_object},
    rope_config,
};

/// What defines a decoder, whatever its family.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Entries of the embedding table and outputs of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the matrices of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Channels of a head, even, at most 256.
    pub head_dim: usize,
    /// Added to the mean square in every norm; positive.
    pub rms_norm_eps: f32,
    /// Rotary frequencies.
    pub rope: RopeSpec,
    /// Activation of the gate.
    pub activation: Activation,
    /// Whether the projections to queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub o_bias: bool,
    /// Whether the matrices of the feed-forward part have biases.
    pub mlp_bias: bool,
    /// Whether the head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Longest sequence that the model is meant for, in tokens.
    pub max_position_embeddings: usize,
    /// Tokens that end a generation; may be empty.
    pub eos_token_ids: Vec<i32>,
}

/// Model families; they differ in defaults and biases.
#[derive(Clone, Copy)]
enum Family {
    Llama,
    Qwen2,
}

/// Fields that would change the computation, and the values under which they do not.
const NEUTRAL: &[(&str, Neutral, &str)] = &[
    ("quantization_config", Neutral::Absent, "absent: quantised checkpoints are not supported"),
    ("pretraining_tp", Neutral::Number(1.0), "1: split matrices are not supported"),
    ("partial_rotary_factor", Neutral::Number(1.0), "1: partly rotated heads are not supported"),
    ("use_sliding_window", Neutral::False, "false: sliding-window layers are not supported"),
    ("attention_dropout", Neutral::Number(0.0), "0: dropout of attention probabilities is not supported"),
    ("use_mrope", Neutral::False, "false: multi-axis rotary embedding is not supported"),
    ("is_encoder_decoder", Neutral::False, "false: only decoders are supported"),
    ("add_cross_attention", Neutral::False, "false: cross attention is not supported"),
    ("attn_logit_softcapping", Neutral::Absent, "absent: capped attention scores are not supported"),
    ("final_logit_softcapping", Neutral::Absent, "absent: capped logits are not supported"),
    ("logit_scale", Neutral::Number(1.0), "1: scaled logits are not supported"),
    ("logits_scaling", Neutral::Number(1.0), "1: scaled logits are not supported"),
    ("embedding_multiplier", Neutral::Number(1.0), "1: scaled embeddings are not supported"),
    ("residual_multiplier", Neutral::Number(1.0), "1: scaled residuals are not supported"),
    ("attention_multiplier", Neutral::Absent, "absent: another attention scale is not supported"),
    ("use_qk_norm", Neutral::False, "false: normalised queries and keys are not supported"),
    ("num_local_experts", Neutral::Absent, "absent: mixtures of experts are not supported"),
    ("num_experts", Neutral::Absent, "absent: mixtures of experts are not supported"),
];

fn refused(path: std::path::PathBuf, field: String, value: String, rule: &'static str) -> Error {
    Error::Config { path, field, value, rule }
}

impl DecoderConfig {
    /// Reads `config.json` of a folder, and the end-of-sequence ids of `generation_config.json` if there is one: they win over
    /// those of `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`]; [`Error::UnsupportedArchitecture`]; [`Error::Config`] for a field that is missing, out
    /// of range or not supported.
    pub fn load(folder: &Path) -> Result<Self> {
        let mut config = Self::from_file(&folder.join("config.json"))?;
        let path = folder.join("generation_config.json");
        match read_object(&path) {
            Ok(map) => {
                let ids = Fields::new(&path, &map, refused).ids("eos_token_id")?;
                if !ids.is_empty() {
                    config.eos_token_ids = ids;
                }
            }
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(config)
    }

    /// Reads one file in the form of `config.json`.
    ///
    /// # Errors
    /// As [`DecoderConfig::load`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let map = read_object(path)?;
        let fields = Fields::new(path, &map, refused);
        let family = family(&fields)?;
        fields.require_neutral(NEUTRAL)?;
        check_layer_types(&fields)?;
        Self::parse(&fields, family)
    }

    /// Storage type that `config.json` of a folder names for its weights (`dtype` or `torch_dtype`); f32 where it names none,
    /// as in transformers. Files with weights say it themselves: this is for folders without.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`]; [`Error::Config`] for any other type than f32, f16 and bf16.
    pub fn stored_dtype(folder: &Path) -> Result<DType> {
        let path = folder.join("config.json");
        let map = read_object(&path)?;
        let fields = Fields::new(&path, &map, refused);
        let field = if fields.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        match fields.text(field)?.unwrap_or("float32") {
            "float32" => Ok(DType::F32),
            "float16" => Ok(DType::F16),
            "bfloat16" => Ok(DType::BF16),
            _ => Err(fields.refuse(field, "float32, float16 or bfloat16")),
        }
    }

    fn parse(fields: &Fields<'_>, family: Family) -> Result<Self> {
        let hidden_size = fields.required_size("hidden_size")?;
        let num_heads = fields.required_size("num_attention_heads")?;
        let num_kv_heads = match (family, fields.size("num_key_value_heads")?) {
            (_, Some(number)) => number,
            // Checkpoints older than grouped queries do not have the field.
            (Family::Llama, None) => num_heads,
            (Family::Qwen2, None) => {
                return Err(fields.refuse("num_key_value_heads", "a divisor of num_attention_heads"));
            }
        };
        if !num_heads.is_multiple_of(num_kv_heads) {
            return Err(fields.refuse("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        let max_position_embeddings = fields.size("max_position_embeddings")?.unwrap_or(match family {
            Family::Llama => 2048,
            Family::Qwen2 => 32768,
        });
        let head_dim = head_dim(fields, hidden_size, num_heads)?;
        let (attention_bias, mlp_bias) = (fields.flag("attention_bias", false)?, fields.flag("mlp_bias", false)?);
        let (qkv_bias, o_bias, mlp_bias) = match family {
            Family::Llama => (attention_bias, attention_bias, mlp_bias),
            Family::Qwen2 => (true, false, false),
        };
        Ok(Self {
            vocab_size: fields.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size")?,
            num_layers: fields.required_size("num_hidden_layers")?,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: rms_norm_eps(fields)?,
            rope: rope_config::read(fields, head_dim, max_position_embeddings)?,
            activation: activation(fields)?,
            qkv_bias,
            o_bias,
            mlp_bias,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            max_position_embeddings,
            eos_token_ids: fields.ids("eos_token_id")?,
        })
    }
}

fn family(fields: &Fields<'_>) -> Result<Family> {
    let Some(model_type) = fields.text("model_type")? else {
        return Err(fields.refuse("model_type", "llama or qwen2"));
    };
    let unsupported =
        |name: &str| Err(Error::UnsupportedArchitecture { path: fields.path().to_owned(), name: name.to_owned() });
    let (family, class) = match model_type {
        "llama" => (Family::Llama, "LlamaForCausalLM"),
        "qwen2" => (Family::Qwen2, "Qwen2ForCausalLM"),
        other => return unsupported(other),
    };
    match fields.get("architectures") {
        None => Ok(family),
        Some(Value::Array(classes)) if classes.is_empty() || classes.iter().any(|c| c.as_str() == Some(class)) => {
            Ok(family)
        }
        Some(Value::Array(classes)) => unsupported(classes[0].as_str().unwrap_or(model_type)),
        Some(_) => Err(fields.refuse("architectures", "a list of class names")),
    }
}

fn check_layer_types(fields: &Fields<'_>) -> Result<()> {
    let Some(types) = fields.get("layer_types") else { return Ok(()) };
    let all_full = types.as_array().is_some_and(|list| list.iter().all(|kind| kind.as_str() == Some("full_attention")));
    if all_full { Ok(()) } else { Err(fields.refuse("layer_types", "a list of `full_attention`")) }
}

fn head_dim(fields: &Fields<'_>, hidden_size: usize, num_heads: usize) -> Result<usize> {
    let (field, head_dim) = match fields.size("head_dim")? {
        Some(head_dim) => ("head_dim", head_dim),
        None if hidden_size.is_multiple_of(num_heads) => ("hidden_size", hidden_size / num_heads),
        None => return Err(fields.refuse("hidden_size", "a multiple of num_attention_heads")),
    };
    if !head_dim.is_multiple_of(2) || head_dim > 256 {
        return Err(fields.refuse(field, "such that a head has an even number of channels, at most 256"));
    }
    Ok(head_dim)
}

fn rms_norm_eps(fields: &Fields<'_>) -> Result<f32> {
    let eps = fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32;
    if eps > 0.0 && eps.is_finite() { Ok(eps) } else { Err(fields.refuse("rms_norm_eps", "positive and finite")) }
}

fn activation(fields: &Fields<'_>) -> Result<Activation> {
    match fields.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        "gelu" => Ok(Activation::GeluErf),
        _ => Err(fields.refuse("hidden_act", "silu, swish, gelu, gelu_new or gelu_pytorch_tanh")),
    }
}
