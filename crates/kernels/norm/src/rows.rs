//! Rows that are divided by their size, after their mean is taken from them where they are centred: what RMSNorm and LayerNorm
//! have in common.
//!
//! Work: one cube per row, units stride the columns. Traffic: the row is read twice, three times where it is centred (all but the
//! first time from cache), and the result is written once.
//! Numerics: sums are f32 for every element type. The variance is that of the differences from the mean, which squares would lose.
//! Gradients of parameters are fixed-order sums over blocks of rows, no float atomics: the same bits on every run.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{
    Launch, LaunchError, column_parts, cube_reduce_bytes, cube_sum, fold_columns, unchecked, vector_sum,
};

/// Sizes and constants of one normalisation.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) hidden_size: usize,
    pub(crate) eps: f32,
    pub(crate) weight_offset: f32,
}

impl Shape {
    fn is_empty(&self) -> bool {
        self.rows == 0 || self.hidden_size == 0
    }
}

/// Places of the statistics in the sequence of them that a kernel is given.
const RSTD: usize = 0;
const MEAN: usize = 1;
/// Place of the weight's sums, before those of the bias.
const WEIGHT: usize = 0;

/// One f32 per row.
#[derive(Clone, Copy)]
pub(crate) struct Statistics<'a> {
    pub(crate) rstd: &'a Handle,
    /// Where rows are centred.
    pub(crate) mean: Option<&'a Handle>,
}

impl Statistics<'_> {
    /// `rstd`, then `mean`.
    fn arrays<R: Runtime>(
        &self,
        launch: &Launch<'_, R>,
        rows: usize,
    ) -> Result<SequenceArg<R, Array<f32>>, LaunchError> {
        let all = [("rstd", Some(self.rstd)), ("mean", self.mean)];
        all.into_iter().filter_map(|(arg, handle)| Some(launch.array::<f32>(arg, handle?, rows))).collect()
    }
}

/// Buffers of the forward pass. `x` becomes `x + residual` where there is one.
#[derive(Clone, Copy)]
pub(crate) struct Forward<'a> {
    pub(crate) x: &'a Handle,
    pub(crate) residual: Option<&'a Handle>,
    pub(crate) weight: &'a Handle,
    pub(crate) bias: Option<&'a Handle>,
    pub(crate) out: &'a Handle,
    pub(crate) statistics: Statistics<'a>,
}

pub(crate) fn forward<R: Runtime, E: Float, W: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    launch.element::<E>()?;
    launch.element::<W>()?;
    if shape.is_empty() {
        return Ok(());
    }
    let Shape { rows, hidden_size, eps, weight_offset } = shape;
    let (len, width) = (rows * hidden_size, launch.vector_width::<E>(hidden_size));
    let centred = args.statistics.mean.is_some();
    let grid = launch.rows(rows, hidden_size / width);
    launch.cube(grid.dim, (1 + usize::from(centred)) * cube_reduce_bytes(grid.units))?;
    let (client, cols) = (launch.client(), (hidden_size / width) as u32);
    let x = launch.vectors::<E>("x", args.x, len, width)?;
    let weight = launch.vectors::<W>("weight", args.weight, hidden_size, width)?;
    let bias = args.bias.map(|bias| launch.vectors::<W>("bias", bias, hidden_size, width)).transpose()?;
    let out = launch.vectors::<E>("out", args.out, len, width)?;
    let statistics = args.statistics.arrays(launch, rows)?;
    let (units, rows) = (grid.units, rows as u32);
    match args.residual {
        None => unchecked!(forward_kernel::launch_unchecked::<E, W, R>(
            client,
            grid.count,
            grid.dim,
            width,
            x,
            weight,
            bias.into(),
            out,
            statistics,
            rows,
            cols,
            eps,
            weight_offset,
            centred,
            units,
        )),
        Some(residual) => {
            let residual = launch.vectors::<E>("residual", residual, len, width)?;
            unchecked!(add_forward_kernel::launch_unchecked::<E, W, R>(
                client,
                grid.count,
                grid.dim,
                width,
                x,
                residual,
                weight,
                bias.into(),
                out,
                statistics,
                rows,
                cols,
                eps,
                weight_offset,
                centred,
                units,
            ));
        }
    }
    Ok(())
}

/// What the first pass over a row sums: elements whose mean is wanted, or their squares.
#[cube]
fn first_term<N: Size>(value: Vector<f32, N>, #[comptime] centred: bool) -> Vector<f32, N> {
    if comptime!(centred) { value } else { value * value }
}

