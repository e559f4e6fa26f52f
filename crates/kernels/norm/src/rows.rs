//! Rows that are divided by their size, after their mean is taken from them where they are centred: what RMSNorm and LayerNorm
//! have in common, and their forward pass.
//!
//! Work: one cube per row, units stride the columns. Traffic: the row is read once and kept in registers, or where it is too long
//! for that once more in each pass (two, or three where it is centred; all but the first time from cache), as the sum with a residual is
//! always; the result is written once.
//! Numerics: sums are f32 for every element type. The variance is that of the differences from the mean, which squares would lose.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, cube_reduce_bytes, cube_sum, unchecked, vector_sum};

/// Sizes and constants of one normalisation.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) hidden_size: usize,
    pub(crate) eps: f32,
    pub(crate) weight_offset: f32,
}

impl Shape {
    pub(crate) fn is_empty(&self) -> bool {
        self.rows == 0 || self.hidden_size == 0
    }
}

/// Places of the statistics in the sequence of them that a kernel is given.
pub(crate) const RSTD: usize = 0;
const MEAN: usize = 1;

/// One f32 per row.
#[derive(Clone, Copy)]
pub(crate) struct Statistics<'a> {
    pub(crate) rstd: &'a Handle,
    /// Where rows are centred.
    pub(crate) mean: Option<&'a Handle>,
}

impl Statistics<'_> {
    /// `rstd`, then `mean`.
    pub(crate) fn arrays<R: Runtime>(
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
    let (form, rows) = (Form::new(centred, grid.units, (hidden_size / width, width, 1)), rows as u32);
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
            form,
        )),
        Some(residual) => {
            let residual = launch.vectors::<E>("residual", residual, len, width)?;
            // Sums are rounded by going through memory.
            let form = Form { held: 0, ..form };
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
                form,
            ));
        }
    }
    Ok(())
}

/// What changes the code of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Form {
    /// Whether a mean is taken from rows.
    pub(crate) centred: bool,
    /// Units of a cube. Of a row, a unit has vectors `UNIT_POS`, `UNIT_POS + units`, ...
    pub(crate) units: usize,
    /// How many those are at most where a unit keeps them in registers from one pass to the next; 0 where it reads them again.
    pub(crate) held: usize,
}

/// A unit keeps no more vectors: a software device takes long to compile loops that are unrolled.
const MOST_HELD: usize = 4;
/// Nor more elements, so that others find registers too.
const MOST_ELEMENTS: usize = 16;

impl Form {
    /// For rows of `cols` vectors of `width`, for each element of which units keep so many.
    pub(crate) fn new(centred: bool, units: usize, (cols, width, kept): (usize, usize, usize)) -> Self {
        let each = cols.div_ceil(units);
        let fits = each <= MOST_HELD && kept * each * width <= MOST_ELEMENTS;
        Self { centred, units, held: if fits { each } else { 0 } }
    }
}

/// Vectors of a row that each unit goes through. The last of them may lie beyond the row's end.
#[cube]
pub(crate) fn each(cols: usize, #[comptime] form: Form) -> usize {
    if comptime!(form.held > 0) { usize::new(comptime!(form.held as i64)) } else { cols.div_ceil(form.units) }
}

/// Registers for what a unit keeps of a row.
#[cube]
pub(crate) fn registers<E: Float, N: Size>(#[comptime] form: Form) -> Array<Vector<E, N>> {
    Array::<Vector<E, N>>::new(comptime!(form.held.max(1)))
}

/// This unit's `step`-th vector of a row, which has been read before and is at `at` in memory.
#[cube]
pub(crate) fn again<E: Float, N: Size>(
    kept: &Array<Vector<E, N>>,
    memory: &Slice<Vector<E, N>>,
    step: usize,
    at: usize,
    #[comptime] form: Form,
) -> Vector<E, N> {
    if comptime!(form.held > 0) { kept[step] } else { memory[at] }
}

/// What the first pass over a row sums: elements whose mean is wanted, or their squares.
#[cube]
fn first_term<E: Float, N: Size>(value: Vector<E, N>, #[comptime] form: Form) -> Vector<f32, N> {
    let value = Vector::<f32, N>::cast_from(value);
    if comptime!(form.centred) { value } else { value * value }
}

