//! The CPU backend: every operator of the contract in plain Rust, vectorised for the processor it runs on.
//!
//! ```
//! use unsloth_core::{Category, ops::rms_norm};
//!
//! let device = unsloth_cpu::device();
//! let x = device.from_slice(&[3.0f32, 4.0], [1, 2], Category::Activations)?;
//! let weight = device.from_slice(&[1.0f32, 1.0], [2], Category::Weights)?;
//! let normed = rms_norm::forward(x, None, &weight, 1e-6, 0.0)?;
//! assert!((normed.out.to_vec::<f32>()?[1] - 4.0 / 12.5f32.sqrt()).abs() < 1e-6);
//! # Ok::<(), unsloth_core::Error>(())
//! ```

mod access;
mod adafactor;
mod adamw;
mod adamw8bit;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod backend;
pub mod candle;
mod cross_entropy;
mod dora;
mod dropout;
mod elementwise;
mod embedding;
mod glu;
mod info;
mod layer_norm;
mod linear;
mod linear_cross_entropy;
mod lion;
mod lora_linear;
mod matmul;
mod muon;
mod norm;
mod parallel;
mod reduce;
mod rms_norm;
mod rope;
mod sgd;
mod simd;
mod stochastic_rounding;
mod team;

pub use backend::{CpuBackend, CpuOptions};
pub use info::info;
pub use matmul::Isa;

/// A CPU device with default options: all cores, no budget.
pub fn device() -> unsloth_core::Device {
    unsloth_core::Device::new(CpuBackend::with_defaults())
}
