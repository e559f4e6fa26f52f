//! Zeros at random, drawn by counter where they are needed and never kept.            Srivastava et al. 2014, JMLR 15:1929
//!
//! Element `channel` of a row is dropped where the upper 24 bits of a random word are below `probability * 2^24`: word
//! `channel % 4` of Philox under `key`, with the counter (step, sequence, position, `channel / 4`). What is kept is not scaled.
//!
//! Work: one unit per four channels, which share a counter. Traffic: each element once in, once out.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, philox, unchecked};

/// Which elements of a layer are dropped, but for what differs by row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Share of zeros, in `[0, 1)`.
    pub probability: f32,
    /// Key of the layer's random numbers in this run.
    pub key: [u32; 2],
    /// Optimiser step.
    pub step: u32,
}

impl Dropout {
    /// What keeps the mean: `1 / (1 - probability)`.
    pub fn kept_scale(&self) -> f32 {
        (1.0 / (1.0 - f64::from(self.probability))) as f32
    }

    /// A word's upper 24 bits below this drop its element: comparing them as integers compares the same real numbers.
    fn threshold(&self) -> u32 {
        (f64::from(self.probability) * 16_777_216.0).ceil() as u32
    }
}

/// Dropout, and where each row stands in the step.
#[derive(Clone, Copy, Debug)]
pub struct RowDropout<'a> {
    /// What all rows have in common.
    pub dropout: Dropout,
    /// i32 `[rows]`: number of the row's sequence among all of the step.
    pub sequences: &'a Handle,
    /// i32 `[rows]`: place of the row in its sequence.
    pub positions: &'a Handle,
}

/// Buffers of a call.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[rows, cols]` of `E`; `None` if it stands in `out`.
    pub x: Option<&'a Handle>,
    /// `[rows, cols]` of `E`, overwritten.
    pub out: &'a Handle,
    /// What is dropped.
    pub rows: RowDropout<'a>,
}

/// Channels of one counter.
const WORDS: usize = 4;

/// Launches `out = x` with zeros for what is dropped, for `x` of `[rows, cols]`.
///
/// # Errors
/// [`LaunchError`] for a probability out of its range, an element type that the device lacks, a buffer that is too small, or a
/// limit exceeded.
pub fn zero<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    (rows, cols): (usize, usize),
    args: Args<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "dropout");
    launch.element::<E>()?;
    let RowDropout { dropout, sequences, positions } = args.rows;
    if !(0.0..1.0).contains(&dropout.probability) {
        let (value, rule) = (dropout.threshold().into(), "below 2^24, as a probability below 1 is in units of 2^-24");
        return Err(LaunchError::Invalid { kernel: launch.kernel(), field: "probability", value, rule });
    }
    let len = rows * cols;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(cols).min(WORDS);
    let groups = cols.div_ceil(WORDS);
    let grid = launch.flat(rows * groups);
    launch.cube(grid.dim, 0)?;
    unchecked!(zero_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        args.x.map(|x| launch.vectors::<E>("x", x, len, width)).transpose()?.into(),
        launch.vectors::<E>("out", args.out, len, width)?,
        launch.array::<i32>("sequences", sequences, rows)?,
        launch.array::<i32>("positions", positions, rows)?,
        dropout.key[0],
        dropout.key[1],
        dropout.step,
        dropout.threshold(),
        (rows * groups) as u32,
        (cols / width) as u32,
    ));
    Ok(())
}

/// Grid: unit = group of four channels of a row, walking on by the number of units.
#[cube(launch_unchecked)]
fn zero_kernel<E: Float, N: Size>(
    x: &ComptimeOption<Array<Vector<E, N>>>,
    out: &mut Array<Vector<E, N>>,
    sequences: &Array<i32>,
    positions: &Array<i32>,
    key0: u32,
    key1: u32,
    step: u32,
    threshold: u32,
    items: u32,
    cols: u32,
) {
    let width = N::value();
    let cols = cols as usize;
    let groups = (cols * width).div_ceil(WORDS);
    let mut item = ABSOLUTE_POS;
    while item < items as usize {
        let (row, group) = (item / groups, item % groups);
        let (sequence, position) = (u32::reinterpret(sequences[row]), u32::reinterpret(positions[row]));
        let words = philox((step, sequence, position, group as u32), (key0, key1));
        let mut draws = Array::<u32>::new(WORDS);
        draws[0] = words.0 >> 8u32;
        draws[1] = words.1 >> 8u32;
        draws[2] = words.2 >> 8u32;
        draws[3] = words.3 >> 8u32;
        #[unroll]
        for vector in 0..comptime!(WORDS / width) {
            let col = group * comptime!(WORDS / width) + vector;
            if col < cols {
                let at = row * cols + col;
                #[comptime]
                let mut values = match x {
                    ComptimeOption::Some(x) => x[at],
                    ComptimeOption::None => out[at],
                };
                #[unroll]
                for component in 0..width {
                    let dropped = draws[comptime!(vector * width + component)] < threshold;
                    values[component] = select(dropped, E::new(0.0), values[component]);
                }
                out[at] = values;
            }
        }
        item += CUBE_COUNT * CUBE_DIM as usize;
    }
}
