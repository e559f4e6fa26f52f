//! Rotary position embedding of queries and keys in one launch, in place.      Su et al. 2021, arXiv:2104.09864
//!
//! For each pair of channels `(a, b)` with angle row `p = positions[token]` and pair index `i`:
//! `a' = a * cos[p, i] - b * sin[p, i]`, `b' = b * cos[p, i] + a * sin[p, i]`; the gradient is the same with `-sin`.
//!
//! Work: one unit per pair (or per vector of pairs), over the pairs of `q`, then those of `k`. Traffic: `q` and `k` once in and
//! once out; the tables' rows are shared by all heads of a token and come from cache.
//! Numerics: the rotation is computed in f32 for every element type and rounded once.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

/// Which channels of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pairs {
    /// `(i, i + head_dim / 2)`: Hugging Face Llama.
    Half,
    /// `(2i, 2i + 1)`: the original paper, GPT-J.
    Interleaved,
}

/// Sizes and kind of one rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
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
    pub pairs: Pairs,
    /// Rotates backwards: the gradient.
    pub inverse: bool,
}

/// Buffers of one rotation.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, num_heads, head_dim]` of `E`, rotated in place.
    pub q: &'a Handle,
    /// `[tokens, num_kv_heads, head_dim]` of `E`, rotated in place; another buffer than `q`.
    pub k: &'a Handle,
    /// f32 `[num_positions, head_dim / 2]`.
    pub cos: &'a Handle,
    /// f32 `[num_positions, head_dim / 2]`.
    pub sin: &'a Handle,
    /// i32 `[tokens]`. The heads of a token whose position is not in `0 .. num_positions` become NaN; nothing is read outside
    /// the tables.
    pub positions: &'a Handle,
}

/// Launches the rotation of `q` and `k`.
///
/// # Errors
/// [`LaunchError`] for an odd `head_dim`, an element type that the device lacks, a buffer that is too small, or a limit
/// exceeded.
pub fn apply<R: Runtime, E: Float>(client: &ComputeClient<R>, shape: Shape, args: Args<'_>) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "rope");
    launch.element::<E>()?;
    launch.element::<i32>()?;
    let Shape { tokens, num_heads, num_kv_heads, head_dim, num_positions, .. } = shape;
    if !head_dim.is_multiple_of(2) {
        let (value, rule) = (head_dim as u64, "even");
        return Err(LaunchError::Invalid { kernel: "rope", field: "head_dim", value, rule });
    }
    let (q_len, k_len) = (tokens * num_heads * head_dim, tokens * num_kv_heads * head_dim);
    if q_len + k_len == 0 {
        return Ok(());
    }
    // A pair of neighbours lies within one vector: only halves are loaded as vectors.
    let width = match shape.pairs {
        Pairs::Half => launch.vector_width::<E>(head_dim / 2),
        Pairs::Interleaved => 1,
    };
    let table_len = num_positions * (head_dim / 2);
    let grid = launch.flat((q_len + k_len) / (2 * width));
    launch.cube(grid.dim, 0)?;
    unchecked!(rotate_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("q", args.q, q_len, width)?,
        launch.vectors::<E>("k", args.k, k_len, width)?,
        launch.vectors::<f32>("cos", args.cos, table_len, width)?,
        launch.vectors::<f32>("sin", args.sin, table_len, width)?,
        launch.array::<i32>("positions", args.positions, tokens)?,
        (tokens * num_heads) as u32,
        (tokens * num_kv_heads) as u32,
        num_heads as u32,
        num_kv_heads as u32,
        (head_dim / 2 / width) as u32,
        num_positions as u32,
        if shape.inverse { -1.0 } else { 1.0 },
        f32::NAN,
        shape.pairs == Pairs::Interleaved,
    ));
    Ok(())
}

/// Where the two members of a pair (or vectors of them) lie.
#[cube]
fn members(head: usize, pair: usize, pairs: usize, #[comptime] interleaved: bool) -> (usize, usize) {
    let first = head * pairs * 2;
    if comptime!(interleaved) { (first + pair * 2, first + pair * 2 + 1) } else { (first + pair, first + pair + pairs) }
}

/// What tells where a table is read and how the rotation goes.
#[derive(CubeType)]
struct Angle {
    position: i32,
    num_positions: i32,
    sign: f32,
    nan: f32,
}

/// Rotates pair `pair` of head `head`, by the angles of the token's position.
#[cube]
fn rotate<E: Float, N: Size>(
    x: &mut Array<Vector<E, N>>,
    cos: &Array<Vector<f32, N>>,
    sin: &Array<Vector<f32, N>>,
    angle: &Angle,
    head: usize,
    pair: usize,
    pairs: usize,
    #[comptime] interleaved: bool,
) {
    let (at_a, at_b) = members(head, pair, pairs, interleaved);
    if angle.position >= 0 && angle.position < angle.num_positions {
        let at = angle.position as usize * pairs + pair;
        let (c, s) = (cos[at], sin[at] * Vector::new(angle.sign));
        let (a, b) = (Vector::<f32, N>::cast_from(x[at_a]), Vector::<f32, N>::cast_from(x[at_b]));
        x[at_a] = Vector::cast_from(a * c - b * s);
        x[at_b] = Vector::cast_from(b * c + a * s);
    } else {
        x[at_a] = Vector::cast_from(Vector::<f32, N>::new(angle.nan));
        x[at_b] = Vector::cast_from(Vector::<f32, N>::new(angle.nan));
    }
}

/// Grid: unit = pair, walking on by the size of the grid. Each unit overwrites only what it alone reads.
#[cube(launch_unchecked)]
fn rotate_kernel<E: Float, N: Size>(
    q: &mut Array<Vector<E, N>>,
    k: &mut Array<Vector<E, N>>,
    cos: &Array<Vector<f32, N>>,
    sin: &Array<Vector<f32, N>>,
    positions: &Array<i32>,
    q_heads: u32,
    k_heads: u32,
    num_heads: u32,
    num_kv_heads: u32,
    pairs: u32,
    num_positions: u32,
    sign: f32,
    // Shading languages have no literal for it.
    nan: f32,
    #[comptime] interleaved: bool,
) {
    let (q_heads, pairs) = (q_heads as usize, pairs as usize);
    let items = (q_heads + k_heads as usize) * pairs;
    let mut item = ABSOLUTE_POS;
    while item < items {
        let (head, pair) = (item / pairs, item % pairs);
        if head < q_heads {
            let position = positions[head / num_heads as usize];
            let angle = Angle { position, num_positions: num_positions as i32, sign, nan };
            rotate::<E, N>(q, cos, sin, &angle, head, pair, pairs, interleaved);
        } else {
            let head = head - q_heads;
            let position = positions[head / num_kv_heads as usize];
            let angle = Angle { position, num_positions: num_positions as i32, sign, nan };
            rotate::<E, N>(k, cos, sin, &angle, head, pair, pairs, interleaved);
        }
        item += CUBE_COUNT * CUBE_DIM as usize;
    }
}
