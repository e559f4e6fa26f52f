//! Model families, as data: what a `config.json` of each may say, what holds where it says nothing, and what the family fixes.
//!
//! A decoder is computed from a [`crate::config::DecoderConfig`] alone; beyond reading that, nothing knows families. A new one is
//! one more entry of [`FAMILIES`], as long as it differs from the others in no other way than they differ from each other.

use unsloth_core::ops::glu::Activation;

use crate::fields::{Neutral, NeutralField};

/// One family.
pub(crate) struct Family {
    /// `model_type` of its configurations.
    pub(crate) model_type: &'static str,
    /// The one class, of those in `architectures`, that is a language model.
    pub(crate) class: &'static str,
    /// Fields of [`OPTIONAL`] that configurations of this family may have.
    pub(crate) accepts: &'static [&'static str],
    /// Whether `num_key_value_heads` may be missing, which then is `num_attention_heads`.
    pub(crate) ungrouped_by_default: bool,
    /// `head_dim` where it is missing; `None`: `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<usize>,
    /// `max_position_embeddings` where it is missing.
    pub(crate) max_position_embeddings: usize,
    /// `tie_word_embeddings` where it is missing.
    pub(crate) tie_word_embeddings: bool,
    /// Field that names the activation, and the activation where it is missing.
    pub(crate) activation: (&'static str, Activation),
    /// Which projections of the attention have biases.
    pub(crate) attention_bias: AttentionBias,
    /// What multiplies `q k^T`.
    pub(crate) scale: Scale,
    /// `attn_logit_softcapping` where it is missing.
    pub(crate) attention_softcap: Option<f64>,
    /// `final_logit_softcapping` where it is missing.
    pub(crate) logit_softcap: Option<f64>,
    /// Added to every weight of a norm.
    pub(crate) norm_weight_offset: f32,
    /// Whether queries and keys are normed, each head for itself.
    pub(crate) qk_norm: bool,
    /// Whether the results of attention and feed-forward part are normed before they are added to the stream.
    pub(crate) post_norms: bool,
    /// Whether embeddings are multiplied by `sqrt(hidden_size)`.
    pub(crate) scaled_embedding: bool,
    /// Which layers see a sliding window alone.
    pub(crate) windows: Windows,
    /// `sliding_window` where it is missing.
    pub(crate) sliding_window: Option<usize>,
    /// Bases of the rotary frequencies where they are missing.
    pub(crate) rope_bases: RopeBases,
}

/// Where biases of attention projections come from.
pub(crate) enum AttentionBias {
    /// `attention_bias` speaks for all four.
    Field,
    /// Queries, keys and values have biases, the output has none.
    QueriesKeysValues,
}

/// What multiplies `q k^T`.
pub(crate) enum Scale {
    /// `1 / sqrt(head_dim)`
    HeadDim,
    /// `1 / sqrt(query_pre_attn_scalar)`, with that field's default.
    QueryPreAttnScalar(f64),
}

/// Which layers see a sliding window alone, where `layer_types` does not say it.
pub(crate) enum Windows {
    /// None.
    Never,
    /// All, if there is a `sliding_window`; layers cannot differ.
    Uniform,
    /// If `use_sliding_window`, those from `max_window_layers` (with that field's default) on.
    Upper(usize),
    /// All but every n-th: `sliding_window_pattern`, with that field's default.
    AllButEvery(usize),
}

/// Bases of the rotary frequencies.
pub(crate) enum RopeBases {
    /// `rope_theta` for all layers.
    One(f64),
    /// `rope_theta` for layers that see everything, `rope_local_base_freq` for those with a window.
    ByWindow {
        /// Where everything is seen.
        full: f64,
        /// Where a window is seen.
        sliding: f64,
    },
}

/// Fields that some families have, and the values under which they change nothing in the others.
pub(crate) const OPTIONAL: &[NeutralField] = &[
    ("attention_bias", Neutral::False, "false: this family has no biases in its attention"),
    ("mlp_bias", Neutral::False, "false: this family has no biases in its feed-forward part"),
    ("attn_logit_softcapping", Neutral::Absent, "absent: this family does not cap attention scores"),
    ("final_logit_softcapping", Neutral::Absent, "absent: this family does not cap logits"),
    ("query_pre_attn_scalar", Neutral::Absent, "absent: this family scales by head_dim"),
    ("rope_local_base_freq", Neutral::Absent, "absent: this family has one rotary base"),
    ("sliding_window", Neutral::Absent, "absent: this family has no sliding windows"),
    ("sliding_window_pattern", Neutral::Absent, "absent: this family does not alternate windows by a number"),
    ("use_sliding_window", Neutral::False, "false: this family has no such switch"),
];