/// Writes `out` and the statistics of one row, of whose first sum this unit has a part.
#[cube]
fn write_row<E: Float, W: Float, N: Size>(
    x: &Slice<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    bias: &ComptimeOption<Array<Vector<W, N>>>,
    out: &mut Array<Vector<E, N>>,
    statistics: &mut Sequence<Array<f32>>,
    part: Vector<f32, N>,
    row: usize,
    cols: usize,
    eps: f32,
    weight_offset: f32,
    #[comptime] centred: bool,
    #[comptime] units: usize,
) {
    let width = N::value();
    let hidden = f32::cast_from(cols as u32) * comptime!(width as f32);
    let first = cube_sum(vector_sum::<N>(part), units) / hidden;
    let mut mean = 0.0f32;
    let mut square = first;
    if comptime!(centred) {
        mean = first;
        let mut squares = Vector::<f32, N>::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < cols {
            let value = Vector::<f32, N>::cast_from(x[row * cols + i]) - Vector::new(mean);
            squares += value * value;
            i += units;
        }
        square = cube_sum(vector_sum::<N>(squares), units) / hidden;
    }
    let r = f32::inverse_sqrt(square + eps);
    let mut i = UNIT_POS as usize;
    while i < cols {
        let w = Vector::<f32, N>::cast_from(weight[i]) + Vector::new(weight_offset);
        let scaled = centre::<E, N>(x[row * cols + i], mean, centred) * Vector::new(r) * w;
        #[comptime]
        let shifted = match bias {
            ComptimeOption::Some(bias) => scaled + Vector::<f32, N>::cast_from(bias[i]),
            ComptimeOption::None => scaled,
        };
        out[row * cols + i] = Vector::cast_from(shifted);
        i += units;
    }
    if UNIT_POS == 0 {
        let rstds = statistics.index_mut(RSTD);
        rstds[row] = r;
        if comptime!(centred) {
            let means = statistics.index_mut(MEAN);
            means[row] = mean;
        }
    }
}

#[cube]
fn centre<E: Float, N: Size>(value: Vector<E, N>, mean: f32, #[comptime] centred: bool) -> Vector<f32, N> {
    let value = Vector::<f32, N>::cast_from(value);
    if comptime!(centred) { value - Vector::new(mean) } else { value }
}

/// Grid: cube = row, units stride the columns.
#[cube(launch_unchecked)]
fn forward_kernel<E: Float, W: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    bias: &ComptimeOption<Array<Vector<W, N>>>,
    out: &mut Array<Vector<E, N>>,
    statistics: &mut Sequence<Array<f32>>,
    rows: u32,
    cols: u32,
    eps: f32,
    weight_offset: f32,
    #[comptime] centred: bool,
    #[comptime] units: usize,
) {
    let cols = cols as usize;
    let row = CUBE_POS;
    if row < rows as usize {
        let mut part = Vector::<f32, N>::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < cols {
            part += first_term::<N>(Vector::cast_from(x[row * cols + i]), centred);
            i += units;
        }
        let x = x.to_slice();
        write_row::<E, W, N>(&x, weight, bias, out, statistics, part, row, cols, eps, weight_offset, centred, units);
    }
}

/// Grid as [`forward_kernel`]. Each unit reads back only what it wrote itself.
#[cube(launch_unchecked)]
fn add_forward_kernel<E: Float, W: Float, N: Size>(
    x: &mut Array<Vector<E, N>>,
    residual: &Array<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    bias: &ComptimeOption<Array<Vector<W, N>>>,
    out: &mut Array<Vector<E, N>>,
    statistics: &mut Sequence<Array<f32>>,
    rows: u32,
    cols: u32,
    eps: f32,
    weight_offset: f32,
    #[comptime] centred: bool,
    #[comptime] units: usize,
) {
    let cols = cols as usize;
    let row = CUBE_POS;
    if row < rows as usize {
        let mut part = Vector::<f32, N>::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < cols {
            let at = row * cols + i;
            let sum = Vector::<f32, N>::cast_from(x[at]) + Vector::<f32, N>::cast_from(residual[at]);
            x[at] = Vector::cast_from(sum);
            part += first_term::<N>(Vector::cast_from(x[at]), centred);
            i += units;
        }
        let x = x.to_slice();
        write_row::<E, W, N>(&x, weight, bias, out, statistics, part, row, cols, eps, weight_offset, centred, units);
    }
}

/// Buffers of the backward pass. `dout` becomes `dx`.
#[derive(Clone, Copy)]
pub(crate) struct Backward<'a> {
    pub(crate) dout: &'a Handle,
    pub(crate) dsum: Option<&'a Handle>,
    pub(crate) sum: &'a Handle,
    pub(crate) weight: &'a Handle,
    pub(crate) statistics: Statistics<'a>,
}

pub(crate) fn backward<R: Runtime, E: Float, W: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    args: Backward<'_>,
) -> Result<(), LaunchError> {
    launch.element::<E>()?;
    launch.element::<W>()?;
    if shape.is_empty() {
        return Ok(());
    }
    let Shape { rows, hidden_size, weight_offset, .. } = shape;
    let (len, width) = (rows * hidden_size, launch.vector_width::<E>(hidden_size));
    let centred = args.statistics.mean.is_some();
    let grid = launch.rows(rows, hidden_size / width);
    launch.cube(grid.dim, (1 + usize::from(centred)) * cube_reduce_bytes(grid.units))?;
    unchecked!(backward_kernel::launch_unchecked::<E, W, R>(
        launch.client(),
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("dout", args.dout, len, width)?,
        // Without a second gradient the kernel never reads this argument.
        launch.vectors::<E>("dsum", args.dsum.unwrap_or(args.sum), len, width)?,
        launch.vectors::<E>("sum", args.sum, len, width)?,
        launch.vectors::<W>("weight", args.weight, hidden_size, width)?,
        args.statistics.arrays(launch, rows)?,
        rows as u32,
        (hidden_size / width) as u32,
        weight_offset,
        args.dsum.is_some(),
        centred,
        grid.units,
    ));
    Ok(())
}

