//! The sum of all elements.

use unsloth_core::{
    Category, DType, Result,
    ops::{embedding, reduce as core},
};

use crate::{Tape, Var};

/// Sum of all elements of a float tensor, f32 `[1]`; the gradient is spread to every element. Keeps nothing.
///
/// # Errors
/// As [`core::sum`]; an input of another tape.
pub fn sum(tape: &Tape, x: &Var) -> Result<Var> {
    let link = tape.link("sum", &[x], &[])?;
    let (to, shape, dtype) = (x.source(), *x.shape(), x.dtype());
    Ok(link.one(core::sum(x.tensor())?, move |context, dout| {
        if !context.wants(to) {
            return Ok(());
        }
        // Picking row 0 of a one-row table for every element is a broadcast that stays on the device.
        let device = dout.device().clone();
        let rows = device.zeros([shape.num_elements()], DType::I32, Category::Workspace)?;
        let table = device.prepare_weight(dout.reshape([1, 1])?)?;
        context.send(to, embedding::forward(&table, &rows, dtype)?.reshape(shape)?)
    }))
}
