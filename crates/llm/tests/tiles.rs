//! Feed-forward parts in tiles: the gradients of the whole, up to the order of sums.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap fails the test")]

mod common;

use common::{Golden, batch, fixture, gradients, relative_difference, under_every_policy};
use unsloth_core::DType;
use unsloth_llm::{
    decoder::{Decoder, LoadOptions},
    peft,
};
use unsloth_train::{Batch, Draw};

/// Dropout included: a tile draws the zeros of its rows.
fn tiles_change_no_more_than_the_order_of_sums(model: &str, dtype: DType, most: f32) {
    let (device, golden) = (unsloth_cpu::device(), Golden::open(model));
    let draw = Draw { seed: 1, step: 4, first_sequence: 2 };
    let drawn = Batch { draw: Some(draw), ..batch(&device, &golden.rows()) };
    let tokens = drawn.num_tokens();
    let mut decoder = Decoder::load(&fixture(model).join("model"), &device, LoadOptions::frozen(dtype)).unwrap();
    peft::load(&fixture(model).join("adapter"), &mut decoder).unwrap();
    decoder.set_dropout(0.3).unwrap();
    let whole = gradients(&decoder, &drawn);
    decoder.set_mlp_tile(Some(tokens)).unwrap();
    assert_eq!(gradients(&decoder, &drawn), whole, "one tile");
    for tile in [1, 7, tokens / 2, tokens - 1] {
        decoder.set_mlp_tile(Some(tile)).unwrap();
        let tiled = gradients(&decoder, &drawn);
        let error = (tiled.0 - whole.0).abs() / whole.0;
        assert!(error <= most / 10.0, "tiles of {tile}: loss {} and {}", tiled.0, whole.0);
        for (name, gradient) in &tiled.1 {
            let error = relative_difference(gradient, &whole.1[name]);
            assert!(error <= most, "{name}, tiles of {tile}: {error}");
        }
        if tile == tokens / 2 {
            under_every_policy(&mut decoder, |decoder, policy| {
                assert_eq!(gradients(decoder, &drawn), tiled, "{policy}");
            });
        }
    }
    let message = decoder.set_mlp_tile(Some(0)).unwrap_err().to_string();
    assert_eq!(message, "mlp_tile = 0, must be at least 1");
}

#[test]
fn llama() {
    tiles_change_no_more_than_the_order_of_sums("tiny-llama", DType::F32, 2e-5);
}

/// Norms behind the feed-forward part stand within its tiles.
#[test]
fn gemma() {
    tiles_change_no_more_than_the_order_of_sums("tiny-gemma2", DType::F32, 2e-5);
}
