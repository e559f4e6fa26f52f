//! candle as a peer in whole steps: a Llama or Qwen2 of its layers, put together as candle-transformers does it, that generates and,
//! with adapters, is trained.

use std::{collections::HashMap, fs, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor, Var, backprop::GradStore, safetensors};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, RmsNorm, loss, ops, rotary_emb};
use unsloth_rs::{
    DType as Storage,
    core::ops::{attention::Window, glu::Activation},
    cpu::candle::to_candle,
    llm::{
        config::{DecoderConfig, LayerConfig},
        decoder::Decoder,
    },
};

/// Matrices that are adapted.
const PROJECTIONS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Whether candle's layers, as they are here, compute what this model does.
pub(crate) fn has(config: &DecoderConfig) -> bool {
    let is_plain = |layer: &LayerConfig| layer.window == Window::Full;
    let extras = [config.qk_norm, config.post_norms, config.scaled_embedding];
    config.layers.iter().all(is_plain)
        && !extras.contains(&true)
        && config.norm_weight_offset == 0.0
        && config.attention_softcap.is_none()
        && config.logit_softcap.is_none()
        && config.activation == Activation::Silu
}

/// A matrix, and what is trained beside it.
struct Adapted {
    frozen: Linear,
    adapter: Option<Adapter>,
}

struct Adapter {
    a: Var,
    b: Var,
    scale: f64,
}

impl Adapted {
    /// The adapter computes in f32, as PEFT's does.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.frozen.forward(x)?;
        let Some(Adapter { a, b, scale }) = &self.adapter else { return Ok(y) };
        let [down, up] = [a, b].map(|factor| Linear::new(factor.as_tensor().clone(), None));
        let update = (up.forward(&down.forward(&x.to_dtype(DType::F32)?)?)? * *scale)?;
        y + update.to_dtype(x.dtype())?
    }
}

struct Layer {
    norms: [RmsNorm; 2],
    /// In the order of [`PROJECTIONS`].
    linears: Vec<Adapted>,
}

/// Keys and values of a layer, `[1, num_kv_heads, tokens, head_dim]`.
type Cached = Option<(Tensor, Tensor)>;

/// A decoder.
pub(crate) struct Model {
    config: DecoderConfig,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    /// Cosines and sines of the rotary embedding, `[positions, head_dim / 2]`.
    angles: [Tensor; 2],
}

/// Reads tensors as one type.
struct Weights {
    tensors: HashMap<String, Tensor>,
    dtype: DType,
}

impl Weights {
    fn read(folder: &Path, dtype: DType) -> Result<Self> {
        let mut tensors = HashMap::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                tensors.extend(safetensors::load(&path, &Device::Cpu)?);
            }
        }
        Ok(Self { tensors, dtype })
    }

    fn get(&self, name: &str) -> Result<Tensor> {
        let tensor = self.tensors.get(name).with_context(|| format!("{name} is not in the folder"))?;
        Ok(tensor.to_dtype(self.dtype)?)
    }

    fn linear(&self, name: &str) -> Result<Adapted> {
        let bias = format!("{name}.bias");
        let bias = self.tensors.contains_key(&bias).then(|| self.get(&bias)).transpose()?;
        Ok(Adapted { frozen: Linear::new(self.get(&format!("{name}.weight"))?, bias), adapter: None })
    }

    fn norm(&self, name: &str, config: &DecoderConfig) -> Result<RmsNorm> {
        Ok(RmsNorm::new(self.get(&format!("{name}.weight"))?, config.rms_norm_eps.into()))
    }
}

