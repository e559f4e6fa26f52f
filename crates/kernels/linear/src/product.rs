//! `out = scale * A B + bias`, or `out += scale * A B`, for any sizes, storage types and either orientation of `A` and `B`.
//!
//! Work: a cube makes a tile of `out` from tiles of `A` and `B` in shared memory; a unit keeps a block of the tile in
//! registers, or a plane does where tensor cores multiply the type of both. A product of few rows has nothing to reuse and is a dot
//! product per element instead.
//! Traffic: `A` is read once per tile column, `B` once per tile row, `out` is written once.
//! Numerics: products and sums in f32 for every storage type, in an order that depends on the sizes alone; rounded once.

use cubecl::{ir::StorageType, prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

use crate::{
    few_rows::{Operands, few_rows},
    strategy,
};

/// A matrix as an argument of [`product`]: a checked buffer and its element type.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub(crate) handle: Handle,
    pub(crate) element: StorageType,
    pub(crate) arg: &'static str,
    pub(crate) len: usize,
}

impl Matrix {
    /// The first `len` elements of a buffer of `E`, called `arg` in messages.
    ///
    /// # Errors
    /// [`LaunchError`] if the device lacks `E`, or as [`Launch::array`].
    pub fn new<E: Float>(
        launch: &Launch<'_, impl Runtime>,
        arg: &'static str,
        handle: &Handle,
        len: usize,
    ) -> Result<Self, LaunchError> {
        launch.element::<E>()?;
        launch.array::<E>(arg, handle, len)?;
        let element = E::as_type_native_unchecked().storage_type();
        Ok(Self { handle: handle.clone(), element, arg, len })
    }

    /// In vectors of `width`.
    pub(crate) fn array<R: Runtime>(&self, launch: &Launch<'_, R>, width: usize) -> Result<ArrayArg<R>, LaunchError> {
        launch.vectors_of(self.arg, &self.handle, self.element, (self.len, width))
    }

    fn check(&self, launch: &Launch<'_, impl Runtime>, expected: usize) -> Result<(), LaunchError> {
        if self.len == expected {
            return Ok(());
        }
        let (kernel, arg, bytes) = (launch.kernel(), self.arg, self.element.size());
        let (expected, actual) = ((expected * bytes) as u64, (self.len * bytes) as u64);
        Err(LaunchError::Length { kernel, arg, expected, actual })
    }
}

/// Sizes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Rows of `A` and `out`.
    pub rows: usize,
    /// Columns of `B` and `out`.
    pub cols: usize,
    /// Columns of `A`, rows of `B`.
    pub depth: usize,
}

/// Orientation of the operands, and what becomes of the sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    /// `A` is stored as `[depth, rows]`, else `[rows, depth]`.
    pub a_transposed: bool,
    /// `B` is stored as `[cols, depth]`, else `[depth, cols]`.
    pub b_transposed: bool,
    /// The sums are added to `out`, else they replace it.
    pub accumulate: bool,
}

/// Arguments of a product.
#[derive(Clone, Debug)]
pub struct Args {
    /// `[rows, depth]`, or transposed.
    pub a: Matrix,
    /// `[depth, cols]`, or transposed.
    pub b: Matrix,
    /// `[cols]`, added to every row.
    pub bias: Option<Matrix>,
    /// `[rows, cols]`, written.
    pub out: Matrix,
    /// Factor of the sums.
    pub scale: f32,
}

impl Args {
    /// Element type of the bias, or one that stands in for it.
    pub(crate) fn bias_element(&self) -> StorageType {
        self.bias.as_ref().map_or(self.out.element, |bias| bias.element)
    }
}

/// Elements in a vector of shared memory or registers.
const LANES: usize = 4;
type Lanes = Vector<f32, Const<LANES>>;

/// How the work of a product is cut. Every size is a power of two and a multiple of four.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    /// Rows of `out` that a cube makes.
    rows: usize,
    /// Columns of `out` that a cube makes.
    cols: usize,
    /// Terms of the sums that are in shared memory at a time.
    depth: usize,
    /// Rows of the tile that a unit makes.
    unit_rows: usize,
    /// Columns of the tile that a unit makes.
    unit_cols: usize,
}

impl Tile {
    const fn square(side: usize, unit_rows: usize) -> Self {
        Self { rows: side, cols: side, depth: 16, unit_rows, unit_cols: 8 }
    }

    /// The largest has half as many loads for a product as the next one, and a quarter of the cubes.
    pub(crate) const ALL: [Self; 5] =
        [Self::square(128, 8), Self::square(64, 4), Self::square(32, 4), Self::square(16, 4), Self::square(8, 4)];

    /// The rule's for a device: 64 by 64, less where its cubes or its shared memory are too small for that.
    pub(crate) fn for_device(client: &ComputeClient<impl Runtime>) -> Self {
        let [_, by_rule @ ..] = Self::ALL;
        let [.., least] = by_rule;
        by_rule.into_iter().find(|tile| tile.fits(client)).unwrap_or(least)
    }