/// What most families have in common.
const LLAMA: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    accepts: &["attention_bias", "mlp_bias"],
    // Checkpoints older than grouped queries do not have the field.
    ungrouped_by_default: true,
    head_dim: None,
    max_position_embeddings: 2048,
    tie_word_embeddings: false,
    activation: ("hidden_act", Activation::Silu),
    attention_bias: AttentionBias::Field,
    scale: Scale::HeadDim,
    attention_softcap: None,
    logit_softcap: None,
    norm_weight_offset: 0.0,
    qk_norm: false,
    post_norms: false,
    scaled_embedding: false,
    windows: Windows::Never,
    sliding_window: None,
    rope_bases: RopeBases::One(10_000.0),
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    // `attention_bias` has no say: the biases are where they are.
    accepts: &["attention_bias", "sliding_window", "use_sliding_window"],
    ungrouped_by_default: false,
    max_position_embeddings: 32_768,
    attention_bias: AttentionBias::QueriesKeysValues,
    windows: Windows::Upper(28),
    sliding_window: Some(4096),
    ..LLAMA
};

const GEMMA2: Family = Family {
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    accepts: &[
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "sliding_window",
    ],
    ungrouped_by_default: false,
    head_dim: Some(256),
    max_position_embeddings: 8192,
    tie_word_embeddings: true,
    activation: ("hidden_activation", Activation::GeluTanh),
    attention_bias: AttentionBias::Field,
    scale: Scale::QueryPreAttnScalar(256.0),
    attention_softcap: Some(50.0),
    logit_softcap: Some(30.0),
    norm_weight_offset: 1.0,
    qk_norm: false,
    post_norms: true,
    scaled_embedding: true,
    windows: Windows::AllButEvery(2),
    sliding_window: Some(4096),
    rope_bases: RopeBases::One(10_000.0),
};

/// All families that are read. Defaults are those of transformers.
pub(crate) const FAMILIES: &[Family] = &[
    // Touvron et al. 2023, arXiv:2307.09288; Llama 3: arXiv:2407.21783
    LLAMA,
    // Jiang et al. 2023, arXiv:2310.06825
    Family {
        model_type: "mistral",
        class: "MistralForCausalLM",
        accepts: &["sliding_window"],
        ungrouped_by_default: false,
        max_position_embeddings: 131_072,
        windows: Windows::Uniform,
        sliding_window: Some(4096),
        ..LLAMA
    },
    // arXiv:2407.10671; Qwen2.5: arXiv:2412.15115
    QWEN2,
    // arXiv:2505.09388
    Family {
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        head_dim: Some(128),
        attention_bias: AttentionBias::Field,
        qk_norm: true,
        ..QWEN2
    },
    // arXiv:2408.00118
    GEMMA2,
    // arXiv:2503.19786
    Family {
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        // transformers reads `attn_logit_softcapping` and does not apply it.
        accepts: &[
            "attention_bias",
            "final_logit_softcapping",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
            "sliding_window",
            "sliding_window_pattern",
        ],
        max_position_embeddings: 131_072,
        attention_softcap: None,
        logit_softcap: None,
        qk_norm: true,
        windows: Windows::AllButEvery(6),
        rope_bases: RopeBases::ByWindow { full: 1_000_000.0, sliding: 10_000.0 },
        ..GEMMA2
    },
];

/// `model_type`s that stand for more than a language model, and what to do instead.
pub(crate) const REFUSED: &[(&str, &str)] = &[(
    "gemma3",
    "gemma3_text: images are not supported; save the language model alone as docs/models.md says and use that",
)];

impl Family {
    /// The family of this `model_type`.
    pub(crate) fn find(model_type: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|family| family.model_type == model_type)
    }
}

/// The `model_type`s that are read, comma-separated.
pub(crate) fn supported() -> String {
    FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ")
}
