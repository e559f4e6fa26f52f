//! The operator suites on the first Vulkan device of this machine.
#![cfg(feature = "wgpu")]

use unsloth_core::Device;
use unsloth_cube::{CubeOptions, adapters, vulkan};
use unsloth_testkit::suite;

/// The device under test; fresh buffers hold NaN, so that an element which no kernel wrote is seen.
fn device() -> Device {
    let adapter = &adapters()[0];
    println!("running on {} ({})", adapter.name, adapter.driver);
    let options = CubeOptions { fill_arbitrary_with_nan: true, ..Default::default() };
    vulkan(0, options).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn adamw() {
    suite::adamw::run(&device());
}

#[test]
fn adamw8bit() {
    suite::adamw8bit::run(&device());
}

#[test]
fn attention() {
    suite::attention::run(&device());
}

#[test]
fn cross_entropy() {
    suite::cross_entropy::run(&device());
}

#[test]
fn dora() {
    suite::dora::run(&device());
}

#[test]
fn elementwise() {
    suite::elementwise::run(&device());
}

#[test]
fn embedding() {
    suite::embedding::run(&device());
}

#[test]
fn glu() {
    suite::glu::run(&device());
}

#[test]
fn layer_norm() {
    suite::layer_norm::run(&device());
}

#[test]
fn linear() {
    suite::linear::run(&device());
}

#[test]
fn linear_cross_entropy() {
    suite::linear_cross_entropy::run(&device());
}

#[test]
fn lion() {
    suite::lion::run(&device());
}

#[test]
fn lora_dropout() {
    suite::lora_dropout::run(&device());
}

#[test]
fn lora_linear() {
    suite::lora_linear::run(&device());
}

#[test]
fn muon() {
    suite::muon::run(&device());
}

#[test]
fn reduce() {
    suite::reduce::run(&device());
}

#[test]
fn rms_norm() {
    suite::rms_norm::run(&device());
}

#[test]
fn rope() {
    suite::rope::run(&device());
}

#[test]
fn sgd() {
    suite::sgd::run(&device());
}