impl Model {
    /// A model from a Hugging Face folder, for sequences of up to `positions` tokens. `device` makes its rotary tables.
    ///
    /// # Errors
    /// If the folder cannot be read, or is of a model that is not [here](has).
    pub(crate) fn load(folder: &Path, device: &unsloth_rs::Device, dtype: Storage, positions: usize) -> Result<Self> {
        let config = DecoderConfig::load(folder)?;
        ensure!(has(&config), "candle's layers do not make this model");
        let dtype = match dtype {
            Storage::BF16 => DType::BF16,
            Storage::F16 => DType::F16,
            _ => DType::F32,
        };
        let weights = Weights::read(folder, dtype)?;
        let embedding = weights.get("model.embed_tokens.weight")?;
        let head = match config.tie_word_embeddings {
            true => Linear::new(embedding.clone(), None),
            false => weights.linear("lm_head")?.frozen,
        };
        let layer = |i: usize| -> Result<Layer> {
            let named = |name: &str| format!("model.layers.{i}.{name}");
            let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| weights.norm(&named(name), &config));
            let [before, after] = norms;
            let linears = PROJECTIONS.iter().map(|name| weights.linear(&named(name))).collect::<Result<_>>()?;
            Ok(Layer { norms: [before?, after?], linears })
        };
        let layers = (0..config.layers.len()).map(layer).collect::<Result<_>>()?;
        let norm = weights.norm("model.norm", &config)?;
        let (cos, sin) = config.layers[0].rope.tables(device, positions)?;
        let angles = [to_candle(&cos)?.to_dtype(dtype)?, to_candle(&sin)?.to_dtype(dtype)?];
        Ok(Self { config, embedding, layers, norm, head, angles })
    }

    /// Hidden states of tokens that follow those in the caches, normalised, `[1, tokens, hidden_size]`. Without caches by layers that
    /// have a backward pass; candle's fused ones have none.
    fn hidden(&self, ids: &[u32], mut caches: Option<&mut [Cached]>) -> candle_core::Result<Tensor> {
        let norm =
            |norm: &RmsNorm, x: &Tensor, trains: bool| if trains { norm.forward_diff(x) } else { norm.forward(x) };
        let trains = caches.is_none();
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let mut x = self.embedding.embedding(&ids)?.unsqueeze(0)?;
        let later = later_keys(x.dim(1)?)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let cache = caches.as_mut().map(|caches| &mut caches[i]);
            x = (self.attention(layer, &norm(&layer.norms[0], &x, trains)?, &later, cache)? + x)?;
            let normalised = norm(&layer.norms[1], &x, trains)?;
            let [gate, up, down] = [4, 5, 6].map(|i| &layer.linears[i]);
            let product = (ops::silu(&gate.forward(&normalised)?)? * up.forward(&normalised)?)?;
            x = (down.forward(&product)? + x)?;
        }
        norm(&self.norm, &x, trains)
    }

    fn attention(
        &self,
        layer: &Layer,
        x: &Tensor,
        later: &Tensor,
        cache: Option<&mut Cached>,
    ) -> candle_core::Result<Tensor> {
        let DecoderConfig { num_heads, num_kv_heads, head_dim, .. } = self.config;
        let (_, tokens, _) = x.dims3()?;
        let heads = |linear: &Adapted, count: usize| {
            linear.forward(x)?.reshape((1, tokens, count, head_dim))?.transpose(1, 2)?.contiguous()
        };
        let q = heads(&layer.linears[0], num_heads)?;
        let (mut k, mut v) = (heads(&layer.linears[1], num_kv_heads)?, heads(&layer.linears[2], num_kv_heads)?);
        let trains = cache.is_none();
        let before = cache.as_ref().and_then(|cache| cache.as_ref()).map_or(Ok(0), |(keys, _)| keys.dim(2))?;
        let [cos, sin] = &self.angles;
        let (cos, sin) = (cos.narrow(0, before, tokens)?, sin.narrow(0, before, tokens)?);
        let rotate = if trains { rotary_emb::rope_slow } else { rotary_emb::rope };
        let q = rotate(&q, &cos, &sin)?;
        k = rotate(&k, &cos, &sin)?;
        if let Some(cache) = cache {
            if let Some((keys, values)) = cache.take() {
                (k, v) = (Tensor::cat(&[&keys, &k], 2)?, Tensor::cat(&[&values, &v], 2)?);
            }
            *cache = Some((k.clone(), v.clone()));
        }
        let repeated = |heads: Tensor| -> candle_core::Result<Tensor> {
            let all = Tensor::cat(&vec![&heads; num_heads / num_kv_heads], 2)?;
            all.reshape((1, num_heads, before + tokens, head_dim))?.to_dtype(DType::F32)
        };
        let (k, v) = (repeated(k)?, repeated(v)?);
        let scores = (q.to_dtype(DType::F32)?.matmul(&k.t()?)? * f64::from(self.config.attention_scale))?;
        let scores = if tokens == 1 { scores } else { without(&scores, later)? };
        let softmax = if trains { ops::softmax(&scores, D::Minus1)? } else { ops::softmax_last_dim(&scores)? };
        let y = softmax.matmul(&v)?.to_dtype(x.dtype())?.transpose(1, 2)?;
        layer.linears[3].forward(&y.reshape((1, tokens, num_heads * head_dim))?)
    }

    /// Generates `new` tokens behind a prompt, each the likeliest: what they are, and the seconds of all but the first.
    ///
    /// # Errors
    /// What candle refuses.
    pub(crate) fn generate(&self, prompt: &[u32], new: usize) -> Result<(Vec<u32>, f64)> {
        let mut caches = vec![None; self.layers.len()];
        let mut next = |ids: &[u32]| -> Result<u32> {
            let hidden = self.hidden(ids, Some(&mut caches))?;
            let last = hidden.narrow(1, ids.len() - 1, 1)?.contiguous()?;
            let logits = self.head.forward(&last)?.to_dtype(DType::F32)?;
            Ok(logits.flatten_all()?.argmax(0)?.to_scalar()?)
        };
        let mut tokens = vec![next(prompt)?];
        let start = Instant::now();
        while tokens.len() < new {
            let last = tokens[tokens.len() - 1];
            tokens.push(next(&[last])?);
        }
        Ok((tokens, start.elapsed().as_secs_f64()))
    }
}

