//! `config.json` of a Hugging Face folder.
//!
//! Both forms are read: that of transformers 5 (`rope_parameters`, `dtype`) and that of transformers 4 (`rope_theta`,
//! `rope_scaling`, `torch_dtype`). A field that would make the model compute something else than this crate does is an error,
//! never ignored. Fields that only describe (`transformers_version`, `use_cache`, ..) have no effect.

use std::path::Path;

use serde_json::Value;
use unsloth_core::{
    DType,
    ops::{attention::Window, glu::Activation, rope_table::RopeSpec},
};

use crate::{
    Error, Result,
    family::{AttentionBias, Family, OPTIONAL, REFUSED, Scale},
    fields::{Fields, Neutral, NeutralField, read_object},
    rope_config::{self, Extent},
    windows,
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
    /// What differs from layer to layer, for each of them.
    pub layers: Vec<LayerConfig>,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Channels of a head, even, at most 256.
    pub head_dim: usize,
    /// Multiplies `q k^T`; positive.
    pub attention_scale: f32,
    /// Bounds attention scores smoothly; positive.
    pub attention_softcap: Option<f32>,
    /// Bounds logits smoothly; positive.
    pub logit_softcap: Option<f32>,
    /// Whether embeddings are multiplied by `sqrt(hidden_size)`, rounded to the type of activations.
    pub scaled_embedding: bool,
    /// Added to the mean square in every norm; positive.
    pub rms_norm_eps: f32,
    /// Added to every weight of a norm: 0, or 1 where checkpoints store `weight - 1`.
    pub norm_weight_offset: f32,
    /// Whether queries and keys are normed before they are rotated, each head for itself.
    pub qk_norm: bool,
    /// Whether the results of attention and feed-forward part are normed before they are added to the residual stream.
    pub post_norms: bool,
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

/// What may differ from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerConfig {
    /// Which earlier tokens are seen.
    pub window: Window,
    /// Rotary frequencies.
    pub rope: RopeSpec,
}

/// Fields that would change the computation of any family, and the values under which they do not.
const NEUTRAL: &[NeutralField] = &[
    ("quantization_config", Neutral::Absent, "absent: quantised checkpoints are not supported"),
    ("pretraining_tp", Neutral::Number(1.0), "1: split matrices are not supported"),
    ("partial_rotary_factor", Neutral::Number(1.0), "1: partly rotated heads are not supported"),
    ("attention_dropout", Neutral::Number(0.0), "0: dropout of attention probabilities is not supported"),
    ("is_causal", Neutral::True, "true: attention to later tokens is not supported"),
    ("use_bidirectional_attention", Neutral::False, "false: attention to later tokens is not supported"),
    ("use_mrope", Neutral::False, "false: multi-axis rotary embedding is not supported"),
    ("is_encoder_decoder", Neutral::False, "false: only decoders are supported"),
    ("add_cross_attention", Neutral::False, "false: cross attention is not supported"),
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
        fields.require_neutral(OPTIONAL.iter().filter(|(name, ..)| !family.accepts.contains(name)))?;
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
        let name = fields.text(field)?.unwrap_or("float32");
        let dtype = DType::FLOATS.into_iter().find(|&dtype| dtype_name(dtype) == name);
        dtype.ok_or_else(|| fields.refuse(field, "float32, float16 or bfloat16"))
    }

    fn parse(fields: &Fields<'_>, family: &Family) -> Result<Self> {
        let hidden_size = fields.required_size("hidden_size")?;
        let num_heads = fields.required_size("num_attention_heads")?;
        let num_layers = fields.required_size("num_hidden_layers")?;
        let max_position_embeddings = fields.size("max_position_embeddings")?.unwrap_or(family.max_position_embeddings);
        let head_dim = head_dim(fields, family, (hidden_size, num_heads))?;
        let ropes = rope_config::read(fields, &family.rope_bases, Extent { head_dim, max_position_embeddings })?;
        let layer = |window| {
            let rope = if window == Window::Full { ropes.full } else { ropes.sliding };
            LayerConfig { window, rope }
        };
        let (qkv_bias, o_bias) = match family.attention_bias {
            AttentionBias::Field => {
                let bias = fields.flag("attention_bias", false)?;
                (bias, bias)
            }
            AttentionBias::QueriesKeysValues => (true, false),
        };
        Ok(Self {
            vocab_size: fields.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size")?,
            layers: windows::read(fields, family, num_layers)?.into_iter().map(layer).collect(),
            num_heads,
            num_kv_heads: num_kv_heads(fields, family, num_heads)?,
            head_dim,
            attention_scale: attention_scale(fields, family, head_dim)?,
            attention_softcap: softcap(fields, "attn_logit_softcapping", family.attention_softcap)?,
            logit_softcap: softcap(fields, "final_logit_softcapping", family.logit_softcap)?,
            scaled_embedding: family.scaled_embedding,
            rms_norm_eps: positive(fields, "rms_norm_eps", 1e-6)? as f32,
            norm_weight_offset: family.norm_weight_offset,
            qk_norm: family.qk_norm,
            post_norms: family.post_norms,
            activation: activation(fields, family)?,
            qkv_bias,
            o_bias,
            mlp_bias: fields.flag("mlp_bias", false)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings", family.tie_word_embeddings)?,
            max_position_embeddings,
            eos_token_ids: fields.ids("eos_token_id")?,
        })
    }
}

