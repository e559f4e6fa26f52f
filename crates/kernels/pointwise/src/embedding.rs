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

/// Bits of a row number that one pass sorts by.
const DIGIT_BITS: usize = 3;
const DIGITS: usize = 1 << DIGIT_BITS;
/// Neighbouring units whose counts are added up first, so that none has to go over all before it.
const NEIGHBOURS: usize = 32;

/// Buffers of [`sort`].
#[derive(Clone, Copy, Debug)]
pub struct Sort<'a> {
    /// i32 `[tokens]`
    pub ids: &'a Handle,
    /// u32 `[tokens]` each, overwritten.
    pub orders: [&'a Handle; 2],
}

/// Launches a stable sort of the tokens by id; ids outside the table come last. Gives which of the two `orders` holds the
/// token numbers in that order. `shape.hidden_size` is of no consequence.
///
/// # Errors
/// As [`forward`].
pub fn sort<R: Runtime>(client: &ComputeClient<R>, shape: Shape, args: Sort<'_>) -> Result<usize, LaunchError> {
    let launch = Launch::new(client, "embedding_sort");
    let Shape { tokens, vocab_size, .. } = shape;
    if tokens == 0 {
        return Ok(0);
    }
    let units = launch.units_alone(tokens, (DIGITS + 2) * size_of::<u32>());
    let dim = CubeDim::new_1d(units as u32);
    launch.cube(dim, (DIGITS * units + units + units.div_ceil(NEIGHBOURS)) * size_of::<u32>())?;
    // Row numbers go up to the size of the table, which stands for all ids outside of it.
    let bits = (usize::BITS - vocab_size.leading_zeros()) as usize;
    let passes = bits.div_ceil(DIGIT_BITS).max(1);
    for pass in 0..passes {
        unchecked!(sort_kernel::launch_unchecked::<R>(
            client,
            launch.cubes(1, 1, 1)?,
            dim,
            launch.array::<i32>("ids", args.ids, tokens)?,
            // The first pass starts from the tokens as they are and does not read this argument.
            launch.array::<u32>("orders", args.orders[(pass + 1) % 2], tokens)?,
            launch.array::<u32>("orders", args.orders[pass % 2], tokens)?,
            tokens as u32,
            vocab_size as u32,
            (pass * DIGIT_BITS) as u32,
            units,
        ));
    }
    Ok((passes - 1) % 2)
}

/// One pass: a stable sort by one digit. Grid: one cube, each unit with a range of the tokens.
#[cube(launch_unchecked)]
fn sort_kernel(
    ids: &Array<i32>,
    from: &Array<u32>,
    to: &mut Array<u32>,
    tokens: u32,
    vocab_size: u32,
    shift: u32,
    #[comptime] units: usize,
) {
    let unit = UNIT_POS as usize;
    let share = (tokens as usize).div_ceil(units);
    let start = min(unit * share, tokens as usize);
    let end = min(start + share, tokens as usize);
    // By digit, then by unit: where the next token of this digit and unit goes.
    let mut places = SharedMemory::<u32>::new(comptime!(DIGITS * units));
    let mut sums = SharedMemory::<u32>::new(units);
    let mut of_neighbours = SharedMemory::<u32>::new(comptime!(units.div_ceil(NEIGHBOURS)));
    for digit in 0..DIGITS {
        places[digit * units + unit] = 0u32;
    }
    for i in start..end {
        let token = token_at(from, i, shift);
        let at = digit_of(ids[token as usize], vocab_size, shift) * units + unit;
        places[at] += 1u32;
    }
    sync_cube();
    // Counts to sums of the counts before: within this unit's piece, then over the pieces before it.
    let mut sum = 0u32;
    for i in unit * DIGITS..(unit + 1) * DIGITS {
        sum += places[i];
    }
    sums[unit] = sum;
    sync_cube();
    if unit < comptime!(units.div_ceil(NEIGHBOURS)) {
        let mut sum = 0u32;
        for i in unit * NEIGHBOURS..min((unit + 1) * NEIGHBOURS, units.runtime()) {
            sum += sums[i];
        }
        of_neighbours[unit] = sum;
    }
    sync_cube();
    let mut place = 0u32;
    for before in 0..unit / NEIGHBOURS {
        place += of_neighbours[before];
    }
    for before in unit / NEIGHBOURS * NEIGHBOURS..unit {
        place += sums[before];
    }
    for i in unit * DIGITS..(unit + 1) * DIGITS {
        let count = places[i];
        places[i] = place;
        place += count;
    }
    sync_cube();
    for i in start..end {
        let token = token_at(from, i, shift);
        let at = digit_of(ids[token as usize], vocab_size, shift) * units + unit;
        let place = places[at];
        to[place as usize] = token;
        places[at] = place + 1u32;
    }
}

#[cube]
fn token_at(order: &Array<u32>, i: usize, shift: u32) -> u32 {
    let mut token = i as u32;
    if shift > 0u32 {
        token = order[i];
    }
    token
}

#[cube]
fn digit_of(id: i32, vocab_size: u32, shift: u32) -> usize {
    ((row_of(id, vocab_size) >> shift) & comptime!(DIGITS as u32 - 1)) as usize
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
        let row = row_of(ids[order[place] as usize], vocab_size);
        let mut is_first = row < vocab_size;
        if place > 0 {
            is_first = is_first && row_of(ids[order[place - 1] as usize], vocab_size) != row;
        }
        if is_first {
            let mut end = place;
            let mut more = true;
            while more {
                end += 1;
                more = false;
                if end < tokens {
                    more = row_of(ids[order[end] as usize], vocab_size) == row;
                }
            }
            let mut column = UNIT_POS as usize;
            while column < cols {
                let at = row as usize * cols + column;
                let mut sum = dweight[at];
                for i in place..end {
                    sum += Vector::<f32, N>::cast_from(dout[order[i] as usize * cols + column]);
                }
                dweight[at] = sum;
                column += units;
            }
        }
    }
}
