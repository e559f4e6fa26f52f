//! The product of two half-precision matrices on tensor cores, or of one of bf16 and one of f32.
//!
//! Work: a cube makes a tile of `out`, a plane a block of it, its sums in registers; in narrow tiles several planes share a block, each with
//! a part of the terms. While the planes multiply what is in one half of shared memory, the units put what they have loaded into the
//! other half, and have the loads of the terms behind that under way: a load has a whole step of the loop to arrive. Traffic: as the
//! portable kernel, in loads of 16 bytes. Numerics: products of halves are exact; sums in f32; rounded once.
//!
//! A number of f32 is the sum of three of bf16: the nearest one, the nearest to what is left, and to what is left then. So is its product
//! with another of bf16, and the parts are multiplied one after another. f16 has too few exponents for that.

use cubecl::{
    ir::{ElemType, FloatKind, StorageType},
    prelude::*,
};
use unsloth_common::{
    Launch, LaunchError,
    mma::{self, Chunk, Pair, Sums},
    unchecked,
};

use crate::{
    planes::{block, clear, part, write},
    product::{self, Form, Job},
};

/// How the work of a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    /// Rows of `out` that a cube makes.
    pub(crate) rows: usize,
    /// Columns of `out` that a cube makes.
    pub(crate) cols: usize,
    /// Terms of the sums that are in one half of shared memory.
    depth: usize,
    /// Rows of the block that a plane makes.
    pub(crate) plane_rows: usize,
    /// Columns of the block that a plane makes.
    pub(crate) plane_cols: usize,
    /// Planes that share a block, each with a part of the terms.
    pub(crate) splits: usize,
}

/// Shared memory of a cube, at most: most tiles leave room for several cubes on a multiprocessor.
const SHARED_BYTES: usize = 79 * 1024;

impl Tile {
    /// The larger a tile, the more often it uses each number that it loads; the smaller ones leave more cubes. The third takes the place
    /// of the second where operands are in parts, for which a unit of that has too few registers. The last two are for matrices as
    /// narrow as an adapter's, which have few tiles and long sums: the very last for sums over the rows of a batch alone.
    pub(crate) const ALL: [Self; 5] = [
        Self { rows: 128, cols: 128, depth: 32, plane_rows: 64, plane_cols: 32, splits: 1 },
        Self { rows: 64, cols: 64, depth: 32, plane_rows: 32, plane_cols: 32, splits: 1 },
        Self { rows: 64, cols: 64, depth: 32, plane_rows: 32, plane_cols: 16, splits: 1 },
        Self { rows: 64, cols: 16, depth: 128, plane_rows: 32, plane_cols: 16, splits: 4 },
        Self { rows: 16, cols: 64, depth: 128, plane_rows: 16, plane_cols: 32, splits: 4 },
    ];

    /// The first square tile whose cubes are enough for the device, else a narrow one, if the sums are long; of those that fit.
    pub(crate) fn for_device(client: &ComputeClient<impl Runtime>, job: &Job, operands: Operands) -> Self {
        let size = job.size;
        let enough = client.properties().hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
        let cubes = |tile: &Self| size.rows.div_ceil(tile.rows) * size.cols.div_ceil(tile.cols);
        let [large, small, in_parts, columns, rows] = Self::ALL;
        let small = if operands.parts.are_whole() { small } else { in_parts };
        let narrow = if size.rows < size.cols && job.form.a_transposed { rows } else { columns };
        let fits = |tile: &Self| Self::fitting(client, job, operands).any(|fitting| fitting == *tile);
        let is_enough = |tile: &Self| fits(tile) && cubes(tile) >= enough;
        let of_long_sums = Some(narrow).filter(|tile| fits(tile) && size.depth >= 2 * tile.depth);
        [large, small].into_iter().find(is_enough).or(of_long_sums).unwrap_or(small)
    }

    /// Tiles that the device has room for.
    pub(crate) fn fitting(
        client: &ComputeClient<impl Runtime>,
        job: &Job,
        operands: Operands,
    ) -> impl Iterator<Item = Self> {
        let hardware = &client.properties().hardware;
        let most = (hardware.max_units_per_cube as usize, hardware.max_shared_memory_size.min(SHARED_BYTES));
        let (form, parts) = (job.form, operands.parts);
        let takes = move |tile: &Self| {
            let [.., in_parts, columns, rows] = Self::ALL;
            let has_parts =
                if parts.are_whole() { *tile != in_parts } else { [in_parts, columns, rows].contains(tile) };
            has_parts && (*tile != rows || form.a_transposed)
        };
        let fits = move |tile: &Self| tile.units() <= most.0 && tile.shared_bytes(form, parts) <= most.1;
        Self::ALL.into_iter().filter(move |tile| takes(tile) && fits(tile))
    }

