//! Rotary position embedding of queries and keys; formula and gradient in [`core`].

use unsloth_core::{
    Category, Result, Tensor,
    ops::rope::{self as core, Angles, Direction, Layout},
};

use crate::{Tape, Var};

/// Angles of a rotation.
#[derive(Clone, Debug)]
pub struct RopeAngles {
    /// f32 `[num_positions, head_dim / 2]`
    pub cos: Tensor,
    /// f32 `[num_positions, head_dim / 2]`
    pub sin: Tensor,
    /// i32 `[tokens]`, each in `0 .. num_positions`
    pub positions: Tensor,
}

impl RopeAngles {
    fn borrow(&self) -> Angles<'_> {
        Angles { cos: &self.cos, sin: &self.sin, positions: &self.positions }
    }
}

/// Rotates `q` `[tokens, num_heads, head_dim]` and `k` `[tokens, num_kv_heads, head_dim]`, in place where nothing else holds
/// them. Keeps only the angles.
///
/// # Errors
/// As [`core::apply`]; an input of another tape.
pub fn rope(tape: &Tape, q: Var, k: Var, angles: &RopeAngles, layout: Layout) -> Result<(Var, Var)> {
    let link = tape.link("rope", &[&q, &k], &[])?;
    let (to_q, to_k) = (q.source(), k.source());
    let rotated = core::apply(q.into_tensor(), k.into_tensor(), angles.borrow(), layout, Direction::Forward)?;
    let (shape_q, shape_k, angles) = (*rotated.0.shape(), *rotated.1.shape(), angles.clone());
    Ok(link.two(rotated, move |context, dq, dk| {
        let (dq, dk) = match (dq, dk) {
            (Some(dq), Some(dk)) => (dq, dk),
            (Some(dq), None) => {
                let dk = dq.device().zeros(shape_k, dq.dtype(), Category::Activations)?;
                (dq, dk)
            }
            (None, Some(dk)) => (dk.device().zeros(shape_q, dk.dtype(), Category::Activations)?, dk),
            (None, None) => return Ok(()),
        };
        let (dq, dk) = core::apply(dq, dk, angles.borrow(), layout, Direction::Inverse)?;
        context.send(to_q, dq)?;
        context.send(to_k, dk)
    }))
}
