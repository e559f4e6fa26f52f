//! The product of two half-precision matrices on tensor cores.
//!
//! Work: a cube makes a tile of `out`, a plane a block of it, its sums in registers. While the planes multiply what is in one half of
//! shared memory, the units have the loads of the next terms under way, and put them into the other half. Traffic: as the portable
//! kernel, in loads of 16 bytes. Numerics: products of halves are exact; sums in f32; rounded once.

use cubecl::{ir::StorageType, prelude::*};
use unsloth_common::{
    Launch, LaunchError,
    mma::{self, Chunk, Pair, Sums},
};

use crate::product::{Args, Form, Matrix, Size, store};

/// How the work of a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Tile {
    /// Rows of `out` that a cube makes.
    rows: usize,
    /// Columns of `out` that a cube makes.
    cols: usize,
    /// Terms of the sums that are in one half of shared memory.
    depth: usize,
    /// Rows of the block that a plane makes.
    plane_rows: usize,
    /// Columns of the block that a plane makes.
    plane_cols: usize,
}

/// The larger tile uses each number that it loads more often, the smaller one leaves more cubes.
const TILES: [Tile; 2] = [
    Tile { rows: 128, cols: 128, depth: 32, plane_rows: 64, plane_cols: 32 },
    Tile { rows: 64, cols: 64, depth: 32, plane_rows: 32, plane_cols: 32 },
];

impl Tile {
    /// The first tile whose cubes are enough for the device, else the last; of those that fit it.
    fn for_device<R: Runtime>(client: &ComputeClient<R>, size: Size, form: Form) -> Option<Self> {
        let hardware = &client.properties().hardware;
        let fits = |tile: &Self| {
            tile.units() <= hardware.max_units_per_cube as usize
                && tile.shared_bytes(form) <= hardware.max_shared_memory_size
        };
        let enough = hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
        let cubes = |tile: &Self| size.rows.div_ceil(tile.rows) * size.cols.div_ceil(tile.cols);
        let fitting = || TILES.into_iter().filter(fits);
        fitting().find(|tile| cubes(tile) >= enough).or_else(|| fitting().next_back())
    }

    fn units(&self) -> usize {
        self.rows / self.plane_rows * (self.cols / self.plane_cols) * mma::PLANE
    }

    fn shared_bytes(&self, form: Form) -> usize {
        2 * (self.left(form).len() + self.right(form).len()) * mma::CHUNK * 2
    }

    /// The tile of `A`, as it lies in memory.
    fn left(&self, form: Form) -> Extent {
        Extent::new(self, (self.rows, self.depth), form.a_transposed)
    }

    /// The tile of `B`, as it lies in memory.
    fn right(&self, form: Form) -> Extent {
        Extent::new(self, (self.depth, self.cols), form.b_transposed)
    }
}

/// A tile of one operand in shared memory, and the units that fill it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Extent {
    lines: usize,
    /// Chunks of a line.
    chunks: usize,
    units: usize,
}

impl Extent {
    fn new(tile: &Tile, (rows, cols): (usize, usize), transposed: bool) -> Self {
        let (lines, len) = if transposed { (cols, rows) } else { (rows, cols) };
        Self { lines, chunks: len / mma::CHUNK, units: tile.units() }
    }

    /// Chunks from one line to the next.
    fn stride(&self) -> usize {
        mma::stride(self.chunks * mma::CHUNK)
    }

    /// Chunks of the tile.
    fn len(&self) -> usize {
        self.lines * self.stride()
    }

    /// Chunks that a unit loads.
    fn per_unit(&self) -> usize {
        self.lines * self.chunks / self.units
    }
}

/// Arguments of a product on tensor cores.
pub(crate) struct Operands<R: Runtime> {
    /// `[rows, depth]`, or transposed, in chunks.
    pub(crate) a: ArrayArg<R>,
    /// `[depth, cols]`, or transposed, in chunks.
    pub(crate) b: ArrayArg<R>,
    /// Type of both.
    pub(crate) element: StorageType,
    /// `[cols]`, added to every row.
    pub(crate) bias: Option<Matrix<R>>,
    /// `[rows, cols]`, written.
    pub(crate) out: Matrix<R>,
    /// Factor of the sums.
    pub(crate) scale: f32,
}

