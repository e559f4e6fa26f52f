//! The backward pass of [`crate::rows`]: the gradient of the input, and those of weight and bias where they are wanted.
//!
//! Work: one cube per row, units stride the columns; with gradients of parameters, cubes walk over rows where a row fits in
//! registers, and each unit sums what belongs to its columns. Traffic: `dout` and `sum` are read once, `dx` is written once; the partial sums
//! are written and read once. A row that is too long is read once more, and so is the matrix for gradients of parameters.
//! Numerics: sums are f32 for every element type and of fixed order, no float atomics: the same bits on every run. Those of the input's gradient
//! do not depend on which others are wanted.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{
    ColumnSum, Launch, LaunchError, RowGrid, column_parts, cube_reduce_bytes, cube_sum, cube_sum_in_few_registers,
    fold_columns, unchecked, vector_sum,
};

use crate::{
    parameters,
    rows::{Form, RSTD, Shape, Statistics, again, centre, each, mean_of, registers},
};

/// Where the gradient of a parameter goes.
#[derive(Clone, Copy, Debug)]
pub struct Gradient<'a> {
    /// f32 `[column_parts(rows, hidden_size), hidden_size]` by [`crate::column_parts`], overwritten.
    pub workspace: &'a Handle,
    /// f32 `[hidden_size]`, added to.
    pub total: &'a Handle,
}

/// Buffers of the backward pass. `dout` becomes `dx`.
#[derive(Clone, Copy)]
pub(crate) struct Backward<'a> {
    pub(crate) dout: &'a Handle,
    pub(crate) dsum: Option<&'a Handle>,
    pub(crate) sum: &'a Handle,
    pub(crate) weight: &'a Handle,
    pub(crate) statistics: Statistics<'a>,
    pub(crate) dweight: Option<Gradient<'a>>,
    pub(crate) dbias: Option<Gradient<'a>>,
}

impl<'a> Backward<'a> {
    /// Gradients of parameters, that of the weight first, with their names.
    fn wanted(&self) -> impl Iterator<Item = (&'static str, Gradient<'a>)> {
        let all = [("dweight", self.dweight), ("dbias", self.dbias)];
        all.into_iter().filter_map(|(arg, gradient)| Some((arg, gradient?)))
    }

    pub(crate) fn sums(&self) -> Sums {
        Sums { weight: self.dweight.is_some(), bias: self.dbias.is_some() }
    }

    /// Partial sums of so many parts, in vectors.
    pub(crate) fn partial<R: Runtime>(
        &self,
        launch: &Launch<'_, R>,
        (parts, hidden_size): (usize, usize),
        width: usize,
    ) -> Result<Vec<ArrayArg<R>>, LaunchError> {
        let vectors =
            |gradient: Gradient<'_>| launch.vectors::<f32>("workspace", gradient.workspace, parts * hidden_size, width);
        self.wanted().map(|(_, gradient)| vectors(gradient)).collect()
    }

    /// Adds up partial sums.
    pub(crate) fn fold<R: Runtime>(&self, launch: &Launch<'_, R>, size: (usize, usize)) -> Result<(), LaunchError> {
        let sum = |(arg, Gradient { workspace, total })| ColumnSum { partial: workspace, arg, total };
        fold_columns(launch, size, &self.wanted().map(sum).collect::<Vec<_>>())
    }
}

/// Which gradients of parameters are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sums {
    pub(crate) weight: bool,
    pub(crate) bias: bool,
}

/// Units of a cube where a row fits in registers of so many, but not of those that it has otherwise.
const WIDE: usize = 512;
/// Vectors of a row that a unit of so many has at most.
const WIDE_HELD: usize = 2;
/// Bytes that a unit may hold of a row, of sums and of the next row, so that that is on its way while a cube is at work on one; and a unit of
/// [`WIDE`], of which a multiprocessor has two cubes or, with a register too many, one.
const MOST_BYTES: [usize; 2] = [112, 96];

/// Cubes, vectors and registers for a row: the same for every choice of gradients, so that sums over a row have the same bits.
struct Geometry {
    grid: RowGrid,
    form: Form,
    width: usize,
}

