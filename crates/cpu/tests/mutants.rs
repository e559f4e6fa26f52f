//! The suites are shown to fail: on the CPU backend with one fault at a time. A device error does not count as caught, since
//! it says nothing about the numbers.

use unsloth_core::{Device, Result};
use unsloth_cpu::{CpuBackend, CpuOptions};
use unsloth_testkit::{
    mutant::{MutantBackend, Mutation, mutants, suites},
    report::FailureKind,
};

fn device(mutation: Option<Mutation>) -> Result<Device> {
    Ok(Device::new(MutantBackend::new(CpuBackend::new(CpuOptions::default())?, mutation)))
}

/// What a suite missed among the faults made for it.
fn survivors(op: &str) -> Result<Vec<String>> {
    let mut survivors = Vec::new();
    let made_for_op: Vec<_> = mutants().into_iter().filter(|(_, suite, _)| *suite == op).collect();
    assert!(!made_for_op.is_empty(), "no fault is made for {op}");
    for (mutation, _, check) in made_for_op {
        match check(&device(Some(mutation))?) {
            Ok(()) => survivors.push(format!("{mutation:?} passes")),
            Err(failure) if matches!(failure.kind(), FailureKind::Op(_)) => survivors.push(failure.to_string()),
            Err(failure) => println!("caught: {failure}"),
        }
    }
    Ok(survivors)
}

macro_rules! caught {
    ($($op:ident)*) => {
        $(
            #[test]
            fn $op() -> Result<()> {
                assert_eq!(survivors(stringify!($op))?, [String::new(); 0]);
                Ok(())
            }
        )*

        /// No fault is left out of the tests above.
        #[test]
        fn every_suite_is_tested() {
            let tested = [$(stringify!($op)),*];
            let named: Vec<_> = suites().into_iter().map(|(op, _)| op).collect();
            assert_eq!(named, tested);
        }
    };
}

caught! {
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
    stochastic_rounding
}

/// The wrapper without a fault passes, so that what fails above is the fault.
#[test]
fn without_a_fault_all_suites_pass() -> Result<()> {
    for (op, check) in suites() {
        if let Err(failure) = check(&device(None)?) {
            panic!("{op}: {failure}");
        }
    }
    Ok(())
}