impl<R: Runtime> Operands<R> {
    /// The operands, where tensor cores can take them: both of one half-precision type, in lines of whole chunks. Else the arguments
    /// as they were.
    pub(crate) fn new(size: Size, form: Form, args: Args<R>) -> Result<Self, Box<Args<R>>> {
        let a_line = if form.a_transposed { size.rows } else { size.depth };
        let b_line = if form.b_transposed { size.depth } else { size.cols };
        let in_chunks = a_line.is_multiple_of(mma::CHUNK) && b_line.is_multiple_of(mma::CHUNK);
        let element = args.a.element;
        let Args { a, b, bias, out, scale } = args;
        match (a.chunks, b.chunks) {
            (Some(a), Some(b_chunks)) if in_chunks && element == b.element => {
                Ok(Self { a, b: b_chunks, element, bias, out, scale })
            }
            (a_chunks, b_chunks) => {
                let (a, b) = (Matrix { chunks: a_chunks, ..a }, Matrix { chunks: b_chunks, ..b });
                Err(Box::new(Args { a, b, bias, out, scale }))
            }
        }
    }
}

/// Launches a product.
///
/// # Errors
/// [`LaunchError::Limit`] if the grid exceeds the device's.
pub(crate) fn product<R: Runtime>(
    launch: &Launch<'_, R>,
    size: Size,
    form: Form,
    args: Operands<R>,
) -> Result<(), LaunchError> {
    let Size { rows, cols, depth } = size;
    let tile = Tile::for_device(launch.client(), size, form).unwrap_or(TILES[1]);
    let dim = CubeDim::new_1d(tile.units() as u32);
    launch.cube(dim, tile.shared_bytes(form))?;
    let bias_element = args.bias.as_ref().map_or(args.out.element, |bias| bias.element);
    let elements = [args.element, bias_element, args.out.element];
    tensor_kernel::launch(
        launch.client(),
        launch.cubes(cols.div_ceil(tile.cols), rows.div_ceil(tile.rows), 1)?,
        dim,
        args.a,
        args.b,
        args.bias.map(|bias| bias.array).into(),
        args.out.array,
        rows as u32,
        cols as u32,
        depth as u32,
        args.scale,
        tile,
        form,
        elements,
    );
    Ok(())
}

/// Grid: x = tile of columns, y = tile of rows.
#[cube(launch)]
fn tensor_kernel<E: Float, D: Numeric, Y: Numeric>(
    a: &Array<Chunk<E>>,
    b: &Array<Chunk<E>>,
    bias: &ComptimeOption<Array<D>>,
    out: &mut Array<Y>,
    rows: u32,
    cols: u32,
    depth: u32,
    scale: f32,
    #[comptime] tile: Tile,
    #[comptime] form: Form,
    #[define(E, D, Y)] _elements: [StorageType; 3],
) {
    let (rows, cols, depth) = (rows as usize, cols as usize, depth as usize);
    let (row0, col0) = (CUBE_POS_Y as usize * tile.rows, CUBE_POS_X as usize * tile.cols);
    let (left, right) = comptime!((tile.left(form), tile.right(form)));
    let mut a_tile = SharedMemory::<Chunk<E>>::new(comptime!(2 * left.len()));
    let mut b_tile = SharedMemory::<Chunk<E>>::new(comptime!(2 * right.len()));
    let mut sums = mma::zeros(comptime!(tile.plane_rows / mma::ROWS * (tile.plane_cols / 8)));
    let a_held = fetch::<E>(a, (row0, 0usize.runtime()), (rows, depth), left, form.a_transposed);
    let b_held = fetch::<E>(b, (0usize.runtime(), col0), (depth, cols), right, form.b_transposed);
    put::<E>(&mut a_tile, 0usize.runtime(), &a_held, left);
    put::<E>(&mut b_tile, 0usize.runtime(), &b_held, right);
    let mut half = 0usize.runtime();
    let mut k0 = 0usize.runtime();
    while k0 < depth {
        sync_cube();
        let next = k0 + tile.depth;
        // Beyond the last terms these are zeros, which nothing reads.
        let a_held = fetch::<E>(a, (row0, next), (rows, depth), left, form.a_transposed);
        let b_held = fetch::<E>(b, (next, col0), (depth, cols), right, form.b_transposed);
        multiply::<E>(&mut sums, &a_tile, &b_tile, half, tile, form);
        half = 1 - half;
        put::<E>(&mut a_tile, half * comptime!(left.len()), &a_held, left);
        put::<E>(&mut b_tile, half * comptime!(right.len()), &b_held, right);
        k0 = next;
    }
    let (plane_row, plane_col) = block(tile);
    let (upper, column) = mma::place();
    let tiles_across = comptime!(tile.plane_cols / 8);
    #[unroll]
    for i in 0..comptime!(tile.plane_rows / 8) {
        let row = row0 + plane_row + comptime!(8 * i) + upper;
        #[unroll]
        for j in 0..tiles_across {
            let pair = sums.index(comptime!(i / 2 * tiles_across + j))[comptime!(i % 2)];
            #[unroll]
            for e in 0..2usize {
                let col = col0 + plane_col + comptime!(8 * j + e) + column;
                if row < rows && col < cols {
                    store::<D, Y>(bias, out, row * cols + col, col, pair[e] * scale, form.accumulate);
                }
            }
        }
    }
}

