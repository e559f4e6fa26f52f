//! LoRA training of a model from a Hugging Face folder, for timing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, serialize_to_file, tensor::TensorView};
use serde_json::json;
use tempfile::TempDir;
use unsloth_rs::{
    DType, Device,
    core::{ops::cross_entropy::IGNORE_INDEX, rng::Philox},
    llm::{
        adapter::AdapterConfig,
        decoder::{Decoder, LoadOptions, Targets},
    },
    train::{Batch, Checkpointing, Document, LoraConfig, Schedule, ScheduleKind, Trainer, TrainerConfig},
};

use crate::models::ModelShape;

/// Layers of the models that are written for timing: enough to have all of a model's calls.
pub const NUM_LAYERS: usize = 2;

/// Where a model comes from.
#[derive(Clone, Debug)]
pub enum Folder {
    /// A Hugging Face folder.
    Given(PathBuf),
    /// [`NUM_LAYERS`] layers of this shape with random weights, written when they are needed.
    Written(ModelShape),
}

/// A folder that is there, removed again when dropped if it was written.
#[derive(Debug)]
pub enum FolderPath {
    /// Somebody else's.
    Given(PathBuf),
    /// Ours.
    Written(TempDir),
}

impl AsRef<Path> for FolderPath {
    fn as_ref(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Written(folder) => folder.path(),
        }
    }
}

impl Folder {
    /// The folder, or else a model of this shape.
    pub fn of(folder: Option<&Path>, model: ModelShape) -> Self {
        folder.map_or(Self::Written(model), |folder| Self::Given(folder.to_owned()))
    }

    /// What tables call it.
    pub fn name(&self) -> String {
        match self {
            Self::Given(path) => path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
            Self::Written(model) => format!("{}, {NUM_LAYERS} layers", model.name),
        }
    }

    /// Makes sure that it is there.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn written(&self) -> anyhow::Result<FolderPath> {
        match self {
            Self::Given(path) => Ok(FolderPath::Given(path.clone())),
            Self::Written(model) => {
                let folder = tempfile::tempdir()?;
                write_checkpoint(folder.path(), model, NUM_LAYERS)?;
                Ok(FolderPath::Written(folder))
            }
        }
    }
}

/// What is trained, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Type of activations.
    pub dtype: DType,
    /// Inner dimension of the adapters.
    pub rank: usize,
    /// What is recomputed in the backward pass.
    pub checkpointing: Checkpointing,
}

/// A trainer of adapters on every linear layer: AdamW at a constant rate of 1e-4, weight decay 0.01, gradients clipped to 1.
///
/// # Errors
/// Whatever loading the folder or adding the adapters refuses.
pub fn trainer(folder: &Path, device: &Device, options: Options) -> anyhow::Result<Trainer<Decoder>> {
    let Options { dtype, rank, checkpointing } = options;
    let mut decoder = Decoder::load(folder, device, LoadOptions::frozen(dtype))?;
    decoder.set_checkpointing(checkpointing)?;
    decoder.add_adapters(&AdapterConfig::new(LoraConfig::new(rank, 16.0), Targets::AllLinear), 0)?;
    let schedule = Schedule {
        kind: ScheduleKind::Constant,
        learning_rate: 1e-4,
        warmup_steps: 0,
        total_steps: 1,
        ..Schedule::default()
    };
    let config = TrainerConfig { schedule, ..TrainerConfig::default() };
    Ok(Trainer::new(decoder, config)?)
}

/// `batch` sequences of `seq_len` random tokens, each a target of the one before it.
///
/// # Errors
/// [`unsloth_rs::train::Error`] for an empty batch.
pub fn random_batch(device: &Device, vocab_size: usize, (batch, seq_len): (usize, usize)) -> anyhow::Result<Batch> {
    let ids = random_ids(vocab_size, batch * seq_len)?;
    let mut targets: Vec<i32> = ids.iter().skip(1).copied().chain([IGNORE_INDEX]).collect();
    targets.chunks_mut(seq_len).filter_map(<[i32]>::last_mut).for_each(|last| *last = IGNORE_INDEX);
    let documents = ids.chunks(seq_len).zip(targets.chunks(seq_len));
    let documents: Vec<Document<'_>> = documents.map(|(ids, targets)| Document { ids, targets }).collect();
    Ok(Batch::new(device, &documents)?)
}

/// Random token ids, the same every time.
///
/// # Errors
/// For a vocabulary of 2^32 entries or more.
pub fn random_ids(vocab_size: usize, count: usize) -> anyhow::Result<Vec<i32>> {
    let (stream, bound) = (Philox::new(7, 0), u32::try_from(vocab_size)?);
    Ok((0..count).map(|i| stream.below([i as u32, 0, 0, 0], bound) as i32).collect())
}

/// Writes a Qwen2 checkpoint with `num_layers` layers of this shape and random bf16 weights.
///
/// # Errors
/// If the folder cannot be written.
pub fn write_checkpoint(folder: &Path, model: &ModelShape, num_layers: usize) -> anyhow::Result<()> {
    let config = json!({
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
    });
    fs::write(folder.join("config.json"), config.to_string())?;
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes(model, num_layers)
        .into_iter()
        .enumerate()
        .map(|(seed, (name, shape))| {
            let bytes = random_bf16(shape.iter().product(), seed as u64);
            (name, shape, bytes)
        })
        .collect();
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), bytes)?)))
        .collect::<anyhow::Result<_>>()?;
    Ok(serialize_to_file(views, None, &folder.join("model.safetensors"))?)
}

fn shapes(model: &ModelShape, num_layers: usize) -> Vec<(String, Vec<usize>)> {
    let ModelShape { hidden_size, intermediate_size, .. } = *model;
    let (q, kv) = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![model.vocab_size, hidden_size]),
        ("model.norm.weight".to_owned(), vec![hidden_size]),
    ];
    for layer in 0..num_layers {
        let parts = [
            ("input_layernorm.weight", vec![hidden_size]),
            ("post_attention_layernorm.weight", vec![hidden_size]),
            ("self_attn.q_proj.weight", vec![q, hidden_size]),
            ("self_attn.q_proj.bias", vec![q]),
            ("self_attn.k_proj.weight", vec![kv, hidden_size]),
            ("self_attn.k_proj.bias", vec![kv]),
            ("self_attn.v_proj.weight", vec![kv, hidden_size]),
            ("self_attn.v_proj.bias", vec![kv]),
            ("self_attn.o_proj.weight", vec![hidden_size, q]),
            ("mlp.gate_proj.weight", vec![intermediate_size, hidden_size]),
            ("mlp.up_proj.weight", vec![intermediate_size, hidden_size]),
            ("mlp.down_proj.weight", vec![hidden_size, intermediate_size]),
        ];
        shapes.extend(parts.into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
    }
    shapes
}

/// Uniform in `(-0.05, 0.05)`, cut to bf16.
fn random_bf16(count: usize, seed: u64) -> Vec<u8> {
    let stream = Philox::new(seed, 0);
    let words = (0..count.div_ceil(4)).flat_map(|i| stream.block([i as u32, 0, 0, 0]));
    let value = |word: u32| ((word >> 8) as f32 / 16_777_216.0 - 0.5) * 0.1;
    words.take(count).flat_map(|word| ((value(word).to_bits() >> 16) as u16).to_le_bytes()).collect()
}
