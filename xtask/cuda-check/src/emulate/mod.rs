//! A card that is the host: kernels go through CubeCL's CUDA code generator, and a C++ compiler of the host takes the CUDA C++.
//!
//! It shows that the generated code computes what it should: indices, layouts of tensor cores' operands, barriers. It does not show
//! what only a card can: the rounding inside of its products, time, and the races that the order in which units run here hides.

mod host;
mod ptx;
mod server;
mod tests;