/// First row and column of the block of this unit's plane.
#[cube]
fn block(#[comptime] tile: Tile) -> (usize, usize) {
    let plane = UNIT_POS as usize / mma::PLANE;
    let across = comptime!(tile.cols / tile.plane_cols);
    (plane / across * tile.plane_rows, plane % across * tile.plane_cols)
}

/// What this unit loads of the tile that starts at `from`, row and column, of a matrix of `size`; zeros beyond it.
#[cube]
fn fetch<E: Float>(
    matrix: &Array<Chunk<E>>,
    from: (usize, usize),
    size: (usize, usize),
    #[comptime] extent: Extent,
    #[comptime] transposed: bool,
) -> Array<Chunk<E>> {
    let (line0, at0, lines, len) =
        if comptime!(transposed) { (from.1, from.0, size.1, size.0) } else { (from.0, from.1, size.0, size.1) };
    let (chunk0, chunks) = (at0 / mma::CHUNK, len / mma::CHUNK);
    let mut held = Array::<Chunk<E>>::new(extent.per_unit());
    #[unroll]
    for i in 0..extent.per_unit() {
        let item = UNIT_POS as usize + comptime!(i * extent.units);
        let (line, chunk) = (line0 + item / extent.chunks, chunk0 + item % extent.chunks);
        let mut value = Chunk::<E>::new(E::new(0.0));
        if line < lines && chunk < chunks {
            value = matrix[line * chunks + chunk];
        }
        held[i] = value;
    }
    held
}

/// Puts what [`fetch`] loaded into the tile that starts at `at`.
#[cube]
fn put<E: Float>(tile: &mut SharedMemory<Chunk<E>>, at: usize, held: &Array<Chunk<E>>, #[comptime] extent: Extent) {
    #[unroll]
    for i in 0..extent.per_unit() {
        let item = UNIT_POS as usize + comptime!(i * extent.units);
        tile[at + item / extent.chunks * extent.stride() + item % extent.chunks] = held[i];
    }
}

/// Adds the products of one half of shared memory to the sums of this unit's plane.
#[cube]
fn multiply<E: Float>(
    sums: &mut Sums,
    a_tile: &SharedMemory<Chunk<E>>,
    b_tile: &SharedMemory<Chunk<E>>,
    half: usize,
    #[comptime] tile: Tile,
    #[comptime] form: Form,
) {
    let (row, col) = block(tile);
    let (a_stride, b_stride) = comptime!((tile.left(form).stride(), tile.right(form).stride()));
    let (a_lines, b_lines) = comptime!((tile.left(form).lines, tile.right(form).lines));
    let tiles_across = comptime!(tile.plane_cols / 8);
    #[unroll]
    for k in 0..comptime!(tile.depth / mma::DEPTH) {
        let mut across = Sequence::<Array<Pair<E>>>::new();
        #[unroll]
        for j in 0..comptime!(tile.plane_cols / mma::COLUMNS) {
            let column = col + comptime!(j * mma::COLUMNS);
            let right = if comptime!(form.b_transposed) {
                mma::right_transposed::<E>(b_tile, half * b_lines + column, comptime!(2 * k), b_stride)
            } else {
                mma::right::<E>(b_tile, half * b_lines + comptime!(k * mma::DEPTH), column / mma::CHUNK, b_stride)
            };
            across.push(right.first);
            across.push(right.second);
        }
        #[unroll]
        for i in 0..comptime!(tile.plane_rows / mma::ROWS) {
            let line = row + comptime!(i * mma::ROWS);
            let left = if comptime!(form.a_transposed) {
                mma::left_transposed::<E>(
                    a_tile,
                    half * a_lines + comptime!(k * mma::DEPTH),
                    line / mma::CHUNK,
                    a_stride,
                )
            } else {
                mma::left::<E>(a_tile, half * a_lines + line, comptime!(2 * k), a_stride)
            };
            #[unroll]
            for j in 0..tiles_across {
                let tile_of_sums = sums.index_mut(comptime!(i * tiles_across + j));
                mma::multiply_add::<E>(&left, across.index(j), tile_of_sums);
            }
        }
    }
}
