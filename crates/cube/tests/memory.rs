//! Peak memory by the ledger: linear in the length of a sequence where a matrix of scores or logits would grow with its square.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use unsloth_core::{
    Category, DType, Device, Sequences,
    ops::{
        attention::{self, Backward, Inputs, Options},
        cross_entropy::LossSpec,
        linear_cross_entropy,
    },
};
use unsloth_cube::{CubeOptions, adapters, vulkan};

fn device() -> Device {
    let adapter = &adapters()[0];
    println!("running on {} ({})", adapter.name, adapter.driver);
    vulkan(0, CubeOptions::default()).unwrap()
}

/// Bytes taken at the peak of `call` for three lengths, each twice the one before: the second doubling adds twice what the
/// first one did, but for the rounding of buffers.
fn assert_linear(device: &Device, shortest: usize, call: impl Fn(&Device, usize)) {
    let peak = |tokens: usize| {
        device.backend().reset_peak();
        let before = device.usage().total_live_bytes();
        call(device, tokens);
        device.synchronize().unwrap();
        device.usage().total_peak_bytes() - before
    };
    let peaks = [1, 2, 4].map(|times| peak(times * shortest));
    let (first, second) = (peaks[1] - peaks[0], peaks[2] - peaks[1]);
    assert!(first > 0 && second.abs_diff(2 * first) <= 16 * 256, "{peaks:?}");
}

#[test]
fn attention_is_linear_in_the_sequence() {
    assert_linear(&device(), 128, |device, tokens| {
        let rows = |heads: usize| device.zeros([tokens, heads, 64], DType::F32, Category::Activations).unwrap();
        let (q, k, v, dout) = (rows(2), rows(1), rows(1), rows(2));
        let seqs = Sequences::from_lengths(device, &[tokens]).unwrap();
        let inputs = Inputs { q: &q, k: &k, v: &v, seq_q: &seqs, seq_k: &seqs };
        let options = Options::causal(64);
        let forward = attention::forward(inputs, options).unwrap();
        let backward = Backward { dout: &dout, out: &forward.out, lse: &forward.lse };
        attention::backward(inputs, backward, options).unwrap();
    });
}

#[test]
fn linear_cross_entropy_is_linear_in_the_tokens() {
    // More tokens than a chunk of logits has rows.
    const VOCAB_SIZE: usize = 100_000;
    assert_linear(&device(), 192, |device, tokens| {
        let x = device.zeros([tokens, 2], DType::F32, Category::Activations).unwrap();
        let weight = device.zeros([VOCAB_SIZE, 2], DType::F32, Category::Weights).unwrap();
        let weight = device.prepare_weight(weight).unwrap();
        let targets = device.from_slice(&vec![7i32; tokens], [tokens], Category::Activations).unwrap();
        let spec = LossSpec::mean(tokens);
        let loss = linear_cross_entropy::forward(&x, &weight, &targets, spec, true, None).unwrap().loss;
        let expected = (VOCAB_SIZE as f32).ln();
        assert!((loss.to_vec::<f32>().unwrap()[0] - expected).abs() < 1e-4 * expected);
    });
}
