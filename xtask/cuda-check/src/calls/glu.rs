//! Gated linear units: a length that vectors divide, and an odd one.

use unsloth_core::{
    DType, Result,
    ops::glu::{self, Activation},
};

use super::Caller;

const LENGTHS: [usize; 2] = [1 << 20, 4099];

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for length in LENGTHS {
        for dtype in DType::FLOATS {
            for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
                let tensor = || caller.tensor(dtype, [length]);
                let (dout, gate, up) = (tensor()?, tensor()?, tensor()?);
                let detail = |what: &str| format!("{what} {activation:?} [{length}] {dtype}");
                caller.call(detail("forward"), || glu::forward(&gate, &up, activation));
                caller.call(detail("backward"), || glu::backward(&dout, gate, up, activation));
            }
        }
    }
    Ok(())
}
