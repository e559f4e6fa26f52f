//! Products of small tiles on tensor cores, with operands and sums in the registers of a plane.
//!
//! One product is `[16, 16] x [16, 8]`: halves in, f32 sums (`mma.sync.m16n8k16` and `ldmatrix` of NVIDIA's PTX ISA). With `lane` the
//! unit's place in its plane, `g = lane / 4` and `t = lane % 4`, a unit holds of
//! - the sums: rows `g` and `g + 8`, columns `2t` and `2t + 1`: two [`Pair`]s, one per row;
//! - the left operand: the same rows at columns `2t`, `2t + 1` and `2t + 8`, `2t + 9`: what two neighbouring tiles of sums hold,
//!   so that sums become a left operand without leaving the unit's registers, see [`left_from_sums()`];
//! - the right operand: column `g`, rows `2t`, `2t + 1` and `2t + 8`, `2t + 9`.
//!
//! Operands come from tiles in shared memory that are made of [`Chunk`]s, with [`stride()`] chunks from one row to the next.

#![allow(missing_docs, reason = "the cube macro writes modules and functions without documentation")]

use cubecl::{
    cmma::{MatrixIdent, MmaDefinition},
    features::{MmaConfig, Plane},
    ir::{DeviceProperties, StorageType},
    prelude::*,
};

/// Units of a plane: the layouts above are made for as many, and no device reports them with another number.
pub const PLANE: usize = 32;
/// Rows of the left operand and of the sums.
pub const ROWS: usize = 16;
/// Terms that one product adds to each sum.
pub const DEPTH: usize = 16;
/// Columns of two products side by side: what one load of a right operand is good for.
pub const COLUMNS: usize = 16;
/// Elements of a [`Chunk`].
pub const CHUNK: usize = 8;

/// Neighbours of a row, as a register holds two halves.
pub type Pair<E> = Vector<E, Const<2>>;
/// Sixteen bytes of halves: a row of the matrices that `ldmatrix` loads.
pub type Chunk<E> = Vector<E, Const<8>>;
/// Sums of tiles of 16 rows and 8 columns, side by side.
pub type Sums = Sequence<Array<Pair<f32>>>;

/// Whether the device multiplies tiles of `element` as this module describes; such devices are of NVIDIA's, from compute capability 8.0
/// on, and `element` is a half-precision type.
pub fn is_supported<R: Runtime>(client: &ComputeClient<R>, element: StorageType) -> bool {
    let sums = f32::as_type_native_unchecked().storage_type();
    let config = MmaConfig { a_type: element, b_type: element, cd_type: sums, m: ROWS as u32, n: 8, k: DEPTH as u32 };
    let properties = client.properties();
    let matmul = &properties.features.matmul;
    matmul.mma.contains(&config) && matmul.ldmatrix.contains(&element) && has_planes(properties)
}

/// Whether planes are of [`PLANE`] units, which can pass on what they hold.
pub fn has_planes(properties: &DeviceProperties) -> bool {
    let (hardware, plane) = (&properties.hardware, PLANE as u32);
    properties.features.plane.contains(Plane::Ops)
        && (hardware.plane_size_min, hardware.plane_size_max) == (plane, plane)
}

/// Chunks from one row of a tile to the next, where rows have `columns` elements, a multiple of 16: one more than a row has, so
/// that the eight chunks of a column that are loaded at once lie in different banks.
pub const fn stride(columns: usize) -> usize {
    columns / CHUNK + 1
}

/// This unit's row in the upper half of the sums, and its first column: `g` and `2t` above.
#[cube]
pub fn place() -> (usize, usize) {
    let lane = UNIT_POS_PLANE as usize;
    (lane / 4, lane % 4 * 2)
}

/// Sums of `count` tiles, all 0.
#[cube]
pub fn zeros(#[comptime] count: usize) -> Sums {
    let mut sums = Sequence::<Array<Pair<f32>>>::new();
    #[unroll]
    for _ in 0..count {
        let mut tile = Array::<Pair<f32>>::new(2usize);
        tile[0] = Pair::<f32>::new(0.0);
        tile[1] = Pair::<f32>::new(0.0);
        sums.push(tile);
    }
    sums
}

