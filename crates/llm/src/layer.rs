//! One layer of a decoder: attention and feed-forward part, each behind a norm and added to the residual stream.
//!
//! Families differ in what is normed besides (queries and keys, the results of the two parts), in windows, caps and rotary bases;
//! [`DecoderConfig`] says which of them a model has. A layer takes the stream and gives the stream, so that a checkpointed segment keeps one tensor `[tokens, hidden_size]`. The
//! add in the middle is fused with the second norm.

use unsloth_autograd::{
    Deferred, Tape, Var, Vector,
    ops::{self, AttentionSequences, NormOptions, RopeAngles},
    tiled,
};
use unsloth_core::{
    Sequences,
    ops::{attention, glu::Activation, rope::Layout},
};
use unsloth_train::{DrawRows, KvCache, Linear};

use crate::{Result, config::DecoderConfig, loader::Loader};

/// What all layers of a model have in common.
#[derive(Clone, Copy)]
pub(crate) struct Dimensions {
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) norm: NormOptions,
    pub(crate) activation: Activation,
}

impl Dimensions {
    pub(crate) fn new(config: &DecoderConfig) -> Self {
        Self {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            norm: NormOptions { eps: config.rms_norm_eps, weight_offset: config.norm_weight_offset },
            activation: config.activation,
        }
    }
}

/// What a forward pass needs besides the residual stream; cheap to clone.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) dimensions: Dimensions,
    /// Of each kind of rotary embedding that layers of the model have.
    pub(crate) angles: Vec<RopeAngles>,
    pub(crate) sequences: Sequences,
    /// Where the rows stand in a training run.
    pub(crate) draw: Option<DrawRows>,
    /// Tokens that the feed-forward part takes at a time; `None`: all.
    pub(crate) mlp_tile: Option<usize>,
}

/// Queries, keys and values, `[tokens, heads, head_dim]`, rotated.
struct Heads {
    q: Var,
    k: Var,
    v: Var,
}

#[derive(Clone)]
pub(crate) struct Layer {
    attention: attention::Options,
    /// Which of the context's angles are this layer's.
    rope: usize,
    before_attention: Vector,
    q: Linear,
    k: Linear,
    v: Linear,
    /// Norms of a head's queries and of its keys.
    q_norm: Option<Vector>,
    k_norm: Option<Vector>,
    o: Linear,
    after_attention: Option<Vector>,
    before_mlp: Vector,
    mlp: Mlp,
}

/// The feed-forward part behind its norm.
#[derive(Clone)]
struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    after: Option<Vector>,
}

/// Which layer of a model, and which of the context's angles are its own.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) layer: usize,
    pub(crate) rope: usize,
}

/// The norm before the feed-forward part, which Llama calls by what it stands behind; where there are two norms in that place that name
/// belongs to the first.
const fn before_mlp(post_norms: bool) -> &'static str {
    if post_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" }
}

impl Layer {
    pub(crate) fn load(loader: &Loader<'_>, config: &DecoderConfig, place: Place) -> Result<Self> {
        let prefix = format!("model.layers.{}", place.layer);
        let hidden = config.hidden_size;
        let q_features = config.num_heads * config.head_dim;
        let kv_features = config.num_kv_heads * config.head_dim;
        let attention = |name: &str, out_features, bias| {
            loader.linear(&format!("{prefix}.self_attn.{name}_proj"), [out_features, hidden], bias)
        };
        let mlp = |name: &str, shape| loader.linear(&format!("{prefix}.mlp.{name}_proj"), shape, config.mlp_bias);
        let norm = |name: &str| loader.vector(&format!("{prefix}.{name}.weight"), hidden);
        let head_norm = |name: &str| {
            let name = format!("{prefix}.self_attn.{name}_norm.weight");
            config.qk_norm.then(|| loader.vector(&name, config.head_dim)).transpose()
        };
        let post_norm = |name: &str| config.post_norms.then(|| norm(name)).transpose();
        Ok(Self {
            attention: attention::Options {
                scale: config.attention_scale,
                causal: true,
                window: config.layers[place.layer].window,
                softcap: config.attention_softcap,
            },
            rope: place.rope,
            before_attention: norm("input_layernorm")?,
            q: attention("q", q_features, config.qkv_bias)?,
            k: attention("k", kv_features, config.qkv_bias)?,
            v: attention("v", kv_features, config.qkv_bias)?,
            q_norm: head_norm("q")?,
            k_norm: head_norm("k")?,
            o: loader.linear(&format!("{prefix}.self_attn.o_proj"), [hidden, q_features], config.o_bias)?,
            after_attention: post_norm("post_attention_layernorm")?,
            before_mlp: norm(before_mlp(config.post_norms))?,
            mlp: Mlp {
                gate: mlp("gate", [config.intermediate_size, hidden])?,
                up: mlp("up", [config.intermediate_size, hidden])?,
                down: mlp("down", [hidden, config.intermediate_size])?,
                after: post_norm("post_feedforward_layernorm")?,
            },
        })
    }

