//! The operator suites on the first Vulkan device of this machine.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use std::process::Command;

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

/// Runs a suite in a process of its own. In one process CubeCL works for a device on one thread, where the driver compiles kernels, which
/// takes most of the time: tests beside each other would only wait for each other.
fn apart(name: &str, suite: impl FnOnce(&Device)) {
    const INSIDE: &str = "UNSLOTH_SUITE_IN_PROCESS";
    if std::env::var_os(INSIDE).is_some() {
        return suite(&device());
    }
    let mut process = Command::new(std::env::current_exe().unwrap());
    let output = process.args(["--exact", name, "--show-output"]).env(INSIDE, "1").output().unwrap();
    let [said, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    let is_passed = output.status.success() && said.contains("test result: ok. 1 passed");
    assert!(is_passed, "{}: {said}{errors}", output.status);
    // Where it ran, without what the other process says of its tests.
    said.lines().filter(|line| line.contains(" on ")).for_each(|line| println!("{line}"));
}

macro_rules! suites {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                apart(stringify!($name), suite::$name::run);
            }
        )*
    };
}

suites! {
    adafactor adamw adamw8bit cross_entropy dora elementwise embedding glu layer_norm linear linear_cross_entropy lion lora_dropout
    lora_linear muon reduce rms_norm rope sgd
}

// No other suite takes as long: its parts run beside each other.
#[test]
fn attention_in_f32() {
    apart("attention_in_f32", |device| suite::attention::run_shapes(device, DType::F32));
}

#[test]
fn attention_in_half_precision() {
    apart("attention_in_half_precision", |device| {
        for dtype in device.float_dtypes().into_iter().filter(|&dtype| dtype != DType::F32) {
            suite::attention::run_shapes(device, dtype);
        }
    });
}

#[test]
fn attention_without_shapes() {
    apart("attention_without_shapes", suite::attention::run_without_shapes);
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