/// Writes `out` and the statistics of one row, of whose first sum this unit has a part.
#[cube]
fn write_row<E: Float, W: Float, N: Size>(
    x: &Slice<Vector<E, N>>,
    kept: &Array<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    bias: &ComptimeOption<Array<Vector<W, N>>>,
    out: &mut Array<Vector<E, N>>,
    statistics: &mut Sequence<Array<f32>>,
    part: Vector<f32, N>,
    row: usize,
    cols: usize,
    eps: f32,
    weight_offset: f32,
    #[comptime] form: Form,
) {
    let width = N::value();
    let units = comptime!(form.units);
    let hidden = f32::cast_from(cols as u32) * comptime!(width as f32);
    let first = cube_sum(vector_sum::<N>(part), units) / hidden;
    let mut mean = 0.0f32;
    let mut square = first;
    if comptime!(form.centred) {
        mean = first;
        let mut squares = Vector::<f32, N>::new(0.0);
        #[unroll(form.held > 0)]
        for step in 0..each(cols, form) {
            let i = UNIT_POS as usize + step * units;
            if i < cols {
                let value = centre::<E, N>(again::<E, N>(kept, x, step, row * cols + i, form), mean, form);
                squares += value * value;
            }
        }
        square = cube_sum(vector_sum::<N>(squares), units) / hidden;
    }
    let r = f32::inverse_sqrt(square + eps);
    #[unroll(form.held > 0)]
    for step in 0..each(cols, form) {
        let i = UNIT_POS as usize + step * units;
        if i < cols {
            let w = Vector::<f32, N>::cast_from(weight[i]) + Vector::new(weight_offset);
            let value = again::<E, N>(kept, x, step, row * cols + i, form);
            let scaled = centre::<E, N>(value, mean, form) * Vector::new(r) * w;
            #[comptime]
            let shifted = match bias {
                ComptimeOption::Some(bias) => scaled + Vector::<f32, N>::cast_from(bias[i]),
                ComptimeOption::None => scaled,
            };
            out[row * cols + i] = Vector::cast_from(shifted);
        }
    }
    if UNIT_POS == 0 {
        let rstds = statistics.index_mut(RSTD);
        rstds[row] = r;
        if comptime!(form.centred) {
            let means = statistics.index_mut(MEAN);
            means[row] = mean;
        }
    }
}

#[cube]
pub(crate) fn centre<E: Float, N: Size>(value: Vector<E, N>, mean: f32, #[comptime] form: Form) -> Vector<f32, N> {
    let value = Vector::<f32, N>::cast_from(value);
    if comptime!(form.centred) { value - Vector::new(mean) } else { value }
}

/// `mean` of a row, 0 where it is not centred.
#[cube]
pub(crate) fn mean_of(statistics: &Sequence<Array<f32>>, row: usize, #[comptime] centred: bool) -> f32 {
    let mut mean = 0.0f32;
    if comptime!(centred) {
        mean = statistics.index(MEAN)[row];
    }
    mean
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
    #[comptime] form: Form,
) {
    let cols = cols as usize;
    let row = CUBE_POS;
    if row < rows as usize {
        let mut kept = registers::<E, N>(form);
        let mut part = Vector::<f32, N>::new(0.0);
        #[unroll(form.held > 0)]
        for step in 0..each(cols, form) {
            let i = UNIT_POS as usize + step * form.units;
            if i < cols {
                let value = x[row * cols + i];
                part += first_term::<E, N>(value, form);
                if comptime!(form.held > 0) {
                    kept[step] = value;
                }
            }
        }
        let x = x.to_slice();
        write_row::<E, W, N>(&x, &kept, weight, bias, out, statistics, part, row, cols, eps, weight_offset, form);
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
    #[comptime] form: Form,
) {
    let cols = cols as usize;
    let row = CUBE_POS;
    if row < rows as usize {
        let kept = registers::<E, N>(form);
        let mut part = Vector::<f32, N>::new(0.0);
        for step in 0..each(cols, form) {
            let i = UNIT_POS as usize + step * form.units;
            if i < cols {
                let at = row * cols + i;
                let sum = Vector::<f32, N>::cast_from(x[at]) + Vector::<f32, N>::cast_from(residual[at]);
                x[at] = Vector::cast_from(sum);
            }
        }
        // What is normalised is the sum that backward reads, in a loop of its own: a shader's compiler leaves out a rounding that a
        // conversion back follows.
        for step in 0..each(cols, form) {
            let i = UNIT_POS as usize + step * form.units;
            if i < cols {
                part += first_term::<E, N>(x[row * cols + i], form);
            }
        }
        let x = x.to_slice();
        write_row::<E, W, N>(&x, &kept, weight, bias, out, statistics, part, row, cols, eps, weight_offset, form);
    }
}
