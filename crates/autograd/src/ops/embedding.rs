//! Rows of a table picked by token id; formula and gradient in [`core`].

use unsloth_core::{DType, Result, Tensor, ops::embedding as core};

use crate::{Matrix, Tape, Var};

/// Rows `[tokens, hidden_size]` of `dtype` from ids i32 `[tokens]`. Keeps the ids if the table is trained.
///
/// # Errors
/// As [`core::forward`].
pub fn embedding(tape: &Tape, table: &Matrix, ids: &Tensor, dtype: DType) -> Result<Var> {
    let link = tape.link("embedding", &[], &[table.parameter()])?;
    let out = core::forward(&table.weight()?, ids, dtype)?;
    let Some(parameter) = table.parameter().cloned() else {
        return Ok(Var::constant(out));
    };
    let ids = ids.clone();
    Ok(link.one(out, move |context, dout| match context.gradient(&parameter) {
        Some(dweight) => core::backward(&ids, &dout, dweight),
        None => Ok(()),
    }))
}
