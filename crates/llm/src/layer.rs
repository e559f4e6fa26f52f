//! One layer of a decoder: attention and feed-forward part, each behind a norm and added to the residual stream.
//!
//! A layer takes the stream and gives the stream, so that a checkpointed segment keeps one tensor `[tokens, hidden_size]`. The
//! add in the middle is fused with the second norm.

use unsloth_autograd::{
    Tape, Var, Vector,
    ops::{self, AttentionSequences, NormOptions, RopeAngles},
};
use unsloth_core::{
    Sequences,
    ops::{attention, glu::Activation, rope::Layout},
};
use unsloth_train::{KvCache, Linear};

use crate::{Result, config::DecoderConfig, loader::Loader};

/// What all layers of a model have in common.
#[derive(Clone, Copy)]
pub(crate) struct Dimensions {
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) norm: NormOptions,
    pub(crate) activation: Activation,
    pub(crate) attention: attention::Options,
}

impl Dimensions {
    pub(crate) fn new(config: &DecoderConfig) -> Self {
        Self {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            norm: NormOptions { eps: config.rms_norm_eps, weight_offset: 0.0 },
            activation: config.activation,
            attention: attention::Options::causal(config.head_dim),
        }
    }
}

/// What a forward pass needs besides the residual stream; cheap to clone.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) dimensions: Dimensions,
    pub(crate) angles: RopeAngles,
    pub(crate) sequences: Sequences,
}

/// Queries, keys and values, `[tokens, heads, head_dim]`, rotated.
struct Heads {
    q: Var,
    k: Var,
    v: Var,
}

#[derive(Clone)]
pub(crate) struct Layer {
    input_norm: Vector,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    post_attention_norm: Vector,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    pub(crate) fn load(loader: &Loader<'_>, config: &DecoderConfig, index: usize) -> Result<Self> {
        let prefix = format!("model.layers.{index}");
        let hidden = config.hidden_size;
        let q_features = config.num_heads * config.head_dim;
        let kv_features = config.num_kv_heads * config.head_dim;
        let attention = |name: &str, out_features, bias| {
            loader.linear(&format!("{prefix}.self_attn.{name}_proj"), [out_features, hidden], bias)
        };
        let mlp = |name: &str, shape| loader.linear(&format!("{prefix}.mlp.{name}_proj"), shape, config.mlp_bias);
        let norm = |name: &str| loader.vector(&format!("{prefix}.{name}_layernorm.weight"), hidden);
        Ok(Self {
            input_norm: norm("input")?,
            q: attention("q", q_features, config.qkv_bias)?,
            k: attention("k", kv_features, config.qkv_bias)?,
            v: attention("v", kv_features, config.qkv_bias)?,
            o: loader.linear(&format!("{prefix}.self_attn.o_proj"), [hidden, q_features], config.o_bias)?,
            post_attention_norm: norm("post_attention")?,
            gate: mlp("gate", [config.intermediate_size, hidden])?,
            up: mlp("up", [config.intermediate_size, hidden])?,
            down: mlp("down", [hidden, config.intermediate_size])?,
        })
    }

    /// The linear layers in the order in which they are computed.
    pub(crate) fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }

    /// The residual stream behind the layer, from the stream `x` before it, both `[tokens, hidden_size]`.
    pub(crate) fn forward(&self, tape: &Tape, x: &Var, context: &Context) -> unsloth_core::Result<Var> {
        let Heads { q, k, v } = self.heads(tape, x, context)?;
        let (q_sequences, k_sequences) = (context.sequences.clone(), context.sequences.clone());
        let sequences = AttentionSequences { q: q_sequences, k: k_sequences };
        let out = ops::attention(tape, &q, &k, &v, &sequences, context.dimensions.attention)?;
        self.finish(tape, &out, x, context)
    }

    /// As [`Layer::forward`] for new tokens behind cached ones, without gradients; appends to the cache.
    pub(crate) fn forward_cached(
        &self,
        x: &Var,
        context: &Context,
        (cache, index): (&mut KvCache, usize),
    ) -> unsloth_core::Result<Var> {
        let tape = Tape::inference();
        let Heads { q, k, v } = self.heads(&tape, x, context)?;
        cache.append(index, k.tensor(), v.tensor(), &context.sequences)?;
        let options = context.dimensions.attention;
        let out = attention::cached(q.tensor(), &context.sequences, cache.view(index)?, options)?;
        self.finish(&tape, &Var::constant(out), x, context)
    }

    fn heads(&self, tape: &Tape, x: &Var, context: &Context) -> unsloth_core::Result<Heads> {
        let Dimensions { num_heads, num_kv_heads, head_dim, norm, .. } = context.dimensions;
        let tokens = x.tensor().shape().rows();
        let normed = ops::rms_norm(tape, x, &self.input_norm, norm)?;
        let project = |linear: &Linear, heads: usize| {
            ops::reshape(tape, &linear.forward(tape, &normed)?, [tokens, heads, head_dim])
        };
        let (q, k) = (project(&self.q, num_heads)?, project(&self.k, num_kv_heads)?);
        let v = project(&self.v, num_kv_heads)?;
        let (q, k) = ops::rope(tape, q, k, &context.angles, Layout::Half)?;
        Ok(Heads { q, k, v })
    }

    /// Everything behind the attention itself.
    fn finish(&self, tape: &Tape, out: &Var, x: &Var, context: &Context) -> unsloth_core::Result<Var> {
        let Dimensions { num_heads, head_dim, norm, activation, .. } = context.dimensions;
        let tokens = x.tensor().shape().rows();
        let out = ops::reshape(tape, out, [tokens, num_heads * head_dim])?;
        let attended = self.o.forward(tape, &out)?;
        let (normed, stream) = ops::add_rms_norm(tape, attended, x, &self.post_attention_norm, norm)?;
        let gate = self.gate.forward(tape, &normed)?;
        let up = self.up.forward(tape, &normed)?;
        drop(normed);
        let activated = ops::glu(tape, &gate, &up, activation)?;
        drop((gate, up));
        let down = self.down.forward(tape, &activated)?;
        ops::add(tape, down, &stream)
    }
}
