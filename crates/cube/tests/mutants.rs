//! The suites on a Vulkan device whose operators are wrong: each has to notice one fault there. All faults are tried on the processor.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use cubecl_wgpu::{WgpuDevice, WgpuRuntime};
use unsloth_core::Device;
use unsloth_cube::{CubeBackend, CubeOptions};
use unsloth_testkit::{
    mutant::{MutantBackend, Mutation, mutants, suites},
    report::FailureKind,
};

/// Faults that show in the first problems of a suite.
const FAULTS: [Mutation; 20] = [
    Mutation::AddSubtracts,
    Mutation::SumSkipsTail,
    Mutation::EmbeddingReadsNextRow,
    Mutation::NormDropsWeightOffset,
    Mutation::LayerNormIgnoresMean,
    Mutation::RopeFlipsSin,
    Mutation::GluSwapsOperands,
    Mutation::AttentionDropsScale,
    Mutation::LinearTransposesInputGradient,
    Mutation::LoraDropsScale,
    Mutation::LoraForwardIgnoresDropout,
    Mutation::DoraNormsOfBase,
    Mutation::LossForgetsNumTargets,
    Mutation::LinearLossForgetsNumTargets,
    Mutation::AdamwIgnoresGradientScale,
    Mutation::Adamw8bitIgnoresGradientScale,
    Mutation::LionDropsDecay,
    Mutation::SgdIgnoresGradientScale,
    Mutation::AdafactorDropsDecay,
    Mutation::MuonKeepsNorm,
];

/// Software devices have no bf16.
const NEEDS_BF16: &str = "stochastic_rounding";

#[test]
fn a_fault_of_every_operator_is_caught() {
    let all = mutants();
    let faults = FAULTS.map(|fault| *all.iter().find(|(mutation, ..)| *mutation == fault).unwrap());
    let named: Vec<_> = suites().into_iter().map(|(op, _)| op).filter(|&op| op != NEEDS_BF16).collect();
    assert_eq!(faults.map(|(_, op, _)| op).to_vec(), named);
    for (mutation, op, check) in faults {
        let start = std::time::Instant::now();
        let backend =
            CubeBackend::<WgpuRuntime>::new(&WgpuDevice::DefaultDevice, "vulkan:0", CubeOptions::default()).unwrap();
        let device = Device::new(MutantBackend::new(backend, Some(mutation)));
        let failure = check(&device).err().unwrap_or_else(|| panic!("{mutation:?}: {op} passes"));
        // An error instead of a result would be caught by anything.
        assert!(!matches!(failure.kind(), FailureKind::Op(_)), "{mutation:?}: {failure}");
        println!("{mutation:?}: caught by {op} in {:.1} s: {failure}", start.elapsed().as_secs_f64());
    }
}
