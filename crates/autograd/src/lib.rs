//! The tape of unsloth-rs: differentiable operators, checkpointing and gradient hooks.
//!
//! A [`Var`] is a tensor that may have been computed on a [`Tape`]. The functions in [`ops`] compute forward and, where some
//! input needs a gradient or a [`Parameter`] is trained, put one node on the tape: exactly what the backward pass reads, and a
//! closure. [`Tape::backward`] walks the nodes from last to first without recursion, frees what each node saved as soon as
//! it has been used, and adds parameter gradients straight into the [`GradStore`]. [`checkpoint`] keeps only the inputs of a
//! function and runs it again in the backward pass, [`checkpoint_in`] keeps them outside the device, [`tiled`] does so tile by
//! tile of a function's rows, and [`Tape::set_recompute`] names cheap operators whose results no node keeps; the gradients have the same bits.
//! What a checkpointed function gives as [`Deferred`] is not computed by its second run.
//!
//! ```
//! use unsloth_autograd::{GradStore, Matrix, Parameter, Result, Tape, Var, ops};
//! use unsloth_core::Category;
//!
//! # fn main() -> Result<()> {
//! let device = unsloth_cpu::device();
//! let weight = device.from_slice(&[1.0f32, 2.0, 3.0, 4.0], [2, 2], Category::Weights)?;
//! let weight = Parameter::new("weight", weight);
//! let mut gradients = GradStore::new(std::slice::from_ref(&weight))?;
//!
//! let x = Var::constant(device.from_slice(&[1.0f32, -1.0], [1, 2], Category::Activations)?);
//! let tape = Tape::new();
//! let y = ops::linear(&tape, &x, &Matrix::Trainable(weight.clone()), None)?;
//! let loss = ops::sum(&tape, &y)?;
//! tape.backward(&loss, &mut gradients)?;
//!
//! let dweight = gradients.get(&weight).map(|gradient| gradient.to_vec::<f32>()).transpose()?;
//! assert_eq!(dweight, Some(vec![1.0, -1.0, 1.0, -1.0]));
//! # Ok(())
//! # }
//! ```

mod backward;
mod checkpoint;
mod deferred;
mod grad_store;
pub mod ops;
mod parameter;
mod saved;
mod tape;
mod tiled;
mod var;

pub use backward::InputGradients;
pub use checkpoint::{checkpoint, checkpoint_in};
pub use deferred::Deferred;
pub use grad_store::GradStore;
pub use parameter::{Matrix, Parameter, ParameterId, Vector};
pub use saved::Recompute;
pub use tape::Tape;
pub use tiled::tiled;
pub use unsloth_core::{Error, Result};
pub use var::Var;
