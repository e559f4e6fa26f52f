//! Gated linear unit: `out = act(gate) * up`.                                   Shazeer 2020, arXiv:2002.05202
//! - SwiGLU: `silu(x) = x * sigmoid(x)`; GeGLU: `gelu(x)` with tanh or erf (Hendrycks & Gimpel 2016, arXiv:1606.08415)
//! - `dgate = dout * up * act'(gate)`, `dup = dout * act(gate)`

use super::{
    check,
    cost::{Cost, stored},
};
use crate::{DType, Result, Tensor};

/// Activation of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`: SwiGLU (Llama, Qwen, Mistral).
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: GeGLU as in Gemma (`gelu_pytorch_tanh`).
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt(2)))`: GeGLU, exact (`gelu`).
    GeluErf,
}

/// What defines one gated unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Number of elements of `gate`, `up` and `out`.
    pub elements: usize,
    /// Activation of the gate.
    pub activation: Activation,
    /// Storage type; arithmetic is f32.
    pub dtype: DType,
}

impl Spec {
    /// `gate` and `up` in, `out` out.
    pub fn forward_cost(&self) -> Cost {
        Cost::read(2 * self.bytes()) + Cost::written(self.bytes())
    }

    /// `dout`, `gate` and `up` in, `dgate` and `dup` out.
    pub fn backward_cost(&self) -> Cost {
        Cost::read(3 * self.bytes()) + Cost::written(2 * self.bytes())
    }

    /// Of one tensor.
    fn bytes(&self) -> usize {
        stored(self.elements, self.dtype)
    }
}

/// Gradients of the two inputs.
#[derive(Debug)]
pub struct Gradients {
    /// Gradient of `gate`.
    pub dgate: Tensor,
    /// Gradient of `up`.
    pub dup: Tensor,
}

/// GLU of a backend.
pub trait Glu {
    /// `out = act(gate) * up`, of the shape of `gate`.
    fn glu_forward(&self, spec: &Spec, gate: &Tensor, up: &Tensor) -> Result<Tensor>;
    /// Gradients; the buffers of `gate` and `up` are reused for them when unique.
    fn glu_backward(&self, spec: &Spec, dout: &Tensor, gate: Tensor, up: Tensor) -> Result<Gradients>;
}

fn spec(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Spec> {
    check::float("glu", "gate", gate.dtype())?;
    check::tensor("glu", "up", up, (gate.shape(), gate.dtype(), gate.device()))?;
    Ok(Spec { elements: gate.num_elements(), activation, dtype: gate.dtype() })
}

/// `out = act(gate) * up` for tensors of one shape.
///
/// # Errors
/// Shape, dtype or device mismatch.
pub fn forward(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let spec = spec(gate, up, activation)?;
    gate.device().backend().glu_forward(&spec, gate, up)
}

/// Gradients of `gate` and `up`, written over them where their buffers are unique.
///
/// # Errors
/// Shape, dtype or device mismatch.
pub fn backward(dout: &Tensor, gate: Tensor, up: Tensor, activation: Activation) -> Result<Gradients> {
    let spec = spec(&gate, &up, activation)?;
    check::tensor("glu", "dout", dout, (gate.shape(), gate.dtype(), gate.device()))?;
    let device = gate.device().clone();
    device.backend().glu_backward(&spec, dout, gate, up)
}
