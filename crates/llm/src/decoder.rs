//! A decoder-only transformer of the Llama kind.                       Touvron et al. 2023, arXiv:2307.09288
//!
//! `x` begins as the tokens' embeddings, scaled in some families. Per layer: `x += o(attention(rope(q(n)), rope(k(n)), v(n)))`
//! with `n = rms_norm(x)`, then `x += down(act(gate(n)) * up(n))` with `n = rms_norm(x)`; logits are `head(rms_norm(x))`, capped in
//! some families. [`DecoderConfig`] says what a family adds to that. Rows are packed tokens, `[tokens, hidden_size]`; no token sees
//! another sequence.

mod adapters;
mod weights;

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use unsloth_autograd::{Deferred, Matrix, Parameter, Recompute, Tape, Var, Vector, checkpoint_in, ops};
use unsloth_core::{Category, DType, Device, Sequences, Tensor, TensorStore, ops::cross_entropy::LossSpec};
use unsloth_train::{
    Adapter, Batch, Checkpointing, DrawRows, KvCache, KvCacheSpec, Linear, Model, Precision, Role, Segment,
};

pub use self::adapters::AdapterSet;
use self::adapters::Parts;
use crate::{
    Error, Result,
    adapter::AdapterConfig,
    config::{DecoderConfig, LayerConfig},
    initial::RandomWeights,
    layer::{Context, Dimensions, Layer, Place},
    loader::{Loader, TrainedWeight},
    packing::at_least,
    rope_tables::RopeTables,
    weights::{Checkpoint, WeightSource},
};

/// How a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Types of activations and matrices. Under f32 activations frozen weights stay as they are stored; trained vectors, which are few,
    /// have f32.
    pub precision: Precision,
    /// Whether every weight is a parameter to train, with a copy of its own. Otherwise all are frozen, and mapped where they can be.
    pub trainable: bool,
}

impl LoadOptions {
    /// Frozen weights, to be used as they are or to be adapted.
    pub const fn frozen(dtype: DType) -> Self {
        Self { precision: Precision { storage: dtype, compute: dtype, master: DType::F32 }, trainable: false }
    }

    /// Weights to train, in f32.
    pub const fn trainable(dtype: DType) -> Self {
        Self { trainable: true, ..Self::frozen(dtype) }
    }
}

/// Which linear layers get adapters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// All but the head, as PEFT's `all-linear`.
    AllLinear,
    /// Layers of these names: the whole module path, or its last parts, such as `q_proj`.
    Names(Vec<String>),
}

