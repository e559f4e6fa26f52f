//! Gradients of weight and bias of rows that are too long for [`crate::backward`] to sum them by the way.
//!
//! Traffic: each matrix is read once more than by the pass that gives the gradient of the input. Sums are f32, of fixed order over blocks of rows,
//! no float atomics: the same bits on every run.

use cubecl::prelude::*;
use unsloth_common::{Launch, LaunchError, unchecked};

use crate::{
    backward::{Backward, Sums},
    rows::{RSTD, Shape, mean_of},
};

/// Place of the weight's sums, before those of the bias.
const WEIGHT: usize = 0;
/// Rows that a unit reads before it adds them, so that it waits for memory less often.
const ROWS_AT_ONCE: usize = 4;

/// Adds to the gradients of parameters that are wanted, if any. To be launched before `dout` is overwritten.
pub(crate) fn parameter_gradients<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    args: &Backward<'_>,
) -> Result<(), LaunchError> {
    let sums = args.sums();
    if !sums.weight && !sums.bias {
        return Ok(());
    }
    let Shape { rows, hidden_size, .. } = shape;
    let (len, width) = (rows * hidden_size, launch.vector_width::<E>(hidden_size));
    let grid = launch.columns(rows, hidden_size, width)?;
    unchecked!(partial_kernel::launch_unchecked::<E, R>(
        launch.client(),
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("dout", args.dout, len, width)?,
        launch.vectors::<E>("sum", args.sum, len, width)?,
        args.statistics.arrays(launch, rows)?,
        args.partial(launch, (grid.parts, hidden_size), width)?.into_iter().collect(),
        rows as u32,
        (hidden_size / width) as u32,
        grid.part_rows,
        args.statistics.mean.is_some(),
        sums,
    ));
    args.fold(launch, (grid.parts, hidden_size))
}

/// Grid: x = block of columns, y = block of rows; unit = vector of columns. The weight's sums come first.
#[cube(launch_unchecked)]
fn partial_kernel<E: Float, N: Size>(
    dout: &Array<Vector<E, N>>,
    sum: &Array<Vector<E, N>>,
    statistics: &Sequence<Array<f32>>,
    partial: &mut Sequence<Array<Vector<f32, N>>>,
    rows: u32,
    cols: u32,
    part_rows: u32,
    #[comptime] centred: bool,
    #[comptime] sums: Sums,
) {
    let column = ABSOLUTE_POS_X as usize;
    let (rows, cols, part_rows) = (rows as usize, cols as usize, part_rows as usize);
    let part = CUBE_POS_Y as usize;
    if column < cols {
        let mut of_weight = Vector::<f32, N>::new(0.0);
        let mut of_bias = Vector::<f32, N>::new(0.0);
        let mut row = part * part_rows;
        let end = min(row + part_rows, rows);
        while row < end {
            let mut gradients = Array::<Vector<E, N>>::new(ROWS_AT_ONCE);
            let mut inputs = Array::<Vector<E, N>>::new(ROWS_AT_ONCE);
            #[unroll]
            for i in 0..ROWS_AT_ONCE {
                let at = min(row + i, end - 1) * cols + column;
                gradients[i] = dout[at];
                if comptime!(sums.weight) {
                    inputs[i] = sum[at];
                }
            }
            #[unroll]
            for i in 0..ROWS_AT_ONCE {
                let row = row + i;
                if row < end {
                    let gradient = Vector::<f32, N>::cast_from(gradients[i]);
                    if comptime!(sums.weight) {
                        let mean = mean_of(statistics, row, centred);
                        let difference = Vector::<f32, N>::cast_from(inputs[i]) - Vector::new(mean);
                        of_weight += gradient * difference * Vector::new(statistics.index(RSTD)[row]);
                    }
                    if comptime!(sums.bias) {
                        of_bias += gradient;
                    }
                }
            }
            row += ROWS_AT_ONCE;
        }
        write_part::<N>(of_weight, of_bias, partial, part * cols + column, sums);
    }
}

/// Writes the sums of one part at one place.
#[cube]
pub(crate) fn write_part<N: Size>(
    of_weight: Vector<f32, N>,
    of_bias: Vector<f32, N>,
    partial: &mut Sequence<Array<Vector<f32, N>>>,
    at: usize,
    #[comptime] sums: Sums,
) {
    if comptime!(sums.weight) {
        let weights = partial.index_mut(WEIGHT);
        weights[at] = of_weight;
    }
    if comptime!(sums.bias) {
        let place = comptime!(usize::from(sums.weight));
        let biases = partial.index_mut(place);
        biases[at] = of_bias;
    }
}