/// 1 for the keys after each query, `[tokens, tokens]`.
fn later_keys(tokens: usize) -> candle_core::Result<Tensor> {
    let later: Vec<u8> = (0..tokens).flat_map(|query| (0..tokens).map(move |key| u8::from(key > query))).collect();
    Tensor::from_vec(later, (tokens, tokens), &Device::Cpu)
}

/// Scores `[1, heads, queries, keys]` with minus infinity where the mask is set.
fn without(scores: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
    let lowest = Tensor::new(f32::NEG_INFINITY, scores.device())?.broadcast_as(scores.shape())?;
    mask.broadcast_as(scores.shape())?.where_cond(&lowest, scores)
}

/// Adapters as another trainer starts with: the layer's path, `A` `[rank, in_features]` and the factor of the update. `B` is zero.
pub(crate) type Start = Vec<(String, Tensor, f64)>;

/// What [`Training`] starts with to do as this model's trainer does.
///
/// # Errors
/// If a tensor cannot be read.
pub(crate) fn start_of(decoder: &Decoder) -> Result<Start> {
    let adapted = decoder.linears().filter_map(|linear| Some((&linear.name, linear.adapter.as_ref()?)));
    adapted
        .map(|(name, adapter)| {
            let scale = f64::from(adapter.config.alpha) / adapter.config.rank as f64;
            Ok((name.clone(), to_candle(&adapter.lora_a.value())?, scale))
        })
        .collect()
}

/// Training of adapters on all matrices of the layers: AdamW at 1e-4, weight decay 0.01, gradients clipped to 1.
pub(crate) struct Training {
    model: Model,
    trained: Vec<Var>,
    optimizer: AdamW,
    ids: Vec<u32>,
}

impl Training {
    /// # Errors
    /// As [`Model::load`]; an adapter for a matrix that is not there.
    pub(crate) fn new(
        folder: &Path,
        device: &unsloth_rs::Device,
        dtype: Storage,
        start: &Start,
        ids: Vec<u32>,
    ) -> Result<Self> {
        let mut model = Model::load(folder, device, dtype, ids.len())?;
        let mut trained = Vec::new();
        for (path, a, scale) in start {
            let linears = model.layers.iter_mut().enumerate().flat_map(|(i, layer)| {
                layer
                    .linears
                    .iter_mut()
                    .zip(PROJECTIONS)
                    .map(move |(linear, name)| (format!("model.layers.{i}.{name}"), linear))
            });
            let found = linears.into_iter().find(|(name, _)| name == path);
            let (_, linear) = found.with_context(|| format!("{path} is not a matrix of a layer"))?;
            let a = Var::from_tensor(a)?;
            let b = Var::zeros((linear.frozen.weight().dim(0)?, a.dim(0)?), DType::F32, &Device::Cpu)?;
            trained.extend([a.clone(), b.clone()]);
            linear.adapter = Some(Adapter { a, b, scale: *scale });
        }
        let parameters = ParamsAdamW { lr: 1e-4, weight_decay: 0.01, ..ParamsAdamW::default() };
        let optimizer = AdamW::new(trained.clone(), parameters)?;
        Ok(Self { model, trained, optimizer, ids })
    }