/// `all-linear`, or names separated by commas.
impl FromStr for Targets {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidOption`] for an empty name.
    fn from_str(text: &str) -> Result<Self> {
        if text.eq_ignore_ascii_case("all-linear") {
            return Ok(Targets::AllLinear);
        }
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        if names.iter().any(String::is_empty) {
            let rule = "all-linear or names separated by commas".to_owned();
            return Err(Error::InvalidOption { field: "targets", value: format!("`{text}`"), rule });
        }
        Ok(Targets::Names(names))
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Targets::AllLinear => f.write_str("all-linear"),
            Targets::Names(names) => f.write_str(&names.join(",")),
        }
    }
}

/// A language model with frozen base weights and, where they were added, trained adapters; or one whose every weight is
/// trained.
pub struct Decoder {
    folder: Option<PathBuf>,
    config: DecoderConfig,
    device: Device,
    dtype: DType,
    embedding: Matrix,
    /// Shared with the functions that recompute them in a backward pass.
    layers: Arc<Vec<Layer>>,
    norm: Vector,
    /// The embedding's matrix itself where the two are tied.
    head: Matrix,
    ropes: RopeTables,
    checkpointing: Checkpointing,
    /// Tokens that a feed-forward part takes at a time; `None`: all.
    mlp_tile: Option<usize>,
    /// Where inputs of segments that are computed again wait for the backward pass; `None`: where they are.
    offload: Option<Arc<dyn TensorStore>>,
    /// The weights that are trained, in the order in which they were loaded.
    trained: Vec<TrainedWeight>,
    /// What the adapters were made by.
    adapters: Option<AdapterConfig>,
    /// What is trained whole beside the adapters: biases, then modules.
    beside: Vec<Parameter>,
    /// What the model is without its adapters, and which model it is.
    base: Option<Parts>,
    id: u64,
    unused_tensors: Vec<String>,
}

impl Decoder {
    /// Loads a Hugging Face folder: `config.json`, `generation_config.json` if there is one, and safetensors weights, which
    /// are memory-mapped and must not be changed while the model is alive.
    ///
    /// # Errors
    /// As [`DecoderConfig::load`], [`Checkpoint::open`], [`Checkpoint::tensor`] and [`Decoder::new`].
    pub fn load(folder: &Path, device: &Device, options: LoadOptions) -> Result<Self> {
        let config = DecoderConfig::load(folder)?;
        let checkpoint = Checkpoint::open(folder)?;
        let decoder = Self::new(config, &checkpoint, device, options)?;
        // Frequencies that old checkpoints store; they follow from the configuration.
        let mut unused_tensors = checkpoint.unused();
        unused_tensors.retain(|name| !name.ends_with("rotary_emb.inv_freq"));
        Ok(Self { folder: Some(folder.to_owned()), unused_tensors, ..decoder })
    }

    /// A model of the `config.json` of a folder with random weights, all trainable if `options` say so, as [`RandomWeights`] makes them. Weights
    /// that the folder may have are not looked at.
    ///
    /// # Errors
    /// As [`DecoderConfig::load`], [`RandomWeights::load`] and [`Decoder::new`].
    pub fn random(folder: &Path, device: &Device, options: LoadOptions, seed: u64) -> Result<Self> {
        let config = DecoderConfig::load(folder)?;
        let weights = RandomWeights::load(folder, &config, seed)?;
        let decoder = Self::new(config, &weights, device, options)?;
        Ok(Self { folder: Some(folder.to_owned()), ..decoder })
    }

    /// A model of this configuration with weights from `source`, under the names that Hugging Face gives them.
    ///
    /// # Errors
    /// Those of the source; [`Error::ActivationDType`]; [`unsloth_core::Error::UnsupportedDType`] if the device lacks the type.
    pub fn new(
        config: DecoderConfig,
        source: &dyn WeightSource,
        device: &Device,
        options: LoadOptions,
    ) -> Result<Self> {
        let dtype = options.precision.compute;
        if !dtype.is_float() {
            return Err(Error::ActivationDType { dtype });
        }
        if !device.supports(dtype) {
            return Err(unsloth_core::Error::UnsupportedDType { op: "load", dtype, device: device.name() }.into());
        }
        let loader = Loader::new(source, device, options);
        let table = [config.vocab_size, config.hidden_size];
        let embedding = loader.matrix("model.embed_tokens.weight", table)?;
        let ropes = RopeTables::new(&config);
        let place = |(layer, kind): (usize, &LayerConfig)| Place { layer, rope: ropes.index(&kind.rope) };
        let layers = config.layers.iter().enumerate().map(place).map(|place| Layer::load(&loader, &config, place));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = loader.vector("model.norm.weight", config.hidden_size)?;
        let head =
            if config.tie_word_embeddings { embedding.clone() } else { loader.matrix("lm_head.weight", table)? };
        Ok(Self {
            folder: None,
            config,
            device: device.clone(),
            dtype,
            embedding,
            layers: Arc::new(layers),
            norm,
            head,
            ropes,
            checkpointing: Checkpointing::None,
            mlp_tile: None,
            offload: None,
            trained: loader.into_trained(),
            adapters: None,
            beside: Vec::new(),
            base: None,
            id: adapters::next_id(),
            unused_tensors: Vec::new(),
        })
    }

    /// The folder that it was loaded from, as it was given; `None` if its weights came from elsewhere.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// What defines the model.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Storage type of activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Tensors of the checkpoint that the model has no place for, sorted; transformers warns of such.
    pub fn unused_tensors(&self) -> &[String] {
        &self.unused_tensors
    }

    /// All linear layers but the head, in the order in which they are computed.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(Layer::linears)
    }

    /// The same layers, to be changed.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        Arc::make_mut(&mut self.layers).iter_mut().flat_map(Layer::linears_mut)
    }

    pub(crate) fn head(&self) -> &Matrix {
        &self.head
    }

    /// The weights that are trained, each once: a head that is the embedding table is not among them.
    pub(crate) fn trained(&self) -> &[TrainedWeight] {
        &self.trained
    }

    /// What of a training pass is recomputed rather than kept. Gradients have the same bits under every policy.
    ///
    /// # Errors
    /// As [`Checkpointing::check`]; the policy is as it was then.
    pub fn set_checkpointing(&mut self, checkpointing: Checkpointing) -> Result<()> {
        checkpointing.check(self.layers.len())?;
        self.checkpointing = checkpointing;
        Ok(())
    }

    /// Tokens that the feed-forward part of a layer takes at a time, 1 or more, so that what it makes in between is that of a
    /// tile; it runs again in the backward pass. Gradients of weights are then sums over tiles, and equal up to rounding.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for tiles of no tokens.
    pub fn set_mlp_tile(&mut self, tokens: Option<usize>) -> Result<()> {
        at_least("mlp_tile", tokens.unwrap_or(1), 1)?;
        self.mlp_tile = tokens;
        Ok(())
    }

    /// Where the inputs of segments that are computed again wait for the backward pass, all but the last one's, which it reads
    /// first. Gradients have the same bits wherever that is.
    pub fn set_offload(&mut self, store: Option<Arc<dyn TensorStore>>) {
        self.offload = store;
    }

    /// The store of [`Decoder::set_offload`].
    pub fn offload(&self) -> Option<&dyn TensorStore> {
        self.offload.as_deref()
    }

    /// Final hidden states of all tokens, normed: `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// An id outside the vocabulary; [`unsloth_core::Error::OutOfMemory`].
    pub fn hidden(&self, tape: &Tape, batch: &Batch) -> unsloth_core::Result<Var> {
        let mut context = self.context(&batch.positions, &batch.sequences, batch.sequences.max_seqlen())?;
        if self.linears().filter_map(|linear| linear.adapter.as_ref()).any(|adapter| adapter.config.dropout > 0.0) {
            context.draw = DrawRows::new(batch)?;
        }
        let mut stream = self.embed(tape, &batch.ids)?;
        tape.set_recompute(self.checkpointing.recompute());
        for Segment { layers: range, again } in self.checkpointing.segments(self.layers.len()) {
            let is_last = range.end == self.layers.len();
            let (layers, context) = (self.layers.clone(), context.clone());
            let run = move |tape: &Tape, inputs: &[Var]| {
                let mut stream = Deferred::from(inputs[0].clone());
                for layer in &layers[range.clone()] {
                    stream = layer.forward(tape, &stream.compute()?, &context)?;
                }
                Ok(vec![stream])
            };
            let store = self.offload().filter(|_| !is_last);
            stream = match again {
                true => checkpoint_in(store, tape, &[&stream], run)?.swap_remove(0),
                false => run(tape, &[stream])?.swap_remove(0).compute()?,
            };
        }
        tape.set_recompute(Recompute::default());
        ops::rms_norm(tape, &stream, &self.norm, context.dimensions.norm)
    }

