//! Suites of the operators that have kernels for tensor cores, on the emulated card.

use unsloth_core::Device;
use unsloth_cube::{CubeBackend, CubeOptions};
use unsloth_testkit::suite;

use super::server::{EmulatedCuda, EmulatedDevice, MUTATIONS};

/// Fresh buffers hold NaN, so that an element which no kernel wrote is seen.
fn open(device: &EmulatedDevice) -> Device {
    let options = CubeOptions { fill_arbitrary_with_nan: true, ..Default::default() };
    let backend = CubeBackend::<EmulatedCuda>::new(device, format!("emulated:{}", device.number), options);
    Device::new(backend.unwrap_or_else(|error| panic!("{error}")))
}

/// A card of its own for each test.
fn device(number: u16) -> Device {
    open(&EmulatedDevice { number, mutation: None })
}

#[test]
fn attention() {
    suite::attention::run_on_tensor_cores(&device(0));
}

#[test]
fn linear() {
    suite::linear::run_on_tensor_cores(&device(1));
}

/// A suite that passes on a wrong kernel proves nothing.
#[test]
fn wrong_kernels_are_caught() {
    for (mutation, (what, ..)) in (0..).zip(MUTATIONS) {
        let device = open(&EmulatedDevice { number: 2, mutation: Some(mutation) });
        let failure = suite::attention::check_on_tensor_cores(&device).err();
        println!("{what}: {}", failure.unwrap_or_else(|| panic!("{what}: not caught")));
    }
}