    /// Tiles that may be faster than the rule's.
    pub(crate) fn others(client: &ComputeClient<impl Runtime>) -> impl Iterator<Item = Self> {
        let rule = Self::for_device(client);
        let [largest, _, smaller, ..] = Self::ALL;
        [largest, smaller].into_iter().filter(move |tile| *tile != rule && tile.fits(client))
    }

    /// As `tiled 64x64`.
    pub(crate) fn name(&self) -> String {
        format!("tiled {}x{}", self.rows, self.cols)
    }

    fn fits(&self, client: &ComputeClient<impl Runtime>) -> bool {
        let hardware = &client.properties().hardware;
        self.units() <= hardware.max_units_per_cube as usize && self.shared_bytes() <= hardware.max_shared_memory_size
    }

    fn units(&self) -> usize {
        (self.rows / self.unit_rows) * (self.cols / self.unit_cols)
    }

    fn shared_bytes(&self) -> usize {
        let operands = (padded(self.rows) + padded(self.cols)) * LANES * self.depth;
        (operands + self.staged()) * size_of::<f32>()
    }

    /// Elements of `out` that leave through shared memory at a time.
    fn staged(&self) -> usize {
        self.rows / self.unit_rows * self.cols
    }
}

/// Vectors from one row of a tile in shared memory to the next: one more than the row has, so that units which store along
/// `depth` do not hit the same bank.
fn padded(len: usize) -> usize {
    len / LANES + 1
}

/// Rows up to which a product is taken element by element.
const FEW_ROWS: usize = 4;

/// Launches a product.
///
/// # Errors
/// [`LaunchError::Length`] for a matrix of another size than [`Args`] says; [`LaunchError::Limit`] if the product exceeds a
/// limit of the device.
pub fn product<R: Runtime>(launch: &Launch<'_, R>, size: Size, form: Form, args: Args) -> Result<(), LaunchError> {
    let Size { rows, cols, depth } = size;
    args.a.check(launch, rows * depth)?;
    args.b.check(launch, depth * cols)?;
    args.bias.as_ref().map_or(Ok(()), |bias| bias.check(launch, cols))?;
    args.out.check(launch, rows * cols)?;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    if rows <= FEW_ROWS && !form.a_transposed {
        let Args { a, b, bias, out, scale } = args;
        return few_rows(launch, size, form, Operands { a: Some(a), b, bias, out, scale });
    }
    strategy::launch(launch, &Job { size, form, args })
}

/// A product whose sizes are checked.
pub(crate) struct Job {
    pub(crate) size: Size,
    pub(crate) form: Form,
    pub(crate) args: Args,
}

/// Launches a product on the portable kernel, `scale` in place of the arguments'.
///
/// # Errors
/// [`LaunchError::Limit`] if the product exceeds a limit of the device.
pub(crate) fn tiled<R: Runtime>(launch: &Launch<'_, R>, job: &Job, tile: Tile, scale: f32) -> Result<(), LaunchError> {
    let Job { size: Size { rows, cols, depth }, form, ref args } = *job;
    let elements = [args.a.element, args.b.element, args.bias_element(), args.out.element];
    let dim = CubeDim::new_1d(tile.units() as u32);
    launch.cube(dim, tile.shared_bytes())?;
    unchecked!(tiled_kernel::launch_unchecked(
        launch.client(),
        launch.cubes(cols.div_ceil(tile.cols), rows.div_ceil(tile.rows), 1)?,
        dim,
        args.a.array(launch, 1)?,
        args.b.array(launch, 1)?,
        args.bias.as_ref().map(|bias| bias.array(launch, 1)).transpose()?.into(),
        args.out.array(launch, 1)?,
        rows as u32,
        cols as u32,
        depth as u32,
        scale,
        tile,
        form,
        elements,
    ));
    Ok(())
}

/// Four neighbours along the tile's side at place `k` of the sums, of a matrix of `side` by `depth`; zeros outside of it.
#[cube]
fn fetch<E: Numeric>(
    x: &Array<E>,
    first: usize,
    k: usize,
    side: usize,
    depth: usize,
    #[comptime] transposed: bool,
) -> Lanes {
    let mut lanes = Lanes::zeroed();
    if k < depth {
        #[unroll]
        for lane in 0..LANES {
            let i = first + lane;
            if i < side {
                let at = if comptime!(transposed) { k * side + i } else { i * depth + k };
                lanes[lane] = f32::cast_from(x[at]);
            }
        }
    }
    lanes
}

/// A tile of one operand in shared memory, and the units that fill it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Extent {
    side: usize,
    depth: usize,
    units: usize,
}

/// Fills a tile in shared memory, `[tile_depth, side]`. Neighbouring units read neighbours in memory.
#[cube]
fn fill<E: Numeric>(
    tile: &mut SharedMemory<Lanes>,
    x: &Array<E>,
    first: usize,
    k0: usize,
    side: usize,
    depth: usize,
    #[comptime] extent: Extent,
    #[comptime] transposed: bool,
) {
    let groups = comptime!(extent.side / LANES);
    let stride = comptime!(padded(extent.side));
    let tile_depth = extent.depth;
    let mut item = UNIT_POS as usize;
    while item < comptime!(groups * tile_depth) {
        let (k, group) =
            if comptime!(transposed) { (item / groups, item % groups) } else { (item % tile_depth, item / tile_depth) };
        tile[k * stride + group] = fetch::<E>(x, first + group * LANES, k0 + k, side, depth, transposed);
        item += extent.units;
    }
}