    /// Logits of all tokens, `tokens * vocab_size` of them on the host, for tests and inspection: [`Model::loss`] never forms
    /// them.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    pub fn logits(&self, batch: &Batch) -> unsloth_core::Result<Vec<f32>> {
        let tape = Tape::inference();
        let hidden = self.hidden(&tape, batch)?;
        self.read_logits(&tape, &hidden)
    }

    /// The beginning of the residual stream, `[tokens, hidden_size]`.
    fn embed(&self, tape: &Tape, ids: &Tensor) -> unsloth_core::Result<Var> {
        let rows = ops::embedding(tape, &self.embedding, ids, self.dtype)?;
        match embedding_scale(&self.config, self.dtype) {
            None => Ok(rows),
            Some(factor) => ops::scale(tape, rows, factor),
        }
    }

    /// Logits of normed hidden states, on the host; capped there, since nothing on the device reads whole logits.
    fn read_logits(&self, tape: &Tape, hidden: &Var) -> unsloth_core::Result<Vec<f32>> {
        let mut logits = ops::linear(tape, hidden, &self.head, None)?.tensor().to_f32_vec()?;
        if let Some(cap) = self.config.logit_softcap {
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        Ok(logits)
    }

    /// An empty cache for one sequence of at most `capacity` tokens.
    pub(crate) fn kv_cache(&self, capacity: usize) -> unsloth_core::Result<KvCache> {
        let spec = KvCacheSpec {
            num_layers: self.layers.len(),
            num_seqs: 1,
            capacity,
            num_kv_heads: self.config.num_kv_heads,
            head_dim: self.config.head_dim,
            dtype: self.dtype,
        };
        KvCache::new(&self.device, spec)
    }

    /// Logits behind the last of some new tokens of one sequence, `vocab_size` of them on the host. `past` tokens are in the
    /// cache; the new ones are appended.
    pub(crate) fn next_logits(&self, ids: &[i32], past: usize, cache: &mut KvCache) -> unsloth_core::Result<Vec<f32>> {
        let tape = Tape::inference();
        // Lengths fit i32: they are at most `max_position_embeddings`, which is checked when the configuration is read.
        let positions: Vec<i32> = (past..past + ids.len()).map(|position| position as i32).collect();
        let positions = self.device.from_slice(&positions, [ids.len()], Category::Activations)?;
        let sequences = Sequences::from_lengths(&self.device, &[ids.len()])?;
        let context = self.context(&positions, &sequences, past + ids.len())?;
        let last = self.device.from_slice(&[ids.len() as i32 - 1], [1], Category::Activations)?;
        let ids = self.device.from_slice(ids, [ids.len()], Category::Activations)?;
        let mut stream = self.embed(&tape, &ids)?;
        for (index, layer) in self.layers.iter().enumerate() {
            stream = layer.forward_cached(&stream, &context, (cache, index))?;
        }
        // A lookup of one row, so that the prompt's other rows are neither normed nor multiplied by the head.
        let rows = Matrix::Frozen(self.device.prepare_weight(stream.into_tensor())?);
        let last = ops::embedding(&tape, &rows, &last, self.dtype)?;
        let normed = ops::rms_norm(&tape, &last, &self.norm, context.dimensions.norm)?;
        self.read_logits(&tape, &normed)
    }

    fn context(
        &self,
        positions: &Tensor,
        sequences: &Sequences,
        num_positions: usize,
    ) -> unsloth_core::Result<Context> {
        let angles = self.ropes.angles(&self.device, positions, num_positions)?;
        let (dimensions, sequences, mlp_tile) = (Dimensions::new(&self.config), sequences.clone(), self.mlp_tile);
        Ok(Context { dimensions, angles, sequences, draw: None, mlp_tile })
    }
}

