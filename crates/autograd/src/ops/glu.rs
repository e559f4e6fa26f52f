//! Gated linear unit; formula and gradient in [`core`].

use unsloth_core::{
    Result,
    ops::glu::{self as core, Activation},
};

use crate::{Tape, Var, saved::Again};

/// `act(gate) * up`, of one shape and type. Keeps both inputs; their buffers become their gradients.
///
/// # Errors
/// As [`core::forward`]; an input of another tape.
pub fn glu(tape: &Tape, gate: &Var, up: &Var, activation: Activation) -> Result<Var> {
    let link = tape.link("glu", &[gate, up], &[])?;
    let out = core::forward(gate.tensor(), up.tensor(), activation)?;
    let (to_gate, to_up) = (gate.source(), up.source());
    let (gate, up) = (gate.tensor().clone(), up.tensor().clone());
    let again = (tape.recompute().gates && link.saves()).then(|| {
        let (gate, up) = (gate.clone(), up.clone());
        Again::new(move || core::forward(&gate, &up, activation))
    });
    let value = link.one(out, move |context, dout| {
        let core::Gradients { dgate, dup } = core::backward(&dout, gate, up, activation)?;
        drop(dout);
        context.send(to_gate, dgate)?;
        context.send(to_up, dup)
    });
    Ok(value.with_again(again))
}
