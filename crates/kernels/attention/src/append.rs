//! Copies new rows to a cache of keys or values.
//!
//! Work: units stride over the elements. Traffic: each row once in, once out.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

/// Sizes of one append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendShape {
    /// Packed sequences.
    pub num_seqs: usize,
    /// New tokens over all sequences.
    pub tokens: usize,
    /// New tokens of the longest sequence.
    pub max_seqlen: usize,
    /// Rows of the cache per sequence.
    pub capacity: usize,
    /// Elements of a row: `num_kv_heads * head_dim`.
    pub row: usize,
}

/// Buffers of one append.
#[derive(Clone, Copy, Debug)]
pub struct Append<'a> {
    /// `[tokens, row]` of `E`.
    pub rows: &'a Handle,
    /// i32 `[num_seqs + 1]`, from 0 to `tokens`, not decreasing.
    pub cu_seqlens: &'a Handle,
    /// i32 `[num_seqs]`: the row of the cache that takes the first new row of each sequence.
    pub start: &'a Handle,
    /// `[num_seqs, capacity, row]` of `E`; elements that no new row covers keep their bits.
    pub cache: &'a Handle,
}

/// Launches `cache[s, start[s] ..] = rows[cu_seqlens[s] .. cu_seqlens[s + 1]]`.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn append<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    shape: AppendShape,
    args: Append<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "kv_append");
    launch.element::<E>()?;
    let AppendShape { num_seqs, tokens, max_seqlen, capacity, row } = shape;
    if tokens * row == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<E>(row);
    let units = launch.units_for(max_seqlen * row / width);
    let dim = CubeDim::new_1d(units as u32);
    launch.cube(dim, 0)?;
    unchecked!(append_kernel::launch_unchecked::<E, R>(
        client,
        launch.cubes((max_seqlen * row / width).div_ceil(units), num_seqs, 1)?,
        dim,
        width,
        launch.vectors::<E>("rows", args.rows, tokens * row, width)?,
        launch.array::<i32>("cu_seqlens", args.cu_seqlens, num_seqs + 1)?,
        launch.array::<i32>("start", args.start, num_seqs)?,
        launch.vectors::<E>("cache", args.cache, num_seqs * capacity * row, width)?,
        capacity as u32,
        (row / width) as u32,
    ));
    Ok(())
}

/// Grid: unit in x = vector of the new rows of a sequence, y = sequence.
#[cube(launch_unchecked)]
fn append_kernel<E: Float, N: Size>(
    rows: &Array<Vector<E, N>>,
    cu_seqlens: &Array<i32>,
    starts: &Array<i32>,
    cache: &mut Array<Vector<E, N>>,
    capacity: u32,
    row: u32,
) {
    let (i, seq) = (ABSOLUTE_POS_X as usize, CUBE_POS_Y as usize);
    let row = row as usize;
    let first = cu_seqlens[seq] as usize;
    let to = (seq * capacity as usize + starts[seq] as usize) * row;
    if i < (cu_seqlens[seq + 1] as usize - first) * row {
        cache[to + i] = rows[first * row + i];
    }
}
