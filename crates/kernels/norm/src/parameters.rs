//! Gradients of weight and bias: sums over all rows.
//!
//! Traffic: each matrix is read once more than by the pass that gives the gradient of the input. Sums are f32, of fixed order over blocks of rows,
//! no float atomics: the same bits on every run.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, column_parts, fold_columns, unchecked};

use crate::rows::{RSTD, Shape, Statistics, mean_of};

/// Place of the weight's sums, before those of the bias.
const WEIGHT: usize = 0;
/// Rows that a unit reads before it adds them, so that it waits for memory less often.
const ROWS_AT_ONCE: usize = 4;

/// Where the gradient of a parameter goes.
#[derive(Clone, Copy)]
pub(crate) struct Gradient<'a> {
    /// f32 `[column_parts(rows), hidden_size]`, overwritten.
    pub(crate) workspace: &'a Handle,
    /// f32 `[hidden_size]`, added to.
    pub(crate) total: &'a Handle,
}

/// Buffers of the parameters' gradients.
#[derive(Clone, Copy)]
pub(crate) struct ParameterGradients<'a> {
    pub(crate) dout: &'a Handle,
    pub(crate) sum: &'a Handle,
    pub(crate) statistics: Statistics<'a>,
    pub(crate) dweight: Option<Gradient<'a>>,
    pub(crate) dbias: Option<Gradient<'a>>,
}

pub(crate) fn parameter_gradients<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    args: ParameterGradients<'_>,
) -> Result<(), LaunchError> {
    launch.element::<E>()?;
    let Shape { rows, hidden_size, .. } = shape;
    let wanted = [("dweight", args.dweight), ("dbias", args.dbias)];
    let wanted: Vec<_> = wanted.into_iter().filter_map(|(arg, gradient)| Some((arg, gradient?))).collect();
    if shape.is_empty() || wanted.is_empty() {
        return Ok(());
    }
    let (len, parts) = (rows * hidden_size, column_parts(rows) * hidden_size);
    let width = launch.vector_width::<E>(hidden_size);
    let grid = launch.columns(rows, hidden_size / width)?;
    let partial =
        wanted.iter().map(|(_, gradient)| launch.vectors::<f32>("workspace", gradient.workspace, parts, width));
    unchecked!(partial_kernel::launch_unchecked::<E, R>(
        launch.client(),
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("dout", args.dout, len, width)?,
        launch.vectors::<E>("sum", args.sum, len, width)?,
        args.statistics.arrays(launch, rows)?,
        partial.collect::<Result<SequenceArg<R, _>, _>>()?,
        rows as u32,
        (hidden_size / width) as u32,
        grid.part_rows,
        Sums { centred: args.statistics.mean.is_some(), weight: args.dweight.is_some(), bias: args.dbias.is_some() },
    ));
    let fold = |(arg, gradient): (_, Gradient<'_>)| {
        fold_columns(launch, (rows, hidden_size), gradient.workspace, (arg, gradient.total))
    };
    wanted.into_iter().try_for_each(fold)
}

/// What [`partial_kernel`] sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Sums {
    centred: bool,
    weight: bool,
    bias: bool,
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
                        let mean = mean_of(statistics, row, sums.centred);
                        let centred = Vector::<f32, N>::cast_from(inputs[i]) - Vector::new(mean);
                        of_weight += gradient * centred * Vector::new(statistics.index(RSTD)[row]);
                    }
                    if comptime!(sums.bias) {
                        of_bias += gradient;
                    }
                }
            }
            row += ROWS_AT_ONCE;
        }
        let at = part * cols + column;
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
}
