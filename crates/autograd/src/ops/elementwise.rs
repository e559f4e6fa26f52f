//! Elementwise operators, casts and reshapes.

use unsloth_core::{DType, Result, Shape, ops::elementwise as core};

use crate::{Deferred, Tape, Var};

/// `a + b` of one shape and type; `a` is reused where nothing else holds it. Keeps nothing.
///
/// # Errors
/// As [`core::add`]; an input of another tape.
pub fn add(tape: &Tape, a: Var, b: &Var) -> Result<Var> {
    Deferred::from(a).add(tape, b)?.compute()
}

/// `a * b` of one shape and type; `a` is reused where nothing else holds it.
///
/// `da = dout * b`, `db = dout * a`. Keeps each factor only where the other one needs a gradient.
///
/// # Errors
/// As [`core::mul`]; an input of another tape.
pub fn mul(tape: &Tape, a: Var, b: &Var) -> Result<Var> {
    let link = tape.link("mul", &[&a, b], &[])?;
    let (to_a, to_b) = (a.source(), b.source());
    let for_b = to_b.filter(|_| link.saves()).map(|_| a.tensor().clone());
    let for_a = to_a.filter(|_| link.saves()).map(|_| b.tensor().clone());
    Ok(link.one(core::mul(a.into_tensor(), b.tensor())?, move |context, dout| {
        if let Some(b) = for_a.filter(|_| context.wants(to_a)) {
            context.send(to_a, core::mul(dout.clone(), &b)?)?;
        }
        match for_b.filter(|_| context.wants(to_b)) {
            Some(a) => context.send(to_b, core::mul(dout, &a)?),
            None => Ok(()),
        }
    }))
}

/// `x * factor`; `x` is reused where nothing else holds it. Keeps nothing.
///
/// # Errors
/// As [`core::scale`]; an input of another tape.
pub fn scale(tape: &Tape, x: Var, factor: f32) -> Result<Var> {
    let link = tape.link("scale", &[&x], &[])?;
    let to = x.source();
    Ok(link
        .one(core::scale(x.into_tensor(), factor)?, move |context, dout| context.send(to, core::scale(dout, factor)?)))
}

/// The same values in another float type; the gradient is cast back. Keeps nothing.
///
/// # Errors
/// As [`core::cast`]; an input of another tape.
pub fn cast(tape: &Tape, x: &Var, dtype: DType) -> Result<Var> {
    let link = tape.link("cast", &[x], &[])?;
    let (to, from) = (x.source(), x.dtype());
    Ok(link.one(core::cast(x.tensor(), dtype)?, move |context, dout| context.send(to, core::cast(&dout, from)?)))
}

/// The same elements under another shape; shares the buffer. Keeps nothing.
///
/// # Errors
/// [`unsloth_core::Error::Shape`] if the number of elements differs; an input of another tape.
pub fn reshape(tape: &Tape, x: &Var, shape: impl Into<Shape>) -> Result<Var> {
    let link = tape.link("reshape", &[x], &[])?;
    let (to, from) = (x.source(), *x.shape());
    let out = x.tensor().clone().reshape(shape)?;
    Ok(link.one(out, move |context, dout| context.send(to, dout.reshape(from)?)))
}
