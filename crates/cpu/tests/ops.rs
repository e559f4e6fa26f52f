//! Every operator of the CPU backend against its suite: on a default device, and on one that fills fresh buffers with NaN and
//! has more threads than the machine may have cores, so that an element nobody writes shows.

use unsloth_core::{Device, Result};
use unsloth_cpu::{CpuBackend, CpuOptions};
use unsloth_testkit::suite;

fn devices() -> Result<[Device; 2]> {
    let options = CpuOptions { num_threads: Some(3), fill_arbitrary_with_nan: true, ..CpuOptions::default() };
    Ok([unsloth_cpu::device(), Device::new(CpuBackend::new(options)?)])
}

macro_rules! suites {
    ($($op:ident)*) => {
        $(
            #[test]
            fn $op() -> Result<()> {
                devices()?.iter().for_each(suite::$op::run);
                Ok(())
            }
        )*
    };
}

suites! {
    adamw
    attention
    cross_entropy
    elementwise
    embedding
    glu
    linear
    linear_cross_entropy
    lora_dropout
    lora_linear
    reduce
    rms_norm
    rope
    rope_table
}