/// How `config.json` spells a type.
pub(crate) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::I32 => "int32",
        _ => "float32",
    }
}

fn family(fields: &Fields<'_>) -> Result<&'static Family> {
    let unsupported =
        |name: &str| Err(Error::UnsupportedArchitecture { path: fields.path().to_owned(), name: name.to_owned() });
    let Some(model_type) = fields.text("model_type")? else {
        return Err(fields.refuse("model_type", "the name of a model family, such as llama"));
    };
    if let Some((_, rule)) = REFUSED.iter().find(|(name, _)| *name == model_type) {
        return Err(fields.refuse("model_type", rule));
    }
    let Some(family) = Family::find(model_type) else { return unsupported(model_type) };
    match fields.get("architectures") {
        None => Ok(family),
        Some(Value::Array(classes))
            if classes.is_empty() || classes.iter().any(|class| class.as_str() == Some(family.class)) =>
        {
            Ok(family)
        }
        Some(Value::Array(classes)) => unsupported(classes[0].as_str().unwrap_or(model_type)),
        Some(_) => Err(fields.refuse("architectures", "a list of class names")),
    }
}

fn num_kv_heads(fields: &Fields<'_>, family: &Family, num_heads: usize) -> Result<usize> {
    let implied = family.ungrouped_by_default.then_some(num_heads);
    match fields.size("num_key_value_heads")?.or(implied) {
        Some(number) if num_heads.is_multiple_of(number) => Ok(number),
        _ => Err(fields.refuse("num_key_value_heads", "a divisor of num_attention_heads")),
    }
}

fn head_dim(fields: &Fields<'_>, family: &Family, (hidden_size, num_heads): (usize, usize)) -> Result<usize> {
    let (field, head_dim) = match fields.size("head_dim")?.or(family.head_dim) {
        Some(head_dim) => ("head_dim", head_dim),
        None if hidden_size.is_multiple_of(num_heads) => ("hidden_size", hidden_size / num_heads),
        None => return Err(fields.refuse("hidden_size", "a multiple of num_attention_heads")),
    };
    if !head_dim.is_multiple_of(2) || head_dim > 256 {
        return Err(fields.refuse(field, "such that a head has an even number of channels, at most 256"));
    }
    Ok(head_dim)
}

/// A number that is above zero in f32 too.
fn positive(fields: &Fields<'_>, name: &str, default: f64) -> Result<f64> {
    let number = fields.number(name)?.unwrap_or(default);
    let narrow = number as f32;
    if narrow > 0.0 && narrow.is_finite() { Ok(number) } else { Err(fields.refuse(name, "positive and finite")) }
}

fn attention_scale(fields: &Fields<'_>, family: &Family, head_dim: usize) -> Result<f32> {
    let divisor = match family.scale {
        Scale::HeadDim => head_dim as f64,
        Scale::QueryPreAttnScalar(default) => positive(fields, "query_pre_attn_scalar", default)?,
    };
    Ok(divisor.sqrt().recip() as f32)
}

/// `null` means that there is no cap, absence the family's default.
fn softcap(fields: &Fields<'_>, name: &str, default: Option<f64>) -> Result<Option<f32>> {
    let default = default.filter(|_| !fields.is_null(name));
    match fields.number(name)?.or(default) {
        None => Ok(None),
        Some(cap) => Ok(Some(positive(fields, name, cap)? as f32)),
    }
}

fn activation(fields: &Fields<'_>, family: &Family) -> Result<Activation> {
    let (field, default) = family.activation;
    match fields.text(field)? {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
        Some("gelu") => Ok(Activation::GeluErf),
        Some(_) => Err(fields.refuse(field, "silu, swish, gelu, gelu_new or gelu_pytorch_tanh")),
    }
}