    /// Mean loss over all tokens but the first, and the gradients' norm before they are clipped.
    ///
    /// # Errors
    /// What candle refuses.
    pub(crate) fn step(&mut self) -> Result<[f32; 2]> {
        let targets = Tensor::new(&self.ids[1..], &Device::Cpu)?;
        let hidden = self.model.hidden(&self.ids, None)?.squeeze(0)?.narrow(0, 0, self.ids.len() - 1)?;
        let logits = self.model.head.forward(&hidden)?.to_dtype(DType::F32)?;
        let loss = loss::cross_entropy(&logits, &targets)?;
        let mut gradients = loss.backward()?;
        let norm = self.clip(&mut gradients)?;
        self.optimizer.step(&gradients)?;
        Ok([loss.to_scalar()?, norm])
    }

    fn clip(&self, gradients: &mut GradStore) -> Result<f32> {
        let mut sum = 0.0;
        for parameter in &self.trained {
            let gradient = gradients.get(parameter).context("every parameter has a gradient")?;
            sum += gradient.sqr()?.sum_all()?.to_scalar::<f32>()?;
        }
        let norm = sum.sqrt();
        if norm > 1.0 {
            for parameter in &self.trained {
                let clipped = gradients.get(parameter).map(|gradient| gradient / f64::from(norm)).transpose()?;
                clipped.and_then(|gradient| gradients.insert(parameter, gradient));
            }
        }
        Ok(norm)
    }
}

#[cfg(test)]
mod tests {
    use unsloth_rs::{
        cpu::{CpuBackend, CpuOptions},
        llm::{
            decoder::LoadOptions,
            generate::{GenerateOptions, generate},
            sampler::Sampling,
        },
        train::Checkpointing,
    };

    use super::*;
    use crate::{
        models::TINY,
        training::{Options, random_batch, random_ids, trainer, write_checkpoint},
    };

    fn cpu() -> unsloth_rs::Device {
        unsloth_rs::Device::new(CpuBackend::new(CpuOptions::default()).unwrap())
    }

    fn ids(count: usize) -> Vec<u32> {
        random_ids(TINY.vocab_size, count).unwrap().into_iter().map(i32::cast_unsigned).collect()
    }

    /// A peer that computed something else would be no peer.
    #[test]
    fn steps_have_the_same_loss_and_gradient_norm() {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), &TINY, 2).unwrap();
        let options = Options { dtype: Storage::F32, rank: 4, checkpointing: Checkpointing::None };
        let device = cpu();
        let mut ours = trainer(folder.path(), &device, options).unwrap();
        let start = start_of(ours.model()).unwrap();
        let mut theirs = Training::new(folder.path(), &device, Storage::F32, &start, ids(33)).unwrap();
        let batch = [random_batch(&device, TINY.vocab_size, (1, 33)).unwrap()];
        for step in 0..3 {
            ours.step(&batch).unwrap();
            let metrics = ours.finish().unwrap().unwrap();
            let peer = theirs.step().unwrap();
            for (ours, theirs) in [metrics.loss, metrics.grad_norm].into_iter().zip(peer) {
                assert!((ours - theirs).abs() <= 1e-4 * ours.abs(), "step {step}: {ours} here, {theirs} in candle");
            }
        }
    }

    #[test]
    fn generates_the_same_tokens() {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), &TINY, 2).unwrap();
        let device = cpu();
        let decoder = Decoder::load(folder.path(), &device, LoadOptions::frozen(Storage::F32)).unwrap();
        let prompt = random_ids(TINY.vocab_size, 9).unwrap();
        let options = GenerateOptions { max_new_tokens: 12, ignore_eos: true, sampling: Sampling::GREEDY };
        let ours = generate(&decoder, &prompt, options, |_| ()).unwrap().tokens;
        let model = Model::load(folder.path(), &device, Storage::F32, 21).unwrap();
        let (theirs, _) = model.generate(&ids(9), 12).unwrap();
        assert_eq!(ours, theirs.into_iter().map(u32::cast_signed).collect::<Vec<_>>());
    }
}