/// Grid: x = tile of columns, y = tile of rows.
#[cube(launch_unchecked)]
fn tiled_kernel<A: Numeric, B: Numeric, D: Numeric, Y: Numeric>(
    a: &Array<A>,
    b: &Array<B>,
    bias: &ComptimeOption<Array<D>>,
    out: &mut Array<Y>,
    rows: u32,
    cols: u32,
    depth: u32,
    scale: f32,
    #[comptime] tile: Tile,
    #[comptime] form: Form,
    #[define(A, B, D, Y)] _elements: [StorageType; 4],
) {
    let (rows, cols, depth) = (rows as usize, cols as usize, depth as usize);
    let units_down = comptime!(tile.rows / tile.unit_rows);
    let units_across = comptime!(tile.cols / tile.unit_cols);
    let (groups_down, groups_across) = comptime!((tile.unit_rows / LANES, tile.unit_cols / LANES));
    let (a_stride, b_stride) = comptime!((padded(tile.rows), padded(tile.cols)));
    let (unit_row, unit_col) = (UNIT_POS as usize / units_across, UNIT_POS as usize % units_across);
    let (row0, col0) = (CUBE_POS_Y as usize * tile.rows, CUBE_POS_X as usize * tile.cols);

    let a_extent = comptime!(Extent { side: tile.rows, depth: tile.depth, units: tile.units() });
    let b_extent = comptime!(Extent { side: tile.cols, ..a_extent });
    let mut a_tile = SharedMemory::<Lanes>::new(comptime!(tile.depth * a_stride));
    let mut b_tile = SharedMemory::<Lanes>::new(comptime!(tile.depth * b_stride));
    let mut sums = Array::<Lanes>::new(comptime!(tile.unit_rows * groups_across));
    #[unroll]
    for i in 0..comptime!(tile.unit_rows * groups_across) {
        sums[i] = Lanes::new(0.0);
    }
    let mut k0 = 0usize;
    while k0 < depth {
        sync_cube();
        fill::<A>(&mut a_tile, a, row0, k0, rows, depth, a_extent, form.a_transposed);
        // A row-major B is to its columns what a transposed A is to its rows.
        fill::<B>(&mut b_tile, b, col0, k0, cols, depth, b_extent, comptime!(!form.b_transposed));
        sync_cube();
        let steps = min(depth - k0, tile.depth);
        for k in 0..steps {
            let mut across = Array::<Lanes>::new(groups_across);
            #[unroll]
            for j in 0..groups_across {
                across[j] = b_tile[k * b_stride + unit_col + j * units_across];
            }
            #[unroll]
            for i in 0..groups_down {
                let down = a_tile[k * a_stride + unit_row + i * units_down];
                #[unroll]
                for lane in 0..LANES {
                    #[unroll]
                    for j in 0..groups_across {
                        let at = comptime!((i * LANES + lane) * groups_across + j);
                        sums[at] += Lanes::new(down[lane]) * across[j];
                    }
                }
            }
        }
        k0 += tile.depth;
    }
    // A row of each unit's block at a time, through shared memory: stores are coalesced, and the code of a store is repeated
    // for the rows of a block instead of for its elements.
    let mut staged = SharedMemory::<f32>::new(comptime!(tile.staged()));
    #[unroll]
    for i in 0..tile.unit_rows {
        let group = comptime!(i / LANES * units_down);
        #[unroll]
        for j in 0..tile.unit_cols {
            let col = (unit_col + comptime!(j / LANES * units_across)) * LANES + comptime!(j % LANES);
            staged[unit_row * tile.cols + col] = sums[comptime!(i * groups_across + j / LANES)][comptime!(j % LANES)];
        }
        sync_cube();
        let mut item = UNIT_POS as usize;
        while item < comptime!(tile.staged()) {
            let row = row0 + (item / tile.cols + group) * LANES + comptime!(i % LANES);
            let col = col0 + item % tile.cols;
            if row < rows && col < cols {
                store::<D, Y>(bias, out, row * cols + col, col, staged[item] * scale, form.accumulate);
            }
            item += comptime!(tile.units());
        }
        sync_cube();
    }
}

/// Writes one element.
#[cube]
pub(crate) fn store<D: Numeric, Y: Numeric>(
    bias: &ComptimeOption<Array<D>>,
    out: &mut Array<Y>,
    at: usize,
    col: usize,
    sum: f32,
    #[comptime] accumulate: bool,
) {
    #[comptime]
    let mut total = match bias {
        ComptimeOption::Some(bias) => sum + f32::cast_from(bias[col]),
        ComptimeOption::None => sum,
    };
    if comptime!(accumulate) {
        total += f32::cast_from(out[at]);
    }
    out[at] = Y::cast_from(total);
}