    /// As `tensor 128x128`.
    pub(crate) fn name(&self) -> String {
        format!("tensor {}x{}", self.rows, self.cols)
    }

    fn units(&self) -> usize {
        self.blocks() * self.splits * mma::PLANE
    }

    /// Blocks of planes.
    fn blocks(&self) -> usize {
        self.rows / self.plane_rows * (self.cols / self.plane_cols)
    }

    /// Products side by side in a block.
    pub(crate) fn tiles_of_sums(&self) -> usize {
        self.plane_rows / mma::ROWS * (self.plane_cols / 8)
    }

    /// Pairs of sums that planes pass on to the first one of their block.
    pub(crate) fn passed(&self) -> usize {
        if self.splits > 1 { self.blocks() * self.tiles_of_sums() * 2 * mma::PLANE } else { 0 }
    }

    fn shared_bytes(&self, form: Form, parts: Parts) -> usize {
        let chunks = 2 * (parts.a * self.left(form).len() + parts.b * self.right(form).len());
        chunks * mma::CHUNK * 2 + self.passed() * 2 * size_of::<f32>()
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

/// Numbers of the operands' type that each number of a matrix is the sum of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Parts {
    a: usize,
    b: usize,
}

impl Parts {
    fn are_whole(self) -> bool {
        self.a * self.b == 1
    }
}

/// Parts of a number of f32.
const PARTS_OF_F32: usize = 3;

/// Terms of products in parts that are added before their sums go to f32 in memory. Tensor cores cut off what does not fit into a sum instead
/// of rounding it: always towards zero, so that the gradient behind a vocabulary of 128256 was too small by 2.4e-4 on an H100.
const TERMS: usize = 4096;

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

/// Operands that tensor cores take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    /// The type that is multiplied.
    element: StorageType,
    parts: Parts,
}

impl Operands {
    /// Those of a job, where tensor cores can take them: both of one half-precision type, or one of bf16 and one of f32, in lines of
    /// whole chunks.
    pub(crate) fn of(client: &ComputeClient<impl Runtime>, job: &Job) -> Option<Self> {
        let Job { size, form, ref args } = *job;
        let a_line = if form.a_transposed { size.rows } else { size.depth };
        let b_line = if form.b_transposed { size.depth } else { size.cols };
        let in_chunks = a_line.is_multiple_of(mma::CHUNK) && b_line.is_multiple_of(mma::CHUNK);
        let element = multiplied([args.a.element, args.b.element]).filter(|_| in_chunks)?;
        let parts = |stored: StorageType| if stored == element { 1 } else { PARTS_OF_F32 };
        let parts = Parts { a: parts(args.a.element), b: parts(args.b.element) };
        mma::is_supported(client, element).then_some(Self { element, parts })
    }
}

/// What tensor cores multiply matrices of two types as, if they do.
fn multiplied([a, b]: [StorageType; 2]) -> Option<StorageType> {
    let (f32, bf16) = (float(FloatKind::F32), float(FloatKind::BF16));
    match [a, b] {
        _ if a == b => (a != f32).then_some(a),
        both if both == [f32, bf16] || both == [bf16, f32] => Some(bf16),
        _ => None,
    }
}

fn float(kind: FloatKind) -> StorageType {
    ElemType::Float(kind).into()
}

/// Launches a product, `scale` in place of the arguments'.
///
/// # Errors
/// [`LaunchError::Limit`] if the grid exceeds the device's.
pub(crate) fn product<R: Runtime>(
    launch: &Launch<'_, R>,
    job: &Job,
    (operands, tile): (Operands, Tile),
    scale: f32,
) -> Result<(), LaunchError> {
    let Job { size: product::Size { rows, cols, depth }, form, ref args } = *job;
    let Operands { element, parts } = operands;
    let dim = CubeDim::new_1d(tile.units() as u32);
    launch.cube(dim, tile.shared_bytes(form, parts))?;
    // Neighbours that a unit has the sums of.
    let width = if cols.is_multiple_of(2) { 2 } else { 1 };
    let elements = [args.a.element, args.b.element, element, args.bias_element(), args.out.element];
    unchecked!(tensor_kernel::launch_unchecked(
        launch.client(),
        launch.cubes(cols.div_ceil(tile.cols), rows.div_ceil(tile.rows), 1)?,
        dim,
        width,
        args.a.array(launch, mma::CHUNK)?,
        args.b.array(launch, mma::CHUNK)?,
        args.bias.as_ref().map(|bias| bias.array(launch, 1)).transpose()?.into(),
        args.out.array(launch, width)?,
        rows as u32,
        cols as u32,
        depth as u32,
        scale,
        tile,
        form,
        parts,
        !parts.are_whole() && args.out.element == float(FloatKind::F32) && depth > TERMS,
        elements,
    ));
    Ok(())
}

