//! The CubeCL backend: one implementation of the operator contract for every runtime that CubeCL has.
//!
//! [`CubeBackend`] is generic over the runtime; feature `wgpu` adds Vulkan and Metal devices, feature `cuda` NVIDIA devices.
//! CubeCL reports a kernel that failed as a success, so this crate checks limits before each launch and watches the device's
//! thread for panics: see [`backend`](CubeBackend).

mod access;
mod adafactor;
mod adamw;
mod adamw8bit;
mod attention;
mod backend;
mod choices;
mod copies;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod dora;
mod elementwise;
mod embedding;
mod glu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod info;
mod layer_norm;
mod linear;
mod linear_cross_entropy;
mod lion;
mod lora_linear;
mod muon;
mod poison;
mod pools;
mod queue;
mod reduce;
mod rms_norm;
mod rope;
mod sgd;
mod stochastic_rounding;
#[cfg(feature = "wgpu")]
mod vulkan;

pub use backend::{CubeBackend, CubeOptions};
pub use choices::{Card, Choosing};
#[cfg(feature = "cuda")]
pub use cuda::cuda;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub use info::devices;
pub use pools::Pools;
/// The names of all kernels for products, as [`Choosing`] knows them.
pub use unsloth_linear::strategies as product_kernels;
#[cfg(feature = "wgpu")]
pub use vulkan::{Adapter, adapters, vulkan, wgpu};