/// What embeddings are multiplied by: rounded to their type, as transformers does.
fn embedding_scale(config: &DecoderConfig, dtype: DType) -> Option<f32> {
    let factor = (config.hidden_size as f64).sqrt() as f32;
    let rounded = match dtype {
        DType::BF16 => half::bf16::from_f32(factor).to_f32(),
        DType::F16 => half::f16::from_f32(factor).to_f32(),
        _ => factor,
    };
    config.scaled_embedding.then_some(rounded)
}

impl Model for Decoder {
    fn loss(&self, tape: &Tape, batch: &Batch, loss: LossSpec) -> unsloth_core::Result<Var> {
        let hidden = self.hidden(tape, batch)?;
        // The cap is a part of the model.
        let loss = LossSpec { softcap: self.config.logit_softcap.or(loss.softcap), ..loss };
        ops::linear_cross_entropy(tape, &hidden, &self.head, &batch.targets, loss)
    }

    fn parameters(&self) -> Vec<Parameter> {
        let weights = self.trained.iter().map(|weight| weight.parameter.clone()).chain(self.beside.iter().cloned());
        let adapters = self.linears().filter_map(|linear| linear.adapter.as_ref());
        weights.chain(adapters.flat_map(Adapter::parameters)).collect()
    }

    fn role(&self, parameter: &Parameter) -> Role {
        let is = |own: &Parameter| own.id() == parameter.id();
        if [&self.embedding, &self.head].into_iter().filter_map(Matrix::parameter).any(is) {
            return Role::Embedding;
        }
        let mut adapters = self.linears().filter_map(|linear| linear.adapter.as_ref());
        let is_vector = self.adapters.is_some() && parameter.value().shape().len() == 1;
        if is_vector || adapters.any(|adapter| is(&adapter.lora_b)) { Role::LoraB } else { Role::Weight }
    }

    fn device(&self) -> &Device {
        &self.device
    }
}