    /// The linear layers in the order in which they are computed.
    pub(crate) fn linears(&self) -> [&Linear; 7] {
        let Mlp { gate, up, down, .. } = &self.mlp;
        [&self.q, &self.k, &self.v, &self.o, gate, up, down]
    }

    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 7] {
        let Mlp { gate, up, down, .. } = &mut self.mlp;
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, gate, up, down]
    }

    /// The norms by their paths within the layer.
    pub(crate) fn norms(&self) -> impl Iterator<Item = (&'static str, &Vector)> {
        let before_mlp = before_mlp(self.mlp.after.is_some());
        let norms = [
            ("input_layernorm", Some(&self.before_attention)),
            ("self_attn.q_norm", self.q_norm.as_ref()),
            ("self_attn.k_norm", self.k_norm.as_ref()),
            ("post_attention_layernorm", self.after_attention.as_ref()),
            (before_mlp, Some(&self.before_mlp)),
            ("post_feedforward_layernorm", self.mlp.after.as_ref()),
        ];
        norms.into_iter().filter_map(|(name, norm)| Some((name, norm?)))
    }

    /// The residual stream behind the layer, from the stream `x` before it, both `[tokens, hidden_size]`. Nothing of the layer's
    /// backward pass reads it.
    pub(crate) fn forward(&self, tape: &Tape, x: &Var, context: &Context) -> unsloth_core::Result<Deferred> {
        let Heads { q, k, v } = self.heads(tape, x, context)?;
        let (q_sequences, k_sequences) = (context.sequences.clone(), context.sequences.clone());
        let sequences = AttentionSequences { q: q_sequences, k: k_sequences };
        let out = ops::attention(tape, &q, &k, &v, &sequences, self.attention)?;
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
        let out = attention::cached(q.tensor(), &context.sequences, cache.view(index)?, self.attention)?;
        self.finish(&tape, &Var::constant(out), x, context)?.compute()
    }

    fn heads(&self, tape: &Tape, x: &Var, context: &Context) -> unsloth_core::Result<Heads> {
        let Dimensions { num_heads, num_kv_heads, head_dim, norm, .. } = context.dimensions;
        let tokens = x.tensor().shape().rows();
        let normed = ops::rms_norm(tape, x, &self.before_attention, norm)?;
        let project = |linear: &Linear, heads: usize, head_norm: Option<&Vector>| {
            let mut rows = linear.forward(tape, &normed, context.draw.as_ref())?;
            if let Some(weight) = head_norm {
                let heads = ops::reshape(tape, &rows, [tokens * heads, head_dim])?;
                drop(rows);
                rows = ops::rms_norm(tape, &heads, weight, norm)?;
            }
            ops::reshape(tape, &rows, [tokens, heads, head_dim])
        };
        let q = project(&self.q, num_heads, self.q_norm.as_ref())?;
        let k = project(&self.k, num_kv_heads, self.k_norm.as_ref())?;
        let v = project(&self.v, num_kv_heads, None)?;
        let (q, k) = ops::rope(tape, q, k, &context.angles[self.rope], Layout::Half)?;
        Ok(Heads { q, k, v })
    }

    /// Everything behind the attention itself.
    fn finish(&self, tape: &Tape, out: &Var, x: &Var, context: &Context) -> unsloth_core::Result<Deferred> {
        let Dimensions { num_heads, head_dim, norm, .. } = context.dimensions;
        let draw = context.draw.as_ref();
        let tokens = x.tensor().shape().rows();
        let out = ops::reshape(tape, out, [tokens, num_heads * head_dim])?;
        let mut attended = self.o.forward(tape, &out, draw)?;
        if let Some(after) = &self.after_attention {
            attended = ops::rms_norm(tape, &attended, after, norm)?;
        }
        let (normed, stream) = ops::add_rms_norm(tape, attended, x, &self.before_mlp, norm)?;
        let down = match context.mlp_tile {
            None => self.mlp.forward(tape, normed, draw, context.dimensions)?,
            Some(tile) => {
                let (mlp, draw, dimensions) = (self.mlp.clone(), context.draw.clone(), context.dimensions);
                let run = move |tape: &Tape, rows: &Var, range| {
                    let draw = draw.as_ref().map(|draw: &DrawRows| draw.rows(range)).transpose()?;
                    mlp.forward(tape, rows.clone(), draw.as_ref(), dimensions)
                };
                tiled(tape, &normed, tile, run)?.into()
            }
        };
        down.add(tape, &stream)
    }
}

impl Mlp {
    /// Rows of the residual stream's change, from normed rows of the stream.
    fn forward(
        &self,
        tape: &Tape,
        normed: Var,
        draw: Option<&DrawRows>,
        Dimensions { norm, activation, .. }: Dimensions,
    ) -> unsloth_core::Result<Deferred> {
        let gate = self.gate.forward(tape, &normed, draw)?;
        let up = self.up.forward(tape, &normed, draw)?;
        drop(normed);
        let activated = ops::glu(tape, &gate, &up, activation)?;
        drop((gate, up));
        let down = self.down.deferred(tape, &activated, draw)?;
        drop(activated);
        match &self.after {
            None => Ok(down),
            Some(after) => ops::rms_norm(tape, &down.compute()?, after, norm).map(Deferred::from),
        }
    }
}