/// Grid: x = tile of columns, y = tile of rows.
#[cube(launch_unchecked)]
fn tensor_kernel<A: Float, B: Float, E: Float, D: Numeric, Y: Numeric, N: Size>(
    a: &Array<Chunk<A>>,
    b: &Array<Chunk<B>>,
    bias: &ComptimeOption<Array<D>>,
    out: &mut Array<Vector<Y, N>>,
    rows: u32,
    cols: u32,
    depth: u32,
    scale: f32,
    #[comptime] tile: Tile,
    #[comptime] form: Form,
    #[comptime] parts: Parts,
    #[comptime] sliced: bool,
    #[define(A, B, E, D, Y)] _elements: [StorageType; 5],
) {
    let (rows, cols, depth) = (rows as usize, cols as usize, depth as usize);
    let (row0, col0) = (CUBE_POS_Y as usize * tile.rows, CUBE_POS_X as usize * tile.cols);
    let (left, right) = comptime!((tile.left(form), tile.right(form)));
    let mut a_tile = SharedMemory::<Chunk<E>>::new(comptime!(2 * parts.a * left.len()));
    let mut b_tile = SharedMemory::<Chunk<E>>::new(comptime!(2 * parts.b * right.len()));
    let mut sums = mma::zeros(comptime!(tile.tiles_of_sums()));
    let mut a_held = Array::<Chunk<A>>::new(left.per_unit());
    let mut b_held = Array::<Chunk<B>>::new(right.per_unit());
    let mut half = 0usize.runtime();
    let mut k0 = 0usize.runtime();
    fetch::<A>(&mut a_held, a, (row0, k0), (rows, depth), left, form.a_transposed);
    fetch::<B>(&mut b_held, b, (k0, col0), (depth, cols), right, form.b_transposed);
    put::<A, E>(&mut a_tile, half, &a_held, left, parts.a);
    put::<B, E>(&mut b_tile, half, &b_held, right, parts.b);
    fetch::<A>(&mut a_held, a, (row0, k0 + tile.depth), (rows, depth), left, form.a_transposed);
    fetch::<B>(&mut b_held, b, (k0 + tile.depth, col0), (depth, cols), right, form.b_transposed);
    while k0 < depth {
        sync_cube();
        // Beyond the last terms these are zeros, which nothing reads.
        put::<A, E>(&mut a_tile, 1 - half, &a_held, left, parts.a);
        put::<B, E>(&mut b_tile, 1 - half, &b_held, right, parts.b);
        let behind = k0 + comptime!(2 * tile.depth);
        fetch::<A>(&mut a_held, a, (row0, behind), (rows, depth), left, form.a_transposed);
        fetch::<B>(&mut b_held, b, (behind, col0), (depth, cols), right, form.b_transposed);
        multiply::<E>(&mut sums, &a_tile, &b_tile, half, tile, form, parts);
        half = 1 - half;
        k0 += tile.depth;
        if comptime!(sliced) {
            let to = ((row0, col0), (rows, cols));
            write_slice::<D, Y, N>(&mut sums, bias, out, to, (k0, depth), scale, form, tile);
        }
    }
    if comptime!(!sliced) {
        write::<D, Y, N>(&mut sums, bias, out, (row0, col0), (rows, cols), (scale, false), form, tile);
    }
}

/// Behind each [`TERMS`] and the last of them, with `terms.0` of `terms.1` behind it: puts the sums into memory and begins anew. `to`: as the
/// place and size of [`write`].
#[cube]
fn write_slice<D: Numeric, Y: Numeric, N: Size>(
    sums: &mut Sums,
    bias: &ComptimeOption<Array<D>>,
    out: &mut Array<Vector<Y, N>>,
    to: ((usize, usize), (usize, usize)),
    terms: (usize, usize),
    scale: f32,
    #[comptime] form: Form,
    #[comptime] tile: Tile,
) {
    if terms.0 / TERMS * TERMS == terms.0 || terms.0 >= terms.1 {
        write::<D, Y, N>(sums, bias, out, to.0, to.1, (scale, terms.0 > TERMS), form, tile);
        clear(sums, tile);
    }
}

