//! The same calls give the same bits, fifty times over: every tensor that a suite reads, on one Vulkan device.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use cubecl_wgpu::{WgpuDevice, WgpuRuntime};
use unsloth_core::Device;
use unsloth_cube::{CubeBackend, CubeOptions};
use unsloth_testkit::{
    mutant::{MutantBackend, Reads, suites},
    suite::Suite,
};

const REPEATS: usize = 50;

/// Of software devices, which have no bf16, there is nothing to read.
const NEEDS_BF16: [&str; 1] = ["stochastic_rounding"];

fn repeat(name: &str, check: Suite) {
    let options = CubeOptions { fill_arbitrary_with_nan: true, ..Default::default() };
    let backend = CubeBackend::<WgpuRuntime>::new(&WgpuDevice::DefaultDevice, "vulkan:0", options).unwrap();
    let reads = Reads::default();
    let device = Device::new(MutantBackend::observed(backend, reads.clone()));
    let digests = (0..REPEATS).map(|_| {
        check(&device).unwrap_or_else(|failure| panic!("{name}: {failure}"));
        reads.take()
    });
    let digests: Vec<u64> = digests.collect();
    assert_ne!(digests[0], Reads::default().take(), "{name} reads nothing");
    let other = digests.iter().position(|digest| *digest != digests[0]);
    assert_eq!(other, None, "{name}: the first repeat with other bits");
    println!("{name}, {REPEATS} times: passed on {}", device.name());
}

macro_rules! repeated {
    ($($op:ident)*) => {
        $(
            #[test]
            #[ignore = "full: fifty times as long as the suite"]
            fn $op() {
                repeat(stringify!($op), unsloth_testkit::suite::$op::check);
            }
        )*

        #[test]
        fn every_suite_is_repeated() {
            let named: Vec<_> = suites().into_iter().map(|(op, _)| op).filter(|op| !NEEDS_BF16.contains(op)).collect();
            assert_eq!(named, [$(stringify!($op)),*]);
        }
    };
}

repeated! {
    elementwise
    reduce
    embedding
    rms_norm
    layer_norm
    rope
    glu
    attention
    linear
    lora_linear
    lora_dropout
    dora
    cross_entropy
    linear_cross_entropy
    adamw
    adamw8bit
    lion
    sgd
    adafactor
    muon
}
