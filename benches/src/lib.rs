//! Shapes, inputs and settings that the benches share.

pub mod training;

use std::time::Duration;

use criterion::Criterion;
use unsloth_rs::{
    Category, DType, Device, Result, Shape, Tensor,
    core::{ops::elementwise, rng::Philox},
};
use unsloth_testkit::report::Checked;

/// Dimensions of a model on the Hub.
#[derive(Clone, Copy, Debug)]
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

/// Tokens of a micro-batch.
pub const TOKENS: usize = 1024;

/// Storage types that are timed.
pub const DTYPES: [DType; 2] = [DType::F32, DType::BF16];

/// Random numbers in `(-0.5, 0.5)`, the same for the same seed.
///
/// # Errors
/// [`unsloth_rs::Error::OutOfMemory`].
pub fn random(device: &Device, shape: impl Into<Shape>, dtype: DType, seed: u64) -> Result<Tensor> {
    let shape = shape.into();
    let stream = Philox::new(seed, 0);
    // Four numbers a block.
    let blocks = (0..shape.num_elements().div_ceil(4)).flat_map(|i| stream.block([i as u32, (i >> 32) as u32, 0, 0]));
    let mut values: Vec<f32> = blocks.map(|word| (word >> 8) as f32 / 16_777_216.0 - 0.5).collect();
    values.truncate(shape.num_elements());
    elementwise::cast(&device.from_slice(&values, shape, Category::Activations)?, dtype)
}

/// The result of a call that is being timed.
///
/// # Panics
/// If it failed: a failed call has no time.
pub fn timed<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("a timed call failed: {error}"))
}

/// Refuses to time an operator that its suite finds wrong.
///
/// # Errors
/// The suite's failure.
pub fn verified(suite: impl Fn(&Device) -> Checked, device: &Device) -> anyhow::Result<()> {
    Ok(suite(device)?)
}

/// Few samples of calls that take long; a few seconds each.
pub fn criterion() -> Criterion {
    let criterion = Criterion::default().sample_size(20);
    criterion.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3)).configure_from_args()
}
