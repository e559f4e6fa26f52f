//! What [`unsloth_core::ops::glu`] has to show on a device.

use unsloth_core::{
    Category, DType, Device, Tensor,
    ops::{
        elementwise,
        glu::{self, Activation},
    },
};

use super::{AWKWARD_LENGTHS, AWKWARD_ROWS};
use crate::{
    arith::{Exact, Rounded, round},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::glu as oracle,
    report::{self, Case, Checked},
};

const OP: &str = "glu";

const ACTIVATIONS: [Activation; 3] = [Activation::Silu, Activation::GeluTanh, Activation::GeluErf];

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(OP, device, check(device));
}

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    for dtype in device.float_dtypes() {
        for activation in ACTIVATIONS {
            let flat = AWKWARD_LENGTHS.map(|length| (1, length));
            for (rows, width) in flat.into_iter().chain(AWKWARD_ROWS) {
                let case = Case::new(device, OP, format!("{activation:?}, [{rows}, {width}], {dtype}"));
                let mut data = Data::new(61);
                // Wide enough to reach both tails of the activation.
                let gate = data.normal(rows * width, 3.0, dtype);
                let (up, dout) = (data.normal(rows * width, 1.0, dtype), data.normal(rows * width, 1.0, dtype));
                let problem = Problem { shape: [rows, width], dtype, activation, gate, up, dout };
                problem.check(device, &case).map_err(|failure| failure.within(&case))?;
            }
        }
    }
    for (name, hazard) in HAZARDS {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

type Hazard = fn(&Device, &Case) -> Checked;

const HAZARDS: [(&str, Hazard); 3] =
    [("large_bf16_inputs", large_bf16_inputs), ("small_gates", small_gates), ("rejects_operands", rejects_operands)];

struct Problem {
    shape: [usize; 2],
    dtype: DType,
    activation: Activation,
    gate: Vec<f64>,
    up: Vec<f64>,
    dout: Vec<f64>,
}

impl Problem {
    /// GELU multiplies `x` by `1 + tanh` or `1 + erf`, which cancel for negative `x` until both are exactly -1: the error
    /// is relative to `x` up to there, times a factor. The derivative adds a term of the same kind to one of size 1.
    fn floor(&self, derivative: bool, factors: &[&[f64]]) -> Floor {
        const SATURATED: f64 = 6.0;
        if self.activation == Activation::Silu {
            return Floor::Stored(self.dtype);
        }
        let size = |i: usize| {
            let gate = self.gate[i].abs().min(SATURATED);
            let activation = if derivative { gate.max(1.0) } else { gate };
            factors.iter().fold(activation, |product, factor| product * factor[i].abs())
        };
        let magnitude = (0..self.gate.len()).map(size).fold(0.0, f64::max);
        Floor::Cancelling { dtype: self.dtype, magnitude }
    }

    fn check(&self, device: &Device, case: &Case) -> Checked {
        let tensor = |values: &[f64]| data::tensor(device, values, self.shape, self.dtype);
        let (gate, up, dout) = (tensor(&self.gate)?, tensor(&self.up)?, tensor(&self.dout)?);
        let naive_in = Rounded(self.dtype);

        let out = glu::forward(&gate, &up, self.activation)?;
        expect::form(case, "out", &out, (&self.shape, self.dtype))?;
        let exact = oracle::forward(&Exact, &self.gate, &self.up, self.activation);
        let naive = oracle::forward(&naive_in, &self.gate, &self.up, self.activation);
        let floor = self.floor(false, &[&self.up]);
        check_tensor(case, "out", &out, Expected { exact: &exact, naive: &naive, floor })?;
        expect::same_bits(case, "out, deterministic", &out, &glu::forward(&gate, &up, self.activation)?)?;

        let shared = glu::backward(&dout, gate.clone(), up.clone(), self.activation)?;
        expect::form(case, "dgate", &shared.dgate, (&self.shape, self.dtype))?;
        expect::form(case, "dup", &shared.dup, (&self.shape, self.dtype))?;
        let exact = oracle::backward(&Exact, &self.dout, (&self.gate, &self.up), self.activation);
        let naive = oracle::backward(&naive_in, &self.dout, (&self.gate, &self.up), self.activation);
        let floor = self.floor(true, &[&self.dout, &self.up]);
        check_tensor(case, "dgate", &shared.dgate, Expected { exact: &exact.dgate, naive: &naive.dgate, floor })?;
        let floor = self.floor(false, &[&self.dout]);
        check_tensor(case, "dup", &shared.dup, Expected { exact: &exact.dup, naive: &naive.dup, floor })?;

        // The same bits in place and in new buffers, both or one of the two; a shared input is left alone.
        expect::same_bits(case, "the shared gate", &gate, &tensor(&self.gate)?)?;
        expect::same_bits(case, "the shared up", &up, &tensor(&self.up)?)?;
        let unique_gate = glu::backward(&dout, elementwise::copy(&gate)?, up.clone(), self.activation)?;
        let unique_up = glu::backward(&dout, gate.clone(), elementwise::copy(&up)?, self.activation)?;
        let unique = glu::backward(&dout, gate, up, self.activation)?;
        for again in [unique_gate, unique_up, unique] {
            expect::same_bits(case, "dgate", &shared.dgate, &again.dgate)?;
            expect::same_bits(case, "dup", &shared.dup, &again.dup)?;
        }
        Ok(())
    }
}

/// Gates whose cube is beyond f32 and whose exponential is beyond everything: no NaN from infinity times zero.
fn large_bf16_inputs(device: &Device, case: &Case) -> Checked {
    let gates = [1e20, -1e20, 3e38, -3e38, 100.0, -100.0, 88.0, -88.0, 1e4, -1e4, 20.0, -20.0];
    for activation in ACTIVATIONS {
        // Each gate in a tensor of its own: among large results the error of a small one would not count.
        for gate in gates {
            let dtype = super::wide_dtype(device);
            let gate = round(dtype, gate);
            let problem =
                Problem { shape: [1, 1], dtype, activation, gate: vec![gate], up: vec![0.5], dout: vec![0.75] };
            problem.check(device, case)?;
        }
    }
    for dtype in device.float_dtypes() {
        for activation in ACTIVATIONS {
            let gate = [6e4, -6e4, 11.0, -11.0].map(|gate| round(dtype, gate)).to_vec();
            let problem =
                Problem { shape: [2, 2], dtype, activation, gate, up: vec![0.5; 4], dout: vec![0.75, 0.5, -1.0, 1.0] };
            problem.check(device, case)?;
        }
    }
    Ok(())
}

/// Near 0 the activation is `x / 2`: an error relative to 1 would be all of it.
fn small_gates(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        for activation in ACTIVATIONS {
            let mut data = Data::new(62);
            let gate = data.normal(65, 1e-3, dtype);
            let (up, dout) = (data.normal(65, 1.0, dtype), data.normal(65, 1.0, dtype));
            Problem { shape: [5, 13], dtype, activation, gate, up, dout }.check(device, case)?;
        }
    }
    Ok(())
}

fn rejects_operands(device: &Device, case: &Case) -> Checked {
    let floats = |length| device.zeros([length], DType::F32, Category::Activations);
    let ids = data::integers(device, &[1, 2, 3])?;
    let silu = Activation::Silu;
    expect::rejects(case, Rejects::DType("gate"), glu::forward(&ids, &ids, silu))?;
    expect::rejects(case, Rejects::DType("up"), glu::forward(&floats(3)?, &ids, silu))?;
    expect::rejects(case, Rejects::Shape("up"), glu::forward(&floats(3)?, &floats(4)?, silu))?;
    let backward = |dout: &Tensor, up: Tensor| glu::backward(dout, floats(3)?, up, silu);
    expect::rejects(case, Rejects::Shape("up"), backward(&floats(3)?, floats(4)?))?;
    expect::rejects(case, Rejects::Shape("dout"), backward(&floats(4)?, floats(3)?))?;
    expect::rejects(case, Rejects::DType("dout"), backward(&ids, floats(3)?))
}
