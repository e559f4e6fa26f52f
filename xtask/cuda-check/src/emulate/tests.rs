//! Suites of the operators that have kernels for tensor cores, and of those that want bf16, which software devices lack, on the
//! emulated card.

use unsloth_core::Device;
use unsloth_cube::{CubeBackend, CubeOptions};
use unsloth_testkit::suite;

use super::{
    host::compiler,
    server::{EmulatedCuda, EmulatedDevice, MUTATIONS},
};

/// Fresh buffers hold NaN, so that an element which no kernel wrote is seen.
fn open(device: &EmulatedDevice) -> Device {
    let options = CubeOptions { fill_arbitrary_with_nan: true, ..Default::default() };
    let backend = CubeBackend::<EmulatedCuda>::new(device, format!("emulated:{}", device.number), options);
    Device::new(backend.unwrap_or_else(|error| panic!("{error}")))
}

/// Runs a test on a card of its own, where there is a compiler to make one.
fn on_card(number: u16, run: fn(&Device)) {
    if has_compiler() {
        run(&open(&EmulatedDevice { number, mutation: None }));
    }
}

fn has_compiler() -> bool {
    let found = compiler().is_some();
    if !found {
        println!("emulated card: not run (no C++ compiler: none in CXX, and no `c++`)");
    }
    found
}

#[test]
fn attention() {
    on_card(0, suite::attention::run_on_tensor_cores);
}

#[test]
fn linear() {
    on_card(1, suite::linear::run_on_tensor_cores);
}

#[test]
fn linear_cross_entropy() {
    on_card(5, suite::linear_cross_entropy::run_on_tensor_cores);
}

#[test]
#[ignore = "full: a compiler run for each of a hundred kernels"]
fn adafactor() {
    on_card(4, suite::adafactor::run);
}

#[test]
fn stochastic_rounding() {
    on_card(3, suite::stochastic_rounding::run);
}

/// A suite that passes on a wrong kernel proves nothing.
#[test]
fn wrong_kernels_are_caught() {
    if !has_compiler() {
        return;
    }
    for (mutation, (what, ..)) in (0..).zip(MUTATIONS) {
        let device = open(&EmulatedDevice { number: 2, mutation: Some(mutation) });
        let failure = suite::attention::check_on_tensor_cores(&device).err();
        println!("{what}: {}", failure.unwrap_or_else(|| panic!("{what}: not caught")));
    }
}