impl Geometry {
    fn new<R: Runtime, E: Float>(launch: &Launch<'_, R>, shape: Shape, centred: bool) -> Self {
        let Shape { rows, hidden_size, .. } = shape;
        let widest = launch.vector_width::<E>(hidden_size);
        // Where rows are centred a unit has twice as much to hold of each column, so it is given half as many of them.
        let (kept, width) = if centred { (4, widest.min(4)) } else { (2, widest) };
        let usual = launch.rows(rows, hidden_size / width);
        let usual_units = usual.units;
        let wide = launch.rows_of(rows, WIDE.min(launch.most_units()));
        let with_form = |grid: RowGrid| {
            let form = Form::new(centred, grid.units, (hidden_size / width, width, kept));
            Self { grid, form, width }
        };
        let fits = |geometry: &Self| {
            let most = if geometry.form.units > usual_units { WIDE_HELD } else { usize::MAX };
            (1..=most).contains(&geometry.form.held)
        };
        let held = [usual, wide].into_iter().map(with_form).find(fits);
        held.unwrap_or_else(|| {
            let grid = launch.rows(rows, hidden_size / widest);
            let form = Form { centred, units: grid.units, held: 0 };
            Self { grid, form, width: widest }
        })
    }
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
    let (centred, has_dsum) = (args.statistics.mean.is_some(), args.dsum.is_some());
    let Geometry { grid, form, width } = Geometry::new::<R, E>(launch, shape, centred);
    let (len, cols) = (rows * hidden_size, hidden_size / width);
    launch.cube(grid.dim, (1 + usize::from(centred)) * cube_reduce_bytes(grid.units))?;
    let is_one_pass = form.held > 0 && args.wanted().next().is_some();
    if !is_one_pass {
        parameters::parameter_gradients::<R, E>(launch, shape, &args)?;
    }
    let dout = launch.vectors::<E>("dout", args.dout, len, width)?;
    // Without a second gradient the kernels never read this argument.
    let dsum = launch.vectors::<E>("dsum", args.dsum.unwrap_or(args.sum), len, width)?;
    let sum = launch.vectors::<E>("sum", args.sum, len, width)?;
    let weight = launch.vectors::<W>("weight", args.weight, hidden_size, width)?;
    let statistics = args.statistics.arrays(launch, rows)?;
    let (client, cols) = (launch.client(), cols as u32);
    if !is_one_pass {
        unchecked!(backward_kernel::launch_unchecked::<E, W, R>(
            client,
            grid.count,
            grid.dim,
            width,
            dout,
            dsum,
            sum,
            weight,
            statistics,
            rows as u32,
            cols,
            weight_offset,
            has_dsum,
            form,
        ));
        return Ok(());
    }
    let parts = column_parts(rows, hidden_size);
    let walk = Walk::new(has_dsum, args.sums(), form, (width, E::as_type_native_unchecked().size()));
    unchecked!(walking_kernel::launch_unchecked::<E, W, R>(
        client,
        launch.cubes(parts, 1, 1)?,
        grid.dim,
        width,
        dout,
        dsum,
        sum,
        weight,
        statistics,
        args.partial(launch, (parts, hidden_size), width)?.into_iter().collect(),
        rows as u32,
        cols,
        weight_offset,
        walk,
        form,
    ));
    args.fold(launch, (parts, hidden_size))
}

/// `dout * (weight + offset)` at one place of a row.
#[cube]
fn weighted<E: Float, W: Float, N: Size>(
    dout: Vector<E, N>,
    weight: Vector<W, N>,
    weight_offset: f32,
) -> Vector<f32, N> {
    let w = Vector::<f32, N>::cast_from(weight) + Vector::new(weight_offset);
    Vector::<f32, N>::cast_from(dout) * w
}

/// What the input's gradient takes from sums over a row.
#[derive(CubeType, Clone, Copy)]
struct Row {
    rstd: f32,
    /// `mean(g * xhat) * rstd`, with `xhat = (sum - mean) * rstd`
    shrink: f32,
    /// `mean(g)` where rows are centred.
    mean_gradient: f32,
}

/// `rstd * (g - mean(g) - xhat * mean(g * xhat))`
#[cube]
fn input_gradient<N: Size>(
    weighted: Vector<f32, N>,
    centred: Vector<f32, N>,
    row: Row,
    #[comptime] form: Form,
) -> Vector<f32, N> {
    let mut g = weighted;
    if comptime!(form.centred) {
        g -= Vector::new(row.mean_gradient);
    }
    (g - centred * Vector::new(row.shrink)) * Vector::new(row.rstd)
}

