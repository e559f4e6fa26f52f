//! Gated linear units: lengths that vectors of eight, four and two divide, and an odd one.

use unsloth_core::{
    DType, Result,
    ops::glu::{self, Activation},
};

use super::Caller;

const LENGTHS: [usize; 4] = [1 << 20, 4100, 4098, 4099];

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
