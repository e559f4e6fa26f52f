//! Rows of a table picked by token id, and the table's gradient.
//! - `out[t] = weight[ids[t]]`
//! - `dweight[ids[t]] += dout[t]`, in the order of `t`
//!
//! Work: forward, units stride over the vectors of `out`. Backward, [`sort`] orders the tokens by id, then [`backward`] gives each id
//! to one cube, which adds its tokens in order: no atomics, the same bits on every run.
//! Traffic: forward reads and writes each row once; backward reads `dout` once and each row of the table that occurs once, and writes it.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

/// Sizes of one lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of ids.
    pub tokens: usize,
    /// Rows of the table.
    pub vocab_size: usize,
    /// Columns of the table.
    pub hidden_size: usize,
}

/// Buffers of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[vocab_size, hidden_size]` of `W`.
    pub weight: &'a Handle,
    /// i32 `[tokens]`
    pub ids: &'a Handle,
    /// `[tokens, hidden_size]` of `E`, overwritten; zeros for an id outside the table.
    pub out: &'a Handle,
}

/// Launches `out[t] = weight[ids[t]]`.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn forward<R: Runtime, W: Float, E: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "embedding_forward");
    launch.element::<W>()?;
    launch.element::<E>()?;
    let Shape { tokens, vocab_size, hidden_size } = shape;
    if tokens == 0 || hidden_size == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<E>(hidden_size);
    let grid = launch.flat(tokens * hidden_size / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(forward_kernel::launch_unchecked::<W, E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<W>("weight", args.weight, vocab_size * hidden_size, width)?,
        launch.array::<i32>("ids", args.ids, tokens)?,
        launch.vectors::<E>("out", args.out, tokens * hidden_size, width)?,
        (tokens * hidden_size / width) as u32,
        (hidden_size / width) as u32,
        vocab_size as u32,
    ));
    Ok(())
}

/// Grid: unit = vector of `out`, walking on by the number of units.
#[cube(launch_unchecked)]
fn forward_kernel<W: Float, E: Float, N: Size>(
    weight: &Array<Vector<W, N>>,
    ids: &Array<i32>,
    out: &mut Array<Vector<E, N>>,
    items: u32,
    cols: u32,
    vocab_size: u32,
) {
    let cols = cols as usize;
    let step = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        let row = row_of(ids[i / cols], vocab_size);
        let mut value = Vector::<f32, N>::new(0.0);
        if row < vocab_size {
            value = Vector::<f32, N>::cast_from(weight[row as usize * cols + i % cols]);
        }
        out[i] = Vector::cast_from(value);
        i += step;
    }
}

/// The row of an id; `vocab_size` for one outside the table: a negative id is large without its sign.
#[cube]
fn row_of(id: i32, vocab_size: u32) -> u32 {
    min(u32::reinterpret(id), vocab_size)
}

/// Tokens whose places one cube finds.
const TOKENS: usize = 32;
/// Vectors of ids that are read together, so that their loads are under way together.
const TOGETHER: usize = 4;

/// Buffers of [`sort`].
#[derive(Clone, Copy, Debug)]
pub struct Sort<'a> {
    /// i32 `[tokens]`
    pub ids: &'a Handle,
    /// u32 `[tokens]`, overwritten: token numbers by id, those of one id in their order.
    pub order: &'a Handle,
}

/// Launches a stable sort of the tokens by id; ids outside the table come last. Of `shape`, only `tokens` is of consequence.
///
/// A token's place is the number of tokens that come before it: `tokens^2` comparisons, in one launch that fills a device.
///
/// # Errors
/// As [`forward`].
pub fn sort<R: Runtime>(client: &ComputeClient<R>, shape: Shape, args: Sort<'_>) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "embedding_sort");
    let Shape { tokens, .. } = shape;
    if tokens == 0 {
        return Ok(());
    }
    let units = launch.units_for(8 * TOKENS);
    let grid = launch.rows_of(tokens.div_ceil(TOKENS.min(units)), units);
    launch.cube(grid.dim, units * size_of::<u32>())?;
    let width = launch.vector_width::<u32>(tokens);
    unchecked!(sort_kernel::launch_unchecked::<R>(
        client,
        grid.count,
        grid.dim,
        width,
        // Without its sign an id that is negative comes behind all others.
        launch.array::<u32>("ids", args.ids, tokens)?,
        launch.vectors::<u32>("ids", args.ids, tokens, width)?,
        launch.array::<u32>("order", args.order, tokens)?,
        tokens as u32,
        units,
    ));
    Ok(())
}

