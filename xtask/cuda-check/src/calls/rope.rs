//! RoPE: both layouts and directions.

use unsloth_core::{
    DType, Result,
    ops::rope::{self, Angles, Direction, Layout},
};

use super::Caller;

/// Those of real models, and those whose halves are even or odd.
const HEAD_DIMS: [usize; 3] = [128, 4, 6];
const TOKENS: usize = 512;

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for dtype in DType::FLOATS {
        for head_dim in HEAD_DIMS {
            let tables = [TOKENS, head_dim / 2];
            let (cos, sin) = (caller.tensor(DType::F32, tables)?, caller.tensor(DType::F32, tables)?);
            let positions = caller.tensor(DType::I32, [TOKENS])?;
            let angles = Angles { cos: &cos, sin: &sin, positions: &positions };
            for layout in [Layout::Half, Layout::Interleaved] {
                for direction in [Direction::Forward, Direction::Inverse] {
                    let q = caller.tensor(dtype, [TOKENS, 32, head_dim])?;
                    let k = caller.tensor(dtype, [TOKENS, 8, head_dim])?;
                    let detail = format!("{layout:?} {direction:?} [{TOKENS}, 32 and 8, {head_dim}] {dtype}");
                    caller.call(detail, || rope::apply(q, k, angles, layout, direction));
                }
            }
        }
    }
    Ok(())
}
