//! Tensors, devices and the operator contract of unsloth-rs.
//!
//! This crate computes nothing. It fixes what every backend must do: [`Tensor`] is a contiguous, row-major buffer on a
//! [`Device`]; a device is any [`Backend`]; each operator has one file in [`ops`] with its trait, its `Spec`, the checks
//! shared by all backends, the formula and its gradient.

mod backend;
mod buffer;
mod byte_size;
mod category;
mod device;
mod device_name;
mod dtype;
mod error;
pub mod observe;
pub mod ops;
pub mod rng;
mod sequences;
mod shape;
mod store;
mod tensor;
mod weight;

pub use backend::{AllocationCounts, Backend, ClassUsage, Init, Memory, PoolUsage};
pub use buffer::{Buffer, BufferId, HostBytes};
pub use byte_size::ByteSize;
pub use category::{Category, Usage};
pub use device::Device;
pub use device_name::{DeviceInfo, DeviceName};
pub use dtype::{DType, Element, FloatElement};
pub use error::{Error, Result};
pub use sequences::{KvView, Lengths, Sequences};
pub use shape::Shape;
pub use store::{Place, StoreUsage, StoredTensor, TensorStore, Transfers};
pub use tensor::Tensor;
pub use weight::Weight;