/// Grid: cube = tokens `CUBE_POS * TOKENS..`. Unit = one of them, and a part of all tokens to compare it with.
#[cube(launch_unchecked)]
fn sort_kernel<N: Size>(
    ids: &Array<u32>,
    vectors: &Array<Vector<u32, N>>,
    order: &mut Array<u32>,
    tokens: u32,
    #[comptime] units: usize,
) {
    let (unit, tokens, width) = (UNIT_POS as usize, tokens as usize, N::value());
    let of_cube = comptime!(TOKENS.min(units));
    let parts = comptime!(units / of_cube);
    let token = CUBE_POS * of_cube + unit % of_cube;
    // A unit behind the last token counts for that one, and writes nothing.
    let id = ids[min(token, tokens - 1)];
    let share = (tokens / width).div_ceil(parts);
    let start = min(unit / of_cube * share, tokens / width);
    let end = min(start + share, tokens / width);
    // Tokens before those of this cube, its own, and those behind them.
    let own_start = clamp(CUBE_POS * of_cube / width, start, end);
    let own_end = clamp((CUBE_POS + 1) * of_cube / width, start, end);
    let mut before = count_below::<N>(vectors, start, own_start, id, true);
    for other in own_start * width..own_end * width {
        let of_other = ids[other];
        before += u32::cast_from(of_other < id || (of_other == id && other < token));
    }
    before += count_below::<N>(vectors, own_end, end, id, false);
    let mut counts = SharedMemory::<u32>::new(units);
    counts[unit] = before;
    sync_cube();
    if unit < of_cube && token < tokens {
        let mut place = 0u32;
        #[unroll]
        for part in 0..parts {
            place += counts[part * of_cube + unit];
        }
        order[place as usize] = token as u32;
    }
}

/// How many of the ids in vectors `start..end` are less than `id`, or equal.
#[cube]
fn count_below<N: Size>(
    ids: &Array<Vector<u32, N>>,
    start: usize,
    end: usize,
    id: u32,
    #[comptime] or_equal: bool,
) -> u32 {
    let mut count = 0u32;
    let chunks = (end - start) / TOGETHER;
    for chunk in 0..chunks {
        #[unroll]
        for i in 0..TOGETHER {
            count += count_in::<N>(ids[start + chunk * TOGETHER + i], id, or_equal);
        }
    }
    for i in start + chunks * TOGETHER..end {
        count += count_in::<N>(ids[i], id, or_equal);
    }
    count
}

#[cube]
fn count_in<N: Size>(ids: Vector<u32, N>, id: u32, #[comptime] or_equal: bool) -> u32 {
    let mut count = 0u32;
    #[unroll]
    for i in 0..ids.size() {
        count += u32::cast_from(if comptime!(or_equal) { ids[i] <= id } else { ids[i] < id });
    }
    count
}

/// Buffers of the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// i32 `[tokens]`
    pub ids: &'a Handle,
    /// u32 `[tokens]`: token numbers by id, as [`sort`] orders them.
    pub order: &'a Handle,
    /// `[tokens, hidden_size]` of `E`.
    pub dout: &'a Handle,
    /// f32 `[vocab_size, hidden_size]`, added to; ids outside the table add nothing.
    pub dweight: &'a Handle,
}

/// Launches `dweight[ids[t]] += dout[t]`.
///
/// # Errors
/// As [`forward`].
pub fn backward<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Backward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "embedding_backward");
    launch.element::<E>()?;
    let Shape { tokens, vocab_size, hidden_size } = shape;
    if tokens == 0 || hidden_size == 0 || vocab_size == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(hidden_size);
    let grid = launch.rows(tokens, hidden_size / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(backward_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.array::<i32>("ids", args.ids, tokens)?,
        launch.array::<u32>("order", args.order, tokens)?,
        launch.vectors::<E>("dout", args.dout, tokens * hidden_size, width)?,
        launch.vectors::<f32>("dweight", args.dweight, vocab_size * hidden_size, width)?,
        tokens as u32,
        (hidden_size / width) as u32,
        vocab_size as u32,
        grid.units,
    ));
    Ok(())
}

/// Grid: cube = place in the order; the cube of an id's first place adds all of its tokens, units stride over the columns.
#[cube(launch_unchecked)]
fn backward_kernel<E: Float, N: Size>(
    ids: &Array<i32>,
    order: &Array<u32>,
    dout: &Array<Vector<E, N>>,
    dweight: &mut Array<Vector<f32, N>>,
    tokens: u32,
    cols: u32,
    vocab_size: u32,
    #[comptime] units: usize,
) {
    let (tokens, cols, place) = (tokens as usize, cols as usize, CUBE_POS);
    if place < tokens {
        // Neighbours in the order with it, so that the loads are under way together.
        let (token, last) = (order[place] as usize, tokens - 1);
        let before = order[max(place, 1) - 1] as usize;
        let after = order[min(place + 1, last)] as usize;
        let row = row_of(ids[token], vocab_size);
        let (row_before, row_after) = (row_of(ids[before], vocab_size), row_of(ids[after], vocab_size));
        if row < vocab_size && (place == 0 || row_before != row) {
            let mut end = place + 1;
            let mut more = place < last && row_after == row;
            while more {
                end += 1;
                more = false;
                if end < tokens {
                    more = row_of(ids[order[end] as usize], vocab_size) == row;
                }
            }
            let mut column = UNIT_POS as usize;
            while column < cols {
                // Two columns at a time. Where there is no second one, the first is summed twice.
                let second = select(column + units < cols, column + units, column);
                let mut sum = dweight[row as usize * cols + column];
                let mut sum_of_second = dweight[row as usize * cols + second];
                sum += Vector::<f32, N>::cast_from(dout[token * cols + column]);
                sum_of_second += Vector::<f32, N>::cast_from(dout[token * cols + second]);
                for i in place + 1..end {
                    let from = order[i] as usize * cols;
                    sum += Vector::<f32, N>::cast_from(dout[from + column]);
                    sum_of_second += Vector::<f32, N>::cast_from(dout[from + second]);
                }
                dweight[row as usize * cols + column] = sum;
                dweight[row as usize * cols + second] = sum_of_second;
                column += 2 * units;
            }
        }
    }
}