/// The left operand of 16 rows from `row` and 16 columns from `chunk` on.
#[cube]
pub fn left<E: Float>(
    tile: &SharedMemory<Chunk<E>>,
    row: usize,
    chunk: usize,
    #[comptime] stride: usize,
) -> Array<Pair<E>> {
    let lane = UNIT_POS_PLANE as usize;
    let at = (row + lane % 16) * stride + chunk + lane / 16;
    let product = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    product.load_matrix::<Chunk<E>, Const<2>>(&tile.slice(at, at + 1), MatrixIdent::A, 4usize, false)
}

/// The left operand that is the transpose of 16 rows from `row` and 16 columns from `chunk` on.
#[cube]
pub fn left_transposed<E: Float>(
    tile: &SharedMemory<Chunk<E>>,
    row: usize,
    chunk: usize,
    #[comptime] stride: usize,
) -> Array<Pair<E>> {
    let lane = UNIT_POS_PLANE as usize;
    let at = (row + lane % 8 + lane / 16 * 8) * stride + chunk + lane / 8 % 2;
    let product = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    product.load_matrix::<Chunk<E>, Const<2>>(&tile.slice(at, at + 1), MatrixIdent::A, 4usize, true)
}

/// The left operand made of the sums of two tiles side by side, rounded to `E`.
#[cube]
pub fn left_from_sums<E: Float>(first: &Array<Pair<f32>>, second: &Array<Pair<f32>>) -> Array<Pair<E>> {
    let mut operand = Array::<Pair<E>>::new(4usize);
    operand[0] = Pair::cast_from(first[0]);
    operand[1] = Pair::cast_from(first[1]);
    operand[2] = Pair::cast_from(second[0]);
    operand[3] = Pair::cast_from(second[1]);
    operand
}

/// Right operands of two products side by side.
#[derive(CubeType)]
pub struct Right<E: Float> {
    pub first: Array<Pair<E>>,
    pub second: Array<Pair<E>>,
}

#[cube]
fn right_of<E: Float>(registers: &Array<Pair<E>>) -> Right<E> {
    let mut first = Array::<Pair<E>>::new(2usize);
    let mut second = Array::<Pair<E>>::new(2usize);
    first[0] = registers[0];
    first[1] = registers[1];
    second[0] = registers[2];
    second[1] = registers[3];
    Right::<E> { first, second }
}

/// The right operands that are the 16 rows from `row` and 16 columns from `chunk` on.
#[cube]
pub fn right<E: Float>(tile: &SharedMemory<Chunk<E>>, row: usize, chunk: usize, #[comptime] stride: usize) -> Right<E> {
    let lane = UNIT_POS_PLANE as usize;
    let at = (row + lane % 16) * stride + chunk + lane / 16;
    let product = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let registers = product.load_matrix::<Chunk<E>, Const<2>>(&tile.slice(at, at + 1), MatrixIdent::B, 4usize, true);
    right_of::<E>(&registers)
}

/// The right operands that are the transpose of 16 rows from `row` and 16 columns from `chunk` on.
#[cube]
pub fn right_transposed<E: Float>(
    tile: &SharedMemory<Chunk<E>>,
    row: usize,
    chunk: usize,
    #[comptime] stride: usize,
) -> Right<E> {
    let lane = UNIT_POS_PLANE as usize;
    let at = (row + lane % 8 + lane / 16 * 8) * stride + chunk + lane / 8 % 2;
    let product = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let registers = product.load_matrix::<Chunk<E>, Const<2>>(&tile.slice(at, at + 1), MatrixIdent::B, 4usize, false);
    right_of::<E>(&registers)
}

/// `sums += left * right`. Every unit of the plane calls it.
#[cube]
pub fn multiply_add<E: Float>(left: &Array<Pair<E>>, right: &Array<Pair<E>>, sums: &mut Array<Pair<f32>>) {
    let product = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    product.execute_inplace(left, right, sums);
}

/// Sum over the four units that share the rows of a tile of sums, in one order on all four.
#[cube]
pub fn row_sum(value: f32) -> f32 {
    let pair = value + plane_shuffle_xor(value, 1u32);
    pair + plane_shuffle_xor(pair, 2u32)
}

/// Greatest over the four units that share the rows of a tile of sums.
#[cube]
pub fn row_max(value: f32) -> f32 {
    let pair = max(value, plane_shuffle_xor(value, 1u32));
    max(pair, plane_shuffle_xor(pair, 2u32))
}