/// Grid: cube = row, units stride the columns. Each unit overwrites only what it alone reads.
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
    #[comptime] form: Form,
) {
    let width = N::value();
    let units = comptime!(form.units);
    let cols = cols as usize;
    let row = CUBE_POS;
    if row < rows as usize {
        let mean = mean_of(statistics, row, form.centred);
        let hidden = f32::cast_from(cols as u32) * comptime!(width as f32);
        let mut kept_dout = registers::<E, N>(form);
        let mut kept_sum = registers::<E, N>(form);
        let mut products = Vector::<f32, N>::new(0.0);
        let mut gradients = Vector::<f32, N>::new(0.0);
        #[unroll(form.held > 0)]
        for step in 0..each(cols, form) {
            let i = UNIT_POS as usize + step * units;
            if i < cols {
                let at = row * cols + i;
                let (of_dout, of_sum) = (dout[at], sum[at]);
                let g = weighted::<E, W, N>(of_dout, weight[i], weight_offset);
                products += g * centre::<E, N>(of_sum, mean, form);
                if comptime!(form.centred) {
                    gradients += g;
                }
                if comptime!(form.held > 0) {
                    kept_dout[step] = of_dout;
                    kept_sum[step] = of_sum;
                }
            }
        }
        let product = cube_sum(vector_sum::<N>(products), units);
        // Not read before: held through the first loop it would spill on sm_100a.
        let rstd = statistics.index(RSTD)[row];
        let shrink = product * rstd * rstd / hidden;
        let mut mean_gradient = 0.0f32;
        if comptime!(form.centred) {
            mean_gradient = cube_sum(vector_sum::<N>(gradients), units) / hidden;
        }
        let of_row = Row { rstd, shrink, mean_gradient };
        #[unroll(form.held > 0)]
        for step in 0..each(cols, form) {
            let i = UNIT_POS as usize + step * units;
            if i < cols {
                let at = row * cols + i;
                let of_dout = again::<E, N>(&kept_dout, &dout.to_slice(), step, at, form);
                let of_sum = again::<E, N>(&kept_sum, &sum.to_slice(), step, at, form);
                let g = weighted::<E, W, N>(of_dout, weight[i], weight_offset);
                let mut dx = input_gradient::<N>(g, centre::<E, N>(of_sum, mean, form), of_row, form);
                if comptime!(has_dsum) {
                    dx += Vector::<f32, N>::cast_from(dsum[at]);
                }
                dout[at] = Vector::cast_from(dx);
            }
        }
    }
}

/// What changes the code of [`walking_kernel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Walk {
    has_dsum: bool,
    /// Whether a row is read while the one before is at work.
    is_ahead: bool,
    sums: Sums,
}

impl Walk {
    /// For vectors of `width` elements of so many bytes.
    fn new(has_dsum: bool, sums: Sums, form: Form, (width, bytes): (usize, usize)) -> Self {
        let elements = form.held * width;
        let num_sums = usize::from(sums.weight) + usize::from(sums.bias);
        let matrices = 4 + usize::from(has_dsum);
        let all_bytes = elements * (matrices * bytes + num_sums * size_of::<f32>());
        Self { has_dsum, is_ahead: all_bytes <= MOST_BYTES[usize::from(form.units >= WIDE)], sums }
    }
}

/// Reads this unit's vectors of a row.
#[cube]
fn read_row<E: Float, N: Size>(
    matrix: &Slice<Vector<E, N>>,
    kept: &mut Array<Vector<E, N>>,
    row: usize,
    cols: usize,
    #[comptime] form: Form,
) {
    #[unroll]
    for step in 0..each(cols, form) {
        let i = UNIT_POS as usize + step * form.units;
        if i < cols {
            kept[step] = matrix[row * cols + i];
        }
    }
}