/// `mean` of a row, 0 where it is not centred.
#[cube]
fn mean_of(statistics: &Sequence<Array<f32>>, row: usize, #[comptime] centred: bool) -> f32 {
    let mut mean = 0.0f32;
    if comptime!(centred) {
        mean = statistics.index(MEAN)[row];
    }
    mean
}

/// Grid as [`forward_kernel`]. Each unit overwrites only what it alone reads.
#[cube(launch_unchecked)]
fn backward_kernel<E: Float, W: Float, N: Size>(
    dout: &mut Array<Vector<E, N>>,
    dsum: &Array<Vector<E, N>>,
    sum: &Array<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    statistics: &Sequence<Array<f32>>,
    rows: u32,
    cols: u32,
    weight_offset: f32,
    #[comptime] has_dsum: bool,
    #[comptime] centred: bool,
    #[comptime] units: usize,
) {
    let width = N::value();
    let cols = cols as usize;
    let row = CUBE_POS;
    if row < rows as usize {
        let mean = mean_of(statistics, row, centred);
        let hidden = f32::cast_from(cols as u32) * comptime!(width as f32);
        let mut products = Vector::<f32, N>::new(0.0);
        let mut gradients = Vector::<f32, N>::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < cols {
            let at = row * cols + i;
            let w = Vector::<f32, N>::cast_from(weight[i]) + Vector::new(weight_offset);
            let g = Vector::<f32, N>::cast_from(dout[at]) * w;
            products += g * centre::<E, N>(sum[at], mean, centred);
            if comptime!(centred) {
                gradients += g;
            }
            i += units;
        }
        // mean(g * xhat) * rstd, with xhat = (sum - mean) * rstd
        let product = cube_sum(vector_sum::<N>(products), units);
        // Not read before: held through the first loop it would spill on sm_100a.
        let r = statistics.index(RSTD)[row];
        let shrink = product * r * r / hidden;
        let mut mean_gradient = 0.0f32;
        if comptime!(centred) {
            mean_gradient = cube_sum(vector_sum::<N>(gradients), units) / hidden;
        }
        let mut i = UNIT_POS as usize;
        while i < cols {
            let at = row * cols + i;
            let w = Vector::<f32, N>::cast_from(weight[i]) + Vector::new(weight_offset);
            let mut g = Vector::<f32, N>::cast_from(dout[at]) * w;
            if comptime!(centred) {
                g -= Vector::new(mean_gradient);
            }
            let mut dx = (g - centre::<E, N>(sum[at], mean, centred) * Vector::new(shrink)) * Vector::new(r);
            if comptime!(has_dsum) {
                dx += Vector::<f32, N>::cast_from(dsum[at]);
            }
            dout[at] = Vector::cast_from(dx);
            i += units;
        }
    }
}

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
    let grid = launch.columns(rows, hidden_size)?;
    let partial = wanted.iter().map(|(_, gradient)| launch.array::<f32>("workspace", gradient.workspace, parts));
    unchecked!(partial_kernel::launch_unchecked::<E, R>(
        launch.client(),
        grid.count,
        grid.dim,
        launch.array::<E>("dout", args.dout, len)?,
        launch.array::<E>("sum", args.sum, len)?,
        args.statistics.arrays(launch, rows)?,
        partial.collect::<Result<SequenceArg<R, _>, _>>()?,
        rows as u32,
        hidden_size as u32,
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

/// Grid: x = block of columns, y = block of rows; unit = column. The weight's sums come first.
#[cube(launch_unchecked)]
fn partial_kernel<E: Float>(
    dout: &Array<E>,
    sum: &Array<E>,
    statistics: &Sequence<Array<f32>>,
    partial: &mut Sequence<Array<f32>>,
    rows: u32,
    cols: u32,
    part_rows: u32,
    #[comptime] sums: Sums,
) {
    let column = ABSOLUTE_POS_X as usize;
    let (rows, cols, part_rows) = (rows as usize, cols as usize, part_rows as usize);
    let part = CUBE_POS_Y as usize;
    if column < cols {
        let mut of_weight = 0.0f32;
        let mut of_bias = 0.0f32;
        let mut row = part * part_rows;
        let end = min(row + part_rows, rows);
        while row < end {
            let at = row * cols + column;
            let gradient = f32::cast_from(dout[at]);
            if comptime!(sums.weight) {
                let mean = mean_of(statistics, row, sums.centred);
                of_weight += gradient * (f32::cast_from(sum[at]) - mean) * statistics.index(RSTD)[row];
            }
            if comptime!(sums.bias) {
                of_bias += gradient;
            }
            row += 1;
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
