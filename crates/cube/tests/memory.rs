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

/// The first Vulkan device, taken for one with so much memory.
fn device_with(memory_bytes: u64) -> Device {
    let adapter = &adapters()[0];
    println!("running on {} ({})", adapter.name, adapter.driver);
    vulkan(0, CubeOptions { memory_bytes: Some(memory_bytes), ..Default::default() }).unwrap()
}

fn device() -> Device {
    device_with(8 << 30)
}

/// Bytes taken at the peak of `call`.
fn peak(device: &Device, call: impl FnOnce()) -> u64 {
    device.backend().reset_peak();
    let before = device.usage().total_live_bytes();
    call();
    device.synchronize().unwrap();
    device.usage().total_peak_bytes() - before
}

/// Bytes taken at the peak of `call` for three lengths, each twice the one before: the second doubling adds twice what the
/// first one did, but for the rounding of buffers.
fn assert_linear(device: &Device, shortest: usize, call: impl Fn(&Device, usize)) {
    let peaks = [1, 2, 4].map(|times| peak(device, || call(device, times * shortest)));
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
    for dtype in [DType::F32, DType::F16] {
        assert_linear(&device(), 192, |device, tokens| loss(device, (tokens, VOCAB_SIZE), dtype, true));
    }
}

/// A loss over zeros.
fn loss(device: &Device, (tokens, vocab_size): (usize, usize), dtype: DType, needs_dx: bool) {
    let x = device.zeros([tokens, 2], dtype, Category::Activations).unwrap();
    let weight = device.zeros([vocab_size, 2], dtype, Category::Weights).unwrap();
    let weight = device.prepare_weight(weight).unwrap();
    let targets = device.from_slice(&vec![7i32; tokens], [tokens], Category::Activations).unwrap();
    let spec = LossSpec::mean(tokens);
    let loss = linear_cross_entropy::forward(&x, &weight, &targets, spec, needs_dx, None).unwrap().loss;
    let expected = (vocab_size as f32).ln();
    assert!((loss.to_vec::<f32>().unwrap()[0] - expected).abs() < 1e-4 * expected);
}

/// A chunk takes a 128th of the memory, of 64 MiB or more. Its gradient in f16 takes half as much again, where one is wanted.
#[test]
fn chunks_of_logits_are_larger_where_there_is_room() {
    const VOCAB_SIZE: usize = 50_000;
    const TOKENS: usize = 400;
    let row_bytes = 4 * VOCAB_SIZE as u64;
    for (memory_bytes, rows) in [(1 << 30, 256), (8 << 30, 256), (12 << 30, 384)] {
        let device = device_with(memory_bytes);
        for (dtype, needs_dx, chunk_bytes) in [
            (DType::F32, true, rows * row_bytes),
            (DType::F16, false, rows * row_bytes),
            (DType::F16, true, rows * row_bytes * 3 / 2),
        ] {
            let taken = peak(&device, || loss(&device, (TOKENS, VOCAB_SIZE), dtype, needs_dx));
            let matrix_bytes = (VOCAB_SIZE * 2 * dtype.size_bytes()) as u64;
            let rest = taken - matrix_bytes - chunk_bytes;
            assert!(rest < 32 * TOKENS as u64, "{memory_bytes}: {rest} bytes besides {rows} rows, {dtype}, {needs_dx}");
        }
    }
}
