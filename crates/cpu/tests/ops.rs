//! Every operator of the CPU backend against its suite: on a default device, and for each instruction set on one that fills
//! fresh buffers with NaN and has more threads than the machine may have cores, so that an element nobody writes shows.

use unsloth_core::{Device, Result};
use unsloth_cpu::{CpuBackend, CpuOptions, Isa};
use unsloth_testkit::suite;

fn strict(isa: Option<Isa>) -> Result<Device> {
    let options = CpuOptions { isa, num_threads: Some(3), fill_arbitrary_with_nan: true, ..CpuOptions::default() };
    Ok(Device::new(CpuBackend::new(options)?))
}

/// Devices for an operator that is the same on every path.
fn devices() -> Result<Vec<Device>> {
    Ok(vec![unsloth_cpu::device(), strict(None)?])
}

/// Devices for an operator that is made of matrix products.
fn paths() -> Result<Vec<Device>> {
    Isa::available().map(Some).map(strict).chain([Ok(unsloth_cpu::device())]).collect()
}

macro_rules! suites {
    ($devices:ident: $($op:ident)*) => {
        $(
            #[test]
            fn $op() -> Result<()> {
                $devices()?.iter().for_each(suite::$op::run);
                Ok(())
            }
        )*
    };
}

suites! {
    devices:
    adamw
    adamw8bit
    lion
    sgd
    adafactor
    muon
    stochastic_rounding
    cross_entropy
    dora
    elementwise
    embedding
    glu
    layer_norm
    reduce
    rms_norm
    rope
    rope_table
}

suites! {
    paths:
    attention
    linear
    linear_cross_entropy
    lora_dropout
    lora_linear
}
