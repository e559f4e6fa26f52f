//! Rotary position embedding of queries and keys in one call.                  Su et al. 2021, arXiv:2104.09864
//!
//! For each pair of channels `(a, b)` with angle row `p = positions[t]` and pair index `i`:
//! - `a' = a * cos[p, i] - b * sin[p, i]`, `b' = b * cos[p, i] + a * sin[p, i]`
//! - the gradient is the inverse rotation: the same with `-sin`
//!
//! [`Layout::Half`] pairs channel `i` with `i + head_dim / 2` (Hugging Face Llama); [`Layout::Interleaved`] pairs `2i` with
//! `2i + 1` (the original paper, GPT-J). Tables come from [`super::rope_table`].

use super::{
    check,
    cost::{Cost, stored},
};
use crate::{DType, Result, Tensor};

/// Which channels form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `(i, i + head_dim / 2)`
    Half,
    /// `(2i, 2i + 1)`
    Interleaved,
}

/// Sense of the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The embedding.
    Forward,
    /// Its gradient.
    Inverse,
}

/// What defines one rotation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Number of tokens.
    pub tokens: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key heads.
    pub num_kv_heads: usize,
    /// Channels of a head; even.
    pub head_dim: usize,
    /// Rows of the tables.
    pub num_positions: usize,
    /// Pairing of channels.
    pub layout: Layout,
    /// Forward or gradient.
    pub direction: Direction,
    /// Storage type of `q` and `k`. The rotation is computed in f32.
    pub dtype: DType,
}

impl Spec {
    /// `q`, `k`, positions and one row of both tables per token in, rotated `q` and `k` out.
    pub fn cost(&self) -> Cost {
        let heads = (self.num_heads + self.num_kv_heads) * self.head_dim;
        let row = stored(1, DType::I32) + stored(self.head_dim, DType::F32);
        let rotated = stored(self.tokens * heads, self.dtype);
        Cost::read(rotated + self.tokens * row) + Cost::written(rotated)
    }
}

/// Angles of a rotation.
#[derive(Clone, Copy, Debug)]
pub struct Angles<'a> {
    /// f32 `[num_positions, head_dim / 2]`
    pub cos: &'a Tensor,
    /// f32 `[num_positions, head_dim / 2]`
    pub sin: &'a Tensor,
    /// i32 `[tokens]`, each in `0 .. num_positions`
    pub positions: &'a Tensor,
}

/// RoPE of a backend.
pub trait Rope {
    /// Rotates `q` and `k`, in place where their buffers are unique. No device reads outside the tables: where the host cannot
    /// see the positions, the heads of a token whose position is outside become NaN, so that the mistake shows.
    ///
    /// # Errors
    /// [`crate::Error::InvalidSpec`] for a position outside the table, on devices whose host can see the positions.
    fn rope(&self, spec: &Spec, q: Tensor, k: Tensor, angles: Angles<'_>) -> Result<(Tensor, Tensor)>;
}

/// Rotates `q` `[tokens, num_heads, head_dim]` and `k` `[tokens, num_kv_heads, head_dim]`.
///
/// # Errors
/// Shape, dtype or device mismatch; odd `head_dim`; a position outside the tables (see [`Rope::rope`]).
pub fn apply(
    q: Tensor,
    k: Tensor,
    angles: Angles<'_>,
    layout: Layout,
    direction: Direction,
) -> Result<(Tensor, Tensor)> {
    check::float("rope", "q", q.dtype())?;
    check::rank("rope", "q", &q, 3, "[tokens, num_heads, head_dim]")?;
    check::rank("rope", "k", &k, 3, "[tokens, num_kv_heads, head_dim]")?;
    let (tokens, num_heads, head_dim) = (q.shape()[0], q.shape()[1], q.shape()[2]);
    let num_kv_heads = k.shape()[1];
    let device = q.device().clone();
    check::tensor("rope", "k", &k, (&[tokens, num_kv_heads, head_dim], q.dtype(), &device))?;
    if !head_dim.is_multiple_of(2) {
        return check::invalid("rope", "head_dim", head_dim, "even");
    }
    check::rank("rope", "cos", angles.cos, 2, "[num_positions, head_dim / 2]")?;
    let num_positions = angles.cos.shape()[0];
    let table = (&[num_positions, head_dim / 2][..], DType::F32, &device);
    check::tensor("rope", "cos", angles.cos, table)?;
    check::tensor("rope", "sin", angles.sin, table)?;
    check::tensor("rope", "positions", angles.positions, (&[tokens], DType::I32, &device))?;
    let spec = Spec { tokens, num_heads, num_kv_heads, head_dim, num_positions, layout, direction, dtype: q.dtype() };
    device.backend().rope(&spec, q, k, angles)
}
