//! The f64 oracles under the argument lists of the tape's operators.

use unsloth_autograd::ops::NormOptions;
use unsloth_core::ops::{
    glu::Activation,
    rope::{Direction, Layout},
};
use unsloth_testkit::{
    arith::Exact,
    oracle::{self, rms_norm::Inputs, rope::Rotation},
};

pub(crate) fn layer_norm(x: &[f64], (weight, bias): (&[f64], Option<&[f64]>), eps: f64) -> Vec<f64> {
    let inputs = oracle::layer_norm::Inputs { x, residual: None, weight, bias, eps: f64::from(eps as f32) };
    oracle::layer_norm::forward(&Exact, inputs).out
}

pub(crate) fn rms_norm(x: &[f64], weight: &[f64], options: NormOptions) -> Vec<f64> {
    let (eps, weight_offset) = (f64::from(options.eps), f64::from(options.weight_offset));
    oracle::rms_norm::forward(&Exact, Inputs { x, residual: None, weight, eps, weight_offset }).out
}

pub(crate) fn glu(gate: &[f64], up: &[f64], activation: Activation) -> Vec<f64> {
    oracle::glu::forward(&Exact, gate, up, activation)
}

/// Tables and positions of a rotation.
#[derive(Clone)]
pub(crate) struct Angles {
    pub(crate) cos: Vec<f64>,
    pub(crate) sin: Vec<f64>,
    pub(crate) positions: Vec<i32>,
    pub(crate) head_dim: usize,
}

impl Angles {
    pub(crate) fn rotate(&self, x: &[f64], layout: Layout) -> Vec<f64> {
        let Angles { cos, sin, positions, head_dim } = self;
        let direction = Direction::Forward;
        oracle::rope::rotate(&Exact, x, Rotation { cos, sin, positions, head_dim: *head_dim, layout, direction })
    }
}
