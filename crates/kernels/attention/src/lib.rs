#![doc = include_str!("../README.md")]
//!
//! # What is computed                                     Dao 2023, arXiv:2307.08691
//!
//! Per sequence and query head `h` (key head `h / (num_heads / num_kv_heads)`), with `p = i + seq_k - seq_q`:
//! - `s = scale * q k^T`, with softcap `c`: `s = c * tanh(s / c)`; masked where `j > p` (causal) or `j < p - left` (window)
//! - `lse = ln sum_j exp s`, `P = exp(s - lse)`, `out = P v`. A fully masked row has `out = 0`, `lse = -inf`, gradients 0.
//! - `D = sum_channels(dout * out)`, `ds = P * (dout v^T - D)`, with softcap `ds *= 1 - (s / c)^2`
//! - `dq = scale * ds k`, `dk = scale * ds^T q`, `dv = P^T dout`, the last two summed over the heads of a group
//!
//! All arrays are contiguous, row-major. Arithmetic is f32 for every element type; where tensor cores multiply the type, `P` and `ds` are
//! rounded to it before they multiply rows.

mod append;
mod backward;
mod block;
mod decode;
mod forward;
mod shape;
mod tensor;
mod tile;

pub use append::{Append, AppendShape, append};
pub use backward::{Backward, backward};
/// The CubeCL whose types this crate takes and gives.
pub use cubecl;
pub use decode::{Partial, Split, split_cached};
pub use forward::{Cached, Forward, cached, forward};
pub use shape::Shape;
/// What this crate gives or takes besides.
pub use unsloth_common::LaunchError;
