//! The operator suites on the first Vulkan device of this machine.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use cubecl::prelude::*;
use cubecl_wgpu::{WgpuDevice, WgpuRuntime};
use unsloth_core::{DType, Device, Error, ops::stochastic_rounding::Spec, rng::Philox};
use unsloth_cube::{CubeOptions, adapters, vulkan};
use unsloth_pointwise::stochastic_rounding::{Draw, round};
use unsloth_testkit::{data::Data, oracle, report::FailureKind, suite};

/// The device under test; fresh buffers hold NaN, so that an element which no kernel wrote is seen.
fn device() -> Device {
    let adapter = &adapters()[0];
    println!("running on {} ({})", adapter.name, adapter.driver);
    let options = CubeOptions { fill_arbitrary_with_nan: true, ..Default::default() };
    vulkan(0, options).unwrap_or_else(|error| panic!("{error}"))
}

/// Suites check the types that a device has: were f16 missing, half of what they check would be gone without a word.
#[test]
fn a_software_device_has_f16() {
    assert!(device().supports(DType::F16) || !adapters()[0].is_cpu);
}

#[test]
fn adafactor() {
    suite::adafactor::run(&device());
}

#[test]
fn adamw() {
    suite::adamw::run(&device());
}

#[test]
fn adamw8bit() {
    suite::adamw8bit::run(&device());
}

// No other suite takes as long: its parts run beside each other.
#[test]
fn attention_in_f32() {
    suite::attention::run_shapes(&device(), DType::F32);
}

#[test]
fn attention_in_half_precision() {
    let device = device();
    for dtype in device.float_dtypes().into_iter().filter(|&dtype| dtype != DType::F32) {
        suite::attention::run_shapes(&device, dtype);
    }
}

#[test]
fn attention_without_shapes() {
    suite::attention::run_without_shapes(&device());
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

/// A device without bf16 has none to round to, and says so; the kernel itself, which computes with integers, runs there as well.
#[test]
fn stochastic_rounding() {
    let device = device();
    if device.supports(DType::BF16) {
        suite::stochastic_rounding::run(&device);
    } else {
        let failure = suite::stochastic_rounding::check(&device).expect_err("bf16 on a device without it");
        let FailureKind::Op(Error::UnsupportedDType { dtype: DType::BF16, .. }) = failure.kind() else {
            panic!("{failure}")
        };
        rounds_as_the_oracle();
    }
}

fn rounds_as_the_oracle() {
    let client = WgpuRuntime::client(&WgpuDevice::DefaultDevice);
    let spec = Spec { stream: Philox::new(5, 6), step: 7, tensor: u32::MAX };
    let draw = Draw { key: spec.stream.key(), step: spec.step, tensor: spec.tensor };
    let mut special = vec![f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::from_bits(0x7F80_0001), -0.0, f32::MAX];
    special.extend([f32::from_bits(1), 1.0, 0.0]);
    let values = |length| Data::new(95).normal(length, 1e-3, DType::F32).into_iter().map(|value| value as f32);
    for x in suite::AWKWARD_LENGTHS.map(|length| values(length).collect()).into_iter().chain([special]) {
        let x: Vec<f32> = x;
        // What is there already must not count.
        let words = vec![u32::MAX; x.len().div_ceil(2).max(1)];
        let out = client.create_from_slice(u32::as_bytes(&words));
        let bits = client.create_from_slice(f32::as_bytes(&[&*x, &[0.0]].concat()));
        round(&client, draw, x.len(), (&bits, &out)).unwrap();
        let out = client.read_one(out).unwrap();
        let exact = oracle::stochastic_rounding::round(&spec, &x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        for (i, (&x, exact)) in x.iter().zip(exact).enumerate() {
            let actual = u16::from_bytes(&out)[i];
            // The oracle knows no number that is not finite: those stay, a NaN as a quiet one.
            let expected = if x.is_finite() { half::bf16::from_f64(exact) } else { half::bf16::from_f32(x) };
            assert_eq!(actual, expected.to_bits(), "element {i}, {x:e}");
        }
    }
}