/// Grid: cubes take rows `CUBE_POS`, `CUBE_POS + CUBE_COUNT`, ..., units stride the columns. As [`backward_kernel`], of rows that fit in registers, with
/// the sums over a cube's rows for the gradients of parameters: those of the weight come first.
#[cube(launch_unchecked)]
fn walking_kernel<E: Float, W: Float, N: Size>(
    dout: &mut Array<Vector<E, N>>,
    dsum: &Array<Vector<E, N>>,
    sum: &Array<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    statistics: &Sequence<Array<f32>>,
    partial: &mut Sequence<Array<Vector<f32, N>>>,
    rows: u32,
    cols: u32,
    weight_offset: f32,
    #[comptime] walk: Walk,
    #[comptime] form: Form,
) {
    let width = N::value();
    let units = comptime!(form.units);
    let (rows, cols) = (rows as usize, cols as usize);
    let hidden = f32::cast_from(cols as u32) * comptime!(width as f32);
    let mut of_weight = Array::<Vector<f32, N>>::new(comptime!(form.held));
    let mut of_bias = Array::<Vector<f32, N>>::new(comptime!(form.held));
    #[unroll]
    for step in 0..each(cols, form) {
        of_weight[step] = Vector::new(0.0);
        of_bias[step] = Vector::new(0.0);
    }
    let mut next_dout = registers::<E, N>(form);
    let mut next_sum = registers::<E, N>(form);
    let mut row = CUBE_POS;
    if comptime!(walk.is_ahead) {
        read_row::<E, N>(&dout.to_slice(), &mut next_dout, row, cols, form);
        read_row::<E, N>(&sum.to_slice(), &mut next_sum, row, cols, form);
    }
    while row < rows {
        let mut kept_dout = registers::<E, N>(form);
        let mut kept_sum = registers::<E, N>(form);
        let mut kept_dsum = registers::<E, N>(form);
        if comptime!(walk.is_ahead) {
            #[unroll]
            for step in 0..each(cols, form) {
                kept_dout[step] = next_dout[step];
                kept_sum[step] = next_sum[step];
            }
            let next = row + CUBE_COUNT;
            if next < rows {
                read_row::<E, N>(&dout.to_slice(), &mut next_dout, next, cols, form);
                read_row::<E, N>(&sum.to_slice(), &mut next_sum, next, cols, form);
            }
        } else {
            read_row::<E, N>(&dout.to_slice(), &mut kept_dout, row, cols, form);
            read_row::<E, N>(&sum.to_slice(), &mut kept_sum, row, cols, form);
        }
        // Before the sums over the row, so that nothing waits for it behind them.
        if comptime!(walk.has_dsum) {
            read_row::<E, N>(&dsum.to_slice(), &mut kept_dsum, row, cols, form);
        }
        let mean = mean_of(statistics, row, form.centred);
        let rstd = statistics.index(RSTD)[row];
        let mut products = Vector::<f32, N>::new(0.0);
        let mut gradients = Vector::<f32, N>::new(0.0);
        #[unroll]
        for step in 0..each(cols, form) {
            let i = UNIT_POS as usize + step * units;
            if i < cols {
                let g = weighted::<E, W, N>(kept_dout[step], weight[i], weight_offset);
                products += g * centre::<E, N>(kept_sum[step], mean, form);
                if comptime!(form.centred) {
                    gradients += g;
                }
            }
        }
        // Both before the first barrier: not a vector, but one register is held through it.
        let (product, gradient) = (vector_sum::<N>(products), vector_sum::<N>(gradients));
        let shrink = cube_sum_in_few_registers(product, units) * rstd * rstd / hidden;
        let mut mean_gradient = 0.0f32;
        if comptime!(form.centred) {
            mean_gradient = cube_sum_in_few_registers(gradient, units) / hidden;
        }
        let of_row = Row { rstd, shrink, mean_gradient };
        #[unroll]
        for step in 0..each(cols, form) {
            let i = UNIT_POS as usize + step * units;
            if i < cols {
                let centred = centre::<E, N>(kept_sum[step], mean, form);
                let g = weighted::<E, W, N>(kept_dout[step], weight[i], weight_offset);
                let mut dx = input_gradient::<N>(g, centred, of_row, form);
                if comptime!(walk.has_dsum) {
                    dx += Vector::<f32, N>::cast_from(kept_dsum[step]);
                }
                dout[row * cols + i] = Vector::cast_from(dx);
                let gradient = Vector::<f32, N>::cast_from(kept_dout[step]);
                if comptime!(walk.sums.weight) {
                    of_weight[step] += gradient * centred * Vector::new(rstd);
                }
                if comptime!(walk.sums.bias) {
                    of_bias[step] += gradient;
                }
            }
        }
        row += CUBE_COUNT;
    }
    write_sums::<N>(&of_weight, &of_bias, partial, cols, walk.sums, form);
}

/// Writes this cube's part of the sums.
#[cube]
fn write_sums<N: Size>(
    of_weight: &Array<Vector<f32, N>>,
    of_bias: &Array<Vector<f32, N>>,
    partial: &mut Sequence<Array<Vector<f32, N>>>,
    cols: usize,
    #[comptime] sums: Sums,
    #[comptime] form: Form,
) {
    #[unroll]
    for step in 0..each(cols, form) {
        let i = UNIT_POS as usize + step * form.units;
        if i < cols {
            parameters::write_part::<N>(of_weight[step], of_bias[step], partial, CUBE_POS * cols + i, sums);
        }
    }
}
