//! Products of few rows, and column sums: nothing to reuse, so each element is a dot product of its own.

use cubecl::{ir::StorageType, prelude::*};
use unsloth_common::{Launch, LaunchError, unchecked};

use crate::product::{Form, Matrix, Size, store};

/// Units of a cube, where the device takes as many.
const UNITS: usize = 256;

/// Units of a cube along the contiguous side of `B`: neighbours read neighbours.
const LONG_SIDE: usize = 32;

/// How the units of a cube share `B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Units {
    /// Columns of `out` per cube.
    columns: usize,
    /// Units that share the sum of one element.
    shares: usize,
}

/// Arguments of a product of few rows.
pub(crate) struct Operands {
    /// `[rows, depth]`; without it, all ones.
    pub(crate) a: Option<Matrix>,
    /// `[depth, cols]`, or transposed.
    pub(crate) b: Matrix,
    /// `[cols]`, added to every row.
    pub(crate) bias: Option<Matrix>,
    /// `[rows, cols]`, written.
    pub(crate) out: Matrix,
    /// Factor of the sums.
    pub(crate) scale: f32,
}

/// Launches a product whose `A` is not transposed.
///
/// # Errors
/// [`LaunchError::Limit`] if the grid exceeds the device's.
pub(crate) fn few_rows<R: Runtime>(
    launch: &Launch<'_, R>,
    size: Size,
    form: Form,
    args: Operands,
) -> Result<(), LaunchError> {
    let Size { rows, cols, depth } = size;
    let element = |matrix: &Option<Matrix>| matrix.as_ref().map_or(args.out.element, |matrix| matrix.element);
    let elements = [element(&args.a), args.b.element, element(&args.bias), args.out.element];
    let all = launch.units_for(UNITS);
    let (long, short) = (LONG_SIDE.min(all), (all / LONG_SIDE).max(1));
    let dim = CubeDim::new_2d(long as u32, short as u32);
    let units =
        if form.b_transposed { Units { columns: short, shares: long } } else { Units { columns: long, shares: short } };
    launch.cube(dim, all * size_of::<f32>())?;
    unchecked!(few_rows_kernel::launch_unchecked(
        launch.client(),
        launch.cubes(cols.div_ceil(units.columns), rows, 1)?,
        dim,
        args.a.map(|a| a.array(launch, 1)).transpose()?.into(),
        args.b.array(launch, 1)?,
        args.bias.map(|bias| bias.array(launch, 1)).transpose()?.into(),
        args.out.array(launch, 1)?,
        cols as u32,
        depth as u32,
        args.scale,
        units,
        form,
        elements,
    ));
    Ok(())
}

/// Grid: x = block of columns, y = row. The parts of a sum are added in the order of the units.
#[cube(launch_unchecked)]
fn few_rows_kernel<A: Numeric, B: Numeric, D: Numeric, Y: Numeric>(
    a: &ComptimeOption<Array<A>>,
    b: &Array<B>,
    bias: &ComptimeOption<Array<D>>,
    out: &mut Array<Y>,
    cols: u32,
    depth: u32,
    scale: f32,
    #[comptime] units: Units,
    #[comptime] form: Form,
    #[define(A, B, D, Y)] _elements: [StorageType; 4],
) {
    let (cols, depth, row) = (cols as usize, depth as usize, CUBE_POS_Y as usize);
    let (column, share) = if comptime!(form.b_transposed) {
        (UNIT_POS_Y as usize, UNIT_POS_X as usize)
    } else {
        (UNIT_POS_X as usize, UNIT_POS_Y as usize)
    };
    let col = CUBE_POS_X as usize * units.columns + column;
    let mut sum = 0.0f32;
    if col < cols {
        let mut k = share;
        while k < depth {
            let at = if comptime!(form.b_transposed) { col * depth + k } else { k * cols + col };
            let term = f32::cast_from(b[at]);
            #[comptime]
            let product = match a {
                ComptimeOption::Some(a) => f32::cast_from(a[row * depth + k]) * term,
                ComptimeOption::None => term,
            };
            sum += product;
            k += units.shares;
        }
    }
    let mut parts = SharedMemory::<f32>::new(comptime!(units.columns * units.shares));
    parts[share * units.columns + column] = sum;
    sync_cube();
    if share == 0 && col < cols {
        for other in 1..comptime!(units.shares).runtime() {
            sum += parts[other * units.columns + column];
        }
        store::<D, Y>(bias, out, row * cols + col, col, sum * scale, form.accumulate);
    }
}