/// What this unit loads of the tile that starts at `from`, row and column, of a matrix of `size`; zeros beyond it.
#[cube]
fn fetch<E: Float>(
    held: &mut Array<Chunk<E>>,
    matrix: &Array<Chunk<E>>,
    from: (usize, usize),
    size: (usize, usize),
    #[comptime] extent: Extent,
    #[comptime] transposed: bool,
) {
    let (line0, at0, lines, len) =
        if comptime!(transposed) { (from.1, from.0, size.1, size.0) } else { (from.0, from.1, size.0, size.1) };
    let (chunk0, chunks) = (at0 / mma::CHUNK, len / mma::CHUNK);
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
}

/// Puts what [`fetch`] loaded into one half of shared memory, a tile for each part.
#[cube]
fn put<S: Float, E: Float>(
    tiles: &mut SharedMemory<Chunk<E>>,
    half: usize,
    held: &Array<Chunk<S>>,
    #[comptime] extent: Extent,
    #[comptime] parts: usize,
) {
    #[unroll]
    for i in 0..extent.per_unit() {
        let item = UNIT_POS as usize + comptime!(i * extent.units);
        let at = half * comptime!(parts * extent.len()) + item / extent.chunks * extent.stride() + item % extent.chunks;
        if comptime!(parts == 1) {
            tiles[at] = Chunk::cast_from(held[i]);
        } else {
            let mut rest = Chunk::<f32>::cast_from(held[i]);
            #[unroll]
            for part in 0..parts {
                let nearest = Chunk::<E>::cast_from(rest);
                tiles[at + comptime!(part * extent.len())] = nearest;
                rest -= Chunk::<f32>::cast_from(nearest);
            }
        }
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
    #[comptime] parts: Parts,
) {
    let (row, col) = block(tile);
    let (left, right) = comptime!((tile.left(form), tile.right(form)));
    let steps = comptime!(tile.depth / mma::DEPTH / tile.splits);
    #[unroll]
    for i in 0..steps {
        let k = if comptime!(tile.splits > 1) { part(tile) * steps + i } else { i.runtime() };
        #[unroll]
        for part in 0..parts.b {
            let b_line = (half * parts.b + part) * right.lines;
            let mut across = Sequence::<Array<Pair<E>>>::new();
            #[unroll]
            for j in 0..comptime!(tile.plane_cols / mma::COLUMNS) {
                let column = col + comptime!(j * mma::COLUMNS);
                let operand = if comptime!(form.b_transposed) {
                    mma::right_transposed::<E>(b_tile, b_line + column, 2 * k, comptime!(right.stride()))
                } else {
                    let line = b_line + k * mma::DEPTH;
                    mma::right::<E>(b_tile, line, column / mma::CHUNK, comptime!(right.stride()))
                };
                across.push(operand.first);
                across.push(operand.second);
            }
            #[unroll]
            for part in 0..parts.a {
                let a_line = (half * parts.a + part) * left.lines;
                multiply_rows::<E>(sums, a_tile, &across, (a_line, row), k, tile, form);
            }
        }
    }
}

/// Adds the products of the left operands at step `k`, whose tile starts at line `from.0` and whose rows at `from.1`, with those across.
#[cube]
fn multiply_rows<E: Float>(
    sums: &mut Sums,
    a_tile: &SharedMemory<Chunk<E>>,
    across: &Sequence<Array<Pair<E>>>,
    from: (usize, usize),
    k: usize,
    #[comptime] tile: Tile,
    #[comptime] form: Form,
) {
    let stride = comptime!(tile.left(form).stride());
    let tiles_across = comptime!(tile.plane_cols / 8);
    #[unroll]
    for i in 0..comptime!(tile.plane_rows / mma::ROWS) {
        let row = from.1 + comptime!(i * mma::ROWS);
        let left = if comptime!(form.a_transposed) {
            mma::left_transposed::<E>(a_tile, from.0 + k * mma::DEPTH, row / mma::CHUNK, stride)
        } else {
            mma::left::<E>(a_tile, from.0 + row, 2 * k, stride)
        };
        #[unroll]
        for j in 0..tiles_across {
            let tile_of_sums = sums.index_mut(comptime!(i * tiles_across + j));
            mma::multiply_add::<E>(&left, across.index(j), tile_of_sums);
        }
    }
}
