//! What [`unsloth_core::ops::rms_norm`] has to show on a device.

use unsloth_core::{
    Category, DType, Device, Tensor,
    ops::{elementwise, rms_norm},
};

use super::{AWKWARD_ROWS, LONG_ROWS, mixed_dtypes};
use crate::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::rms_norm::{self as oracle, Inputs, OutputGradients},
    report::{self, Case, Checked},
};

const OP: &str = "rms_norm";

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
    for (dtype, weight_dtype) in mixed_dtypes(device) {
        for (rows, hidden_size) in AWKWARD_ROWS.into_iter().chain(LONG_ROWS) {
            for variant in VARIANTS {
                let detail = format!("[{rows}, {hidden_size}] {dtype}, weight {weight_dtype}, {variant:?}");
                let case = Case::new(device, OP, detail);
                let problem = Problem::new((rows, hidden_size), (dtype, weight_dtype), variant);
                problem.forward(device, &case).map_err(|failure| failure.within(&case))?;
                problem.backward(device, &case).map_err(|failure| failure.within(&case))?;
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

const HAZARDS: [(&str, Hazard); 6] = [
    ("large_bf16_inputs", large_bf16_inputs),
    ("more_rows_than_cubes", more_rows_than_cubes),
    ("rows_of_zeros", rows_of_zeros),
    ("rejects_operands", rejects_operands),
    ("rejects_eps", rejects_eps),
    ("rejects_shared", rejects_shared),
];

#[derive(Clone, Copy, Debug)]
struct Variant {
    residual: bool,
    dsum: bool,
    weight_offset: f32,
    eps: f32,
    /// Standard deviation of the inputs: below `sqrt(eps)` the result hangs on eps.
    scale: f64,
}

const VARIANTS: [Variant; 3] = [
    Variant { residual: false, dsum: false, weight_offset: 0.0, eps: 1e-5, scale: 2e-3 },
    Variant { residual: true, dsum: true, weight_offset: 0.0, eps: 1e-6, scale: 1.0 },
    Variant { residual: true, dsum: false, weight_offset: 1.0, eps: 0.1, scale: 0.5 },
];

struct Problem {
    rows: usize,
    dtype: DType,
    weight_dtype: DType,
    variant: Variant,
    x: Vec<f64>,
    residual: Vec<f64>,
    weight: Vec<f64>,
    dout: Vec<f64>,
    dsum: Vec<f64>,
    /// What `dweight` holds before the backward pass.
    start: Vec<f64>,
}

impl Problem {
    fn new((rows, hidden_size): (usize, usize), (dtype, weight_dtype): (DType, DType), variant: Variant) -> Self {
        let mut data = Data::new(41);
        let count = rows * hidden_size;
        let x = data.normal(count, variant.scale, dtype);
        let residual = data.normal(count, variant.scale, dtype);
        let weight = data.normal(hidden_size, 1.0, weight_dtype);
        let (dout, dsum) = (data.normal(count, 1.0, dtype), data.normal(count, 1.0, dtype));
        let start = data.normal(hidden_size, 1.0, DType::F32);
        Self { rows, dtype, weight_dtype, variant, x, residual, weight, dout, dsum, start }
    }

    fn shape(&self) -> [usize; 2] {
        [self.rows, self.weight.len()]
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            x: &self.x,
            residual: self.variant.residual.then_some(&*self.residual),
            weight: &self.weight,
            eps: f64::from(self.variant.eps),
            weight_offset: f64::from(self.variant.weight_offset),
        }
    }

    fn tensor(&self, device: &Device, values: &[f64]) -> unsloth_core::Result<Tensor> {
        data::tensor(device, values, self.shape(), self.dtype)
    }

    fn weight_tensor(&self, device: &Device) -> unsloth_core::Result<Tensor> {
        data::tensor(device, &self.weight, [self.weight.len()], self.weight_dtype)
    }

    fn run(&self, device: &Device, x: Tensor) -> unsloth_core::Result<rms_norm::Forward> {
        let residual = self.tensor(device, &self.residual)?;
        let residual = self.variant.residual.then_some(&residual);
        rms_norm::forward(x, residual, &self.weight_tensor(device)?, self.variant.eps, self.variant.weight_offset)
    }

    fn forward(&self, device: &Device, case: &Case) -> Checked {
        let x = self.tensor(device, &self.x)?;
        let shared = self.run(device, x.clone())?;
        let (exact, naive) =
            (oracle::forward(&Exact, self.inputs()), oracle::forward(&Rounded(self.dtype), self.inputs()));
        expect::form(case, "out", &shared.out, (&self.shape(), self.dtype))?;
        expect::form(case, "rstd", &shared.rstd, (&[self.rows], DType::F32))?;
        expect::holds(
            case,
            "`sum` exists if and only if there is a residual",
            shared.sum.is_some() == self.variant.residual,
        )?;
        let expected = Expected { exact: &exact.out, naive: &naive.out, floor: Floor::Stored(self.dtype) };
        check_tensor(case, "out", &shared.out, expected)?;
        let expected = Expected { exact: &exact.rstd, naive: &naive.rstd, floor: Floor::Stored(DType::F32) };
        check_tensor(case, "rstd", &shared.rstd, expected)?;
        if let Some(sum) = &shared.sum {
            expect::form(case, "sum", sum, (&self.shape(), self.dtype))?;
            let expected = Expected { exact: &exact.sum, naive: &naive.sum, floor: Floor::Exact };
            check_tensor(case, "sum", sum, expected)?;
        }
        // The same bits whether `x` was shared or its buffer could become `sum`; a shared `x` is left alone.
        expect::same_bits(case, "the shared x", &x, &self.tensor(device, &self.x)?)?;
        let unique = self.run(device, x)?;
        expect::same_bits(case, "out", &shared.out, &unique.out)?;
        expect::same_bits(case, "rstd", &shared.rstd, &unique.rstd)?;
        match (&shared.sum, &unique.sum) {
            (Some(a), Some(b)) => expect::same_bits(case, "sum", a, b),
            (a, b) => expect::holds(case, "`sum` is given by both calls or by none", a.is_none() && b.is_none()),
        }
    }

    fn run_backward(
        &self,
        device: &Device,
        dout: Tensor,
        dweight: Option<&mut Tensor>,
    ) -> unsloth_core::Result<Tensor> {
        // Backward is tested on its own: it reads the rounded sum and rstd of the reference.
        let forward = oracle::forward(&Rounded(self.dtype), self.inputs());
        let sum = self.tensor(device, &forward.sum)?;
        let rstd = data::tensor(device, &forward.rstd, [self.rows], DType::F32)?;
        let dsum = self.tensor(device, &self.dsum)?;
        let dsum = self.variant.dsum.then_some(&dsum);
        let weight = self.weight_tensor(device)?;
        let inputs = rms_norm::Backward { dout, dsum, sum: &sum, weight: &weight, rstd: &rstd };
        rms_norm::backward(inputs, dweight, self.variant.eps, self.variant.weight_offset)
    }

    fn backward(&self, device: &Device, case: &Case) -> Checked {
        let outputs = OutputGradients { dout: &self.dout, dsum: self.variant.dsum.then_some(&*self.dsum) };
        // The sum is rounded before both references, so that they differ in the backward pass only.
        let sum = oracle::forward(&Rounded(self.dtype), self.inputs()).sum;
        let inputs = Inputs { x: &sum, residual: None, ..self.inputs() };
        let exact = oracle::backward(&Exact, inputs, outputs, &self.start);
        let naive = oracle::backward(&Rounded(self.dtype), inputs, outputs, &self.start);

        let dout = self.tensor(device, &self.dout)?;
        let mut dweight = data::tensor(device, &self.start, [self.weight.len()], DType::F32)?;
        let dx = self.run_backward(device, dout.clone(), Some(&mut dweight))?;
        expect::form(case, "dx", &dx, (&self.shape(), self.dtype))?;
        let floor = Floor::Cancelling { dtype: self.dtype, magnitude: self.largest_term(&sum) };
        check_tensor(case, "dx", &dx, Expected { exact: &exact.dx, naive: &naive.dx, floor })?;
        let magnitude = self.largest_column(&sum);
        let floor = Floor::Cancelling { dtype: DType::F32, magnitude };
        check_tensor(case, "dweight", &dweight, Expected { exact: &exact.dweight, naive: &naive.dweight, floor })?;

        // accumulates_dweight: a second pass adds to the first.
        self.run_backward(device, dout.clone(), Some(&mut dweight))?;
        let exact_twice = oracle::backward(&Exact, inputs, outputs, &exact.dweight).dweight;
        let naive_twice = oracle::backward(&Rounded(self.dtype), inputs, outputs, &naive.dweight).dweight;
        let floor = Floor::Cancelling { dtype: DType::F32, magnitude: 2.0 * magnitude };
        let expected = Expected { exact: &exact_twice, naive: &naive_twice, floor };
        check_tensor(case, "dweight after two passes", &dweight, expected)?;

        // A frozen weight changes nothing about dx; nor does a dout whose buffer may become dx.
        expect::same_bits(case, "the shared dout", &dout, &self.tensor(device, &self.dout)?)?;
        let frozen = self.run_backward(device, elementwise::copy(&dout)?, None)?;
        expect::same_bits(case, "dx", &dx, &frozen)
    }

    /// Largest term of `rstd * (g - xhat * mean) + dsum`.
    fn largest_term(&self, sum: &[f64]) -> f64 {
        let forward = oracle::forward(&Exact, Inputs { x: sum, residual: None, ..self.inputs() });
        let offset = f64::from(self.variant.weight_offset);
        let term = |i: usize| {
            let (row, column) = (i / self.weight.len(), i % self.weight.len());
            (forward.rstd[row] * self.dout[i] * (self.weight[column] + offset)).abs()
        };
        (0..sum.len()).map(term).fold(0.0, f64::max)
    }

    /// Largest sum of magnitudes of `start + sum_rows(dout * xhat)`.
    fn largest_column(&self, sum: &[f64]) -> f64 {
        let hidden_size = self.weight.len();
        let rstd = oracle::forward(&Exact, Inputs { x: sum, residual: None, ..self.inputs() }).rstd;
        let column = |i: usize| {
            let terms = (0..self.rows)
                .map(|row| (self.dout[row * hidden_size + i] * sum[row * hidden_size + i] * rstd[row]).abs());
            self.start[i].abs() + terms.sum::<f64>()
        };
        (0..hidden_size).map(column).fold(0.0, f64::max)
    }
}

/// Squares far beyond the range of f16 and beyond the precision of bf16.
fn large_bf16_inputs(device: &Device, case: &Case) -> Checked {
    let dtype = super::wide_dtype(device);
    let variant = Variant { residual: true, dsum: true, weight_offset: 0.0, eps: 1e-6, scale: 1e15 };
    let problem = Problem::new((3, 1031), (dtype, dtype), variant);
    problem.forward(device, case)?;
    problem.backward(device, case)
}

/// More rows than many devices take cubes in one dimension (65535).
fn more_rows_than_cubes(device: &Device, case: &Case) -> Checked {
    let variant = Variant { residual: true, dsum: true, weight_offset: 0.0, eps: 1e-6, scale: 1.0 };
    let problem = Problem::new((66_001, 3), (DType::F32, DType::F32), variant);
    problem.forward(device, case)?;
    problem.backward(device, case)
}

/// Padding: `rstd` is `1 / sqrt(eps)`, the output zero, the gradient finite.
fn rows_of_zeros(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let variant = Variant { residual: false, dsum: false, weight_offset: 0.0, eps: 1e-2, scale: 0.0 };
        let problem = Problem::new((3, 65), (dtype, dtype), variant);
        problem.forward(device, case)?;
        problem.backward(device, case)?;
    }
    Ok(())
}

fn rejects_operands(device: &Device, case: &Case) -> Checked {
    let floats = |shape: [usize; 2]| device.zeros(shape, DType::F32, Category::Activations);
    let row = |length| device.zeros([length], DType::F32, Category::Activations);
    let (x, weight) = (floats([2, 4])?, row(4)?);
    let forward = |x: &Tensor, residual: Option<&Tensor>, weight: &Tensor| {
        rms_norm::forward(x.clone(), residual, weight, 1e-5, 0.0)
    };
    expect::rejects(case, Rejects::Shape("x"), forward(&row(8)?, None, &weight))?;
    expect::rejects(case, Rejects::Shape("weight"), forward(&x, None, &row(5)?))?;
    expect::rejects(case, Rejects::Shape("residual"), forward(&x, Some(&floats([2, 5])?), &weight))?;
    let ids = data::integers(device, &[0; 8])?.reshape([2, 4])?;
    expect::rejects(case, Rejects::DType("x"), forward(&ids, None, &weight))?;
    expect::rejects(case, Rejects::DType("weight"), forward(&x, None, &data::integers(device, &[0; 4])?))?;
    expect::rejects(case, Rejects::DType("residual"), forward(&x, Some(&ids), &weight))?;

    let backward = |dout: Tensor, rstd: &Tensor, dweight: &mut Tensor| {
        let inputs = rms_norm::Backward { dout, dsum: None, sum: &x, weight: &weight, rstd };
        rms_norm::backward(inputs, Some(dweight), 1e-5, 0.0)
    };
    expect::rejects(case, Rejects::Shape("dout"), backward(floats([3, 4])?, &row(2)?, &mut row(4)?))?;
    expect::rejects(case, Rejects::Shape("rstd"), backward(floats([2, 4])?, &row(3)?, &mut row(4)?))?;
    expect::rejects(case, Rejects::Shape("dweight"), backward(floats([2, 4])?, &row(2)?, &mut row(5)?))?;
    let mut integers = data::integers(device, &[0; 4])?;
    expect::rejects(case, Rejects::DType("dweight"), backward(floats([2, 4])?, &row(2)?, &mut integers))
}

fn rejects_eps(device: &Device, case: &Case) -> Checked {
    let x = device.zeros([2, 4], DType::F32, Category::Activations)?;
    let weight = device.zeros([4], DType::F32, Category::Activations)?;
    for eps in [0.0, -1e-5, f32::NAN, f32::INFINITY] {
        expect::rejects(case, Rejects::Spec("eps"), rms_norm::forward(x.clone(), None, &weight, eps, 0.0))?;
    }
    Ok(())
}

fn rejects_shared(device: &Device, case: &Case) -> Checked {
    let floats = |shape: [usize; 2]| device.zeros(shape, DType::F32, Category::Activations);
    let row = |length| device.zeros([length], DType::F32, Category::Gradients);
    let (sum, weight, rstd, dweight) = (floats([2, 4])?, row(4)?, row(2)?, row(4)?);
    let inputs = rms_norm::Backward { dout: floats([2, 4])?, dsum: None, sum: &sum, weight: &weight, rstd: &rstd };
    let refused = rms_norm::backward(inputs, Some(&mut dweight.clone()), 1e-5, 0.0);
    expect::rejects(case, Rejects::Shared("dweight"), refused)
}
