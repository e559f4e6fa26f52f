//! Shapes of models on the Hub.

/// Dimensions of a model on the Hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Name as on the Hub, without the owner.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the matrices of the feed-forward part.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
}

/// Llama 3.2 with 1.2 billion parameters.
pub const LLAMA_3_2_1B: ModelShape = ModelShape {
    name: "Llama-3.2-1B",
    hidden_size: 2048,
    intermediate_size: 8192,
    num_heads: 32,
    num_kv_heads: 8,
    head_dim: 64,
    vocab_size: 128_256,
};

/// Llama 3.1 with 8 billion parameters.
pub const LLAMA_3_1_8B: ModelShape = ModelShape {
    name: "Llama-3.1-8B",
    hidden_size: 4096,
    intermediate_size: 14_336,
    num_heads: 32,
    num_kv_heads: 8,
    head_dim: 128,
    vocab_size: 128_256,
};

/// Qwen 2.5 with half a billion parameters.
pub const QWEN2_5_0_5B: ModelShape = ModelShape {
    name: "Qwen2.5-0.5B",
    hidden_size: 896,
    intermediate_size: 4864,
    num_heads: 14,
    num_kv_heads: 2,
    head_dim: 64,
    vocab_size: 151_936,
};

/// Qwen 2.5 with 7.6 billion parameters.
pub const QWEN2_5_7B: ModelShape = ModelShape {
    name: "Qwen2.5-7B",
    hidden_size: 3584,
    intermediate_size: 18_944,
    num_heads: 28,
    num_kv_heads: 4,
    head_dim: 128,
    vocab_size: 152_064,
};

/// Qwen 3 with 4 billion parameters; its heads are wider than its residual stream.
pub const QWEN3_4B: ModelShape = ModelShape {
    name: "Qwen3-4B",
    hidden_size: 2560,
    intermediate_size: 9728,
    num_heads: 32,
    num_kv_heads: 8,
    head_dim: 128,
    vocab_size: 151_936,
};

/// All of them, the smallest first.
pub const MODELS: [ModelShape; 5] = [QWEN2_5_0_5B, LLAMA_3_2_1B, QWEN3_4B, QWEN2_5_7B, LLAMA_3_1_8B];

/// Two hundred thousand weights in two layers: quick even where little is optimised.
#[cfg(test)]
pub(crate) const TINY: ModelShape = ModelShape {
    name: "tiny",
    hidden_size: 64,
    intermediate_size: 96,
    num_heads: 4,
    num_kv_heads: 2,
    head_dim: 16,
    vocab_size: 512,
};
