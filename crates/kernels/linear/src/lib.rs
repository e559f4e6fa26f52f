//! Dense matrix products in CubeCL, generic over the runtime and the element types. All arrays are contiguous, row-major.

mod few_rows;
pub mod linear;
pub mod product;
