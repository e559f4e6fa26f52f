//! Models of random weights.

use std::{fs, path::Path};

use safetensors::{Dtype, serialize_to_file, tensor::TensorView};
use serde_json::{Value, json};

/// A model of random weights, by the fields of its configuration.
pub(crate) struct Shape {
    model_type: &'static str,
    class: &'static str,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_layers: usize,
    num_heads: usize,
    num_kv_heads: usize,
    tied: bool,
}

pub(crate) const SMALL: Shape = Shape {
    model_type: "llama",
    class: "LlamaForCausalLM",
    vocab_size: 8192,
    hidden_size: 512,
    intermediate_size: 1408,
    num_layers: 8,
    num_heads: 8,
    num_kv_heads: 4,
    tied: false,
};

/// Layers of Qwen2.5-0.5B.
pub(crate) const MEDIUM: Shape = Shape {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    vocab_size: 32_000,
    hidden_size: 896,
    intermediate_size: 4864,
    num_layers: 6,
    num_heads: 14,
    num_kv_heads: 2,
    tied: true,
};

/// Deep, for its size.
pub(crate) const DEEP: Shape = Shape {
    model_type: "llama",
    class: "LlamaForCausalLM",
    vocab_size: 2048,
    hidden_size: 256,
    intermediate_size: 704,
    num_layers: 24,
    num_heads: 4,
    num_kv_heads: 2,
    tied: true,
};

impl Shape {
    fn config(&self) -> Value {
        json!({
            "model_type": self.model_type,
            "architectures": [self.class],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "dtype": "float32",
        })
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let kv = hidden / self.num_heads * self.num_kv_heads;
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        if !self.tied {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        for layer in 0..self.num_layers {
            let mut parts = vec![
                ("input_layernorm.weight", vec![hidden]),
                ("post_attention_layernorm.weight", vec![hidden]),
                ("self_attn.q_proj.weight", vec![hidden, hidden]),
                ("self_attn.k_proj.weight", vec![kv, hidden]),
                ("self_attn.v_proj.weight", vec![kv, hidden]),
                ("self_attn.o_proj.weight", vec![hidden, hidden]),
                ("mlp.gate_proj.weight", vec![intermediate, hidden]),
                ("mlp.up_proj.weight", vec![intermediate, hidden]),
                ("mlp.down_proj.weight", vec![hidden, intermediate]),
            ];
            if self.model_type == "qwen2" {
                let biases = [("q", hidden), ("k", kv), ("v", kv)];
                let names = ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"];
                parts.extend(names.into_iter().zip(biases).map(|(name, (_, length))| (name, vec![length])));
            }
            tensors.extend(parts.into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
        }
        tensors
    }

    /// Writes `config.json` alone.
    pub(crate) fn write_config(&self, folder: &Path) {
        fs::write(folder.join("config.json"), self.config().to_string()).unwrap();
    }

    /// Writes the whole model. Every tensor is the front of one random one: what they hold makes no difference here.
    pub(crate) fn write(&self, folder: &Path) {
        self.write_config(folder);
        let tensors = self.tensors();
        let bytes = |shape: &[usize]| 4 * shape.iter().product::<usize>();
        let random = random_f32(tensors.iter().map(|(_, shape)| bytes(shape)).max().unwrap() / 4);
        let view = |shape: &Vec<usize>| TensorView::new(Dtype::F32, shape.clone(), &random[..bytes(shape)]).unwrap();
        let views = tensors.iter().map(|(name, shape)| (name.as_str(), view(shape)));
        serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }
}

/// Uniform in `(-0.05, 0.05)`.
fn random_f32(count: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut draw = || {
        // Numerical Recipes' generator, of which the high bits are good.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / 16_777_216.0 - 0.5) * 0.1
    };
    (0..count).flat_map(|_| draw().to_le_bytes()).collect()
}
