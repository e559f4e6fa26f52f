//! What [`unsloth_core::ops::layer_norm`] has to show on a device.

use unsloth_core::{
    Category, DType, Device, Result, Tensor,
    ops::{
        elementwise,
        layer_norm::{self, Affine, ParameterGradients},
    },
};

use super::{AWKWARD_ROWS, LONG_ROWS, mixed_dtypes};
use crate::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::layer_norm::{self as oracle, Inputs, OutputGradients, Start},
    report::{self, Case, Checked},
};

const OP: &str = "layer_norm";

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
                Problem::new((rows, hidden_size), (dtype, weight_dtype), variant).check(device, &case)?;
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

const HAZARDS: [(&str, Hazard); 5] = [
    ("far_from_zero", far_from_zero),
    ("more_rows_than_cubes", more_rows_than_cubes),
    ("constant_rows", constant_rows),
    ("rejects_operands", rejects_operands),
    ("rejects_shared", rejects_shared),
];

#[derive(Clone, Copy, Debug)]
struct Variant {
    residual: bool,
    bias: bool,
    dsum: bool,
    eps: f32,
    /// Standard deviation of the inputs: below `sqrt(eps)` the result hangs on eps.
    scale: f64,
    /// Added to every input.
    mean: f64,
}

const PLAIN: Variant = Variant { residual: false, bias: true, dsum: false, eps: 1e-5, scale: 2e-3, mean: 0.0 };
const VARIANTS: [Variant; 3] = [
    PLAIN,
    Variant { residual: true, bias: true, dsum: true, eps: 1e-6, scale: 1.0, mean: 2.0 },
    Variant { residual: true, bias: false, dsum: false, eps: 0.1, scale: 0.5, mean: -1.0 },
];

struct Problem {
    rows: usize,
    dtype: DType,
    weight_dtype: DType,
    variant: Variant,
    x: Vec<f64>,
    residual: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
    dout: Vec<f64>,
    dsum: Vec<f64>,
    /// What the gradients of weight and bias hold before the backward pass.
    start: [Vec<f64>; 2],
}

impl Problem {
    fn new((rows, hidden_size): (usize, usize), (dtype, weight_dtype): (DType, DType), variant: Variant) -> Self {
        let mut data = Data::new(43);
        let count = rows * hidden_size;
        let mut inputs = || {
            let values = data.normal(count, variant.scale, dtype);
            values.into_iter().map(|value| crate::arith::round(dtype, value + variant.mean)).collect::<Vec<f64>>()
        };
        let (x, residual) = (inputs(), inputs());
        let (weight, bias) = (data.normal(hidden_size, 1.0, weight_dtype), data.normal(hidden_size, 1.0, weight_dtype));
        let (dout, dsum) = (data.normal(count, 1.0, dtype), data.normal(count, 1.0, dtype));
        let start = [(); 2].map(|()| data.normal(hidden_size, 1.0, DType::F32));
        Self { rows, dtype, weight_dtype, variant, x, residual, weight, bias, dout, dsum, start }
    }

    fn check(&self, device: &Device, case: &Case) -> Checked {
        self.forward(device, case).map_err(|failure| failure.within(case))?;
        self.backward(device, case).map_err(|failure| failure.within(case))
    }

    fn shape(&self) -> [usize; 2] {
        [self.rows, self.weight.len()]
    }

    fn inputs(&self) -> Inputs<'_> {
        let Variant { residual, bias, eps, .. } = self.variant;
        let (residual, bias) = (residual.then_some(&*self.residual), bias.then_some(&*self.bias));
        Inputs { x: &self.x, residual, weight: &self.weight, bias, eps: f64::from(eps) }
    }

    fn tensor(&self, device: &Device, values: &[f64]) -> Result<Tensor> {
        data::tensor(device, values, self.shape(), self.dtype)
    }

    fn channels(&self, device: &Device, values: &[f64]) -> Result<Tensor> {
        data::tensor(device, values, [values.len()], self.weight_dtype)
    }

    fn run(&self, device: &Device, x: Tensor) -> Result<layer_norm::Forward> {
        let residual = self.tensor(device, &self.residual)?;
        let (weight, bias) = (self.channels(device, &self.weight)?, self.channels(device, &self.bias)?);
        let affine = Affine { weight: &weight, bias: self.variant.bias.then_some(&bias) };
        layer_norm::forward(x, self.variant.residual.then_some(&residual), affine, self.variant.eps)
    }

    fn forward(&self, device: &Device, case: &Case) -> Checked {
        let x = self.tensor(device, &self.x)?;
        let shared = self.run(device, x.clone())?;
        let (exact, naive) =
            (oracle::forward(&Exact, self.inputs()), oracle::forward(&Rounded(self.dtype), self.inputs()));
        expect::form(case, "out", &shared.out, (&self.shape(), self.dtype))?;
        let has_sum = shared.sum.is_some() == self.variant.residual;
        expect::holds(case, "`sum` exists if and only if there is a residual", has_sum)?;
        // The mean is rounded, and what it is subtracted from may be as large.
        let term = |i: usize| (i / self.weight.len(), self.weight[i % self.weight.len()]);
        let terms = (0..exact.sum.len()).map(|i| (exact.sum[i], term(i)));
        let sizes = terms.map(|(x, (row, w))| (x.abs() + exact.mean[row].abs()) * exact.rstd[row] * w.abs());
        let floor = Floor::Cancelling { dtype: self.dtype, magnitude: sizes.fold(0.0, f64::max) };
        check_tensor(case, "out", &shared.out, Expected { exact: &exact.out, naive: &naive.out, floor })?;
        let exact_sum = &exact.sum;
        for (name, statistic, exact, naive) in
            [("mean", &shared.mean, &exact.mean, &naive.mean), ("rstd", &shared.rstd, &exact.rstd, &naive.rstd)]
        {
            expect::form(case, name, statistic, (&[self.rows], DType::F32))?;
            let magnitude = exact_sum.iter().fold(0.0f64, |most, value| most.max(value.abs()));
            let floor = match name {
                "mean" => Floor::Cancelling { dtype: DType::F32, magnitude },
                _ => Floor::Stored(DType::F32),
            };
            check_tensor(case, name, statistic, Expected { exact, naive, floor })?;
        }
        if let Some(sum) = &shared.sum {
            expect::form(case, "sum", sum, (&self.shape(), self.dtype))?;
            let expected = Expected { exact: &exact.sum, naive: &naive.sum, floor: Floor::Exact };
            check_tensor(case, "sum", sum, expected)?;
        }
        // The same bits whether `x` was shared or its buffer could become `sum`; a shared `x` is left alone.
        expect::same_bits(case, "the shared x", &x, &self.tensor(device, &self.x)?)?;
        let unique = self.run(device, x)?;
        expect::same_bits(case, "out", &shared.out, &unique.out)?;
        expect::same_bits(case, "mean", &shared.mean, &unique.mean)?;
        expect::same_bits(case, "rstd", &shared.rstd, &unique.rstd)?;
        match (&shared.sum, &unique.sum) {
            (Some(a), Some(b)) => expect::same_bits(case, "sum", a, b),
            (a, b) => expect::holds(case, "`sum` is given by both calls or by none", a.is_none() && b.is_none()),
        }
    }

    fn run_backward(&self, device: &Device, dout: Tensor, gradients: ParameterGradients<'_>) -> Result<Tensor> {
        // Backward is tested on its own: it reads the rounded sum and statistics of the reference.
        let forward = oracle::forward(&Rounded(self.dtype), self.inputs());
        let sum = self.tensor(device, &forward.sum)?;
        let statistic = |values: &[f64]| data::tensor(device, values, [self.rows], DType::F32);
        let (mean, rstd) = (statistic(&forward.mean)?, statistic(&forward.rstd)?);
        let dsum = self.tensor(device, &self.dsum)?;
        let dsum = self.variant.dsum.then_some(&dsum);
        let weight = self.channels(device, &self.weight)?;
        let inputs = layer_norm::Backward { dout, dsum, sum: &sum, weight: &weight, mean: &mean, rstd: &rstd };
        layer_norm::backward(inputs, gradients, self.variant.eps)
    }

    fn backward(&self, device: &Device, case: &Case) -> Checked {
        let outputs = OutputGradients { dout: &self.dout, dsum: self.variant.dsum.then_some(&*self.dsum) };
        // The sum is rounded before both references, so that they differ in the backward pass only.
        let sum = oracle::forward(&Rounded(self.dtype), self.inputs()).sum;
        let inputs = Inputs { x: &sum, residual: None, ..self.inputs() };
        let [dweight, dbias] = &self.start;
        let exact = oracle::backward(&Exact, inputs, outputs, Start { dweight, dbias });
        let naive = oracle::backward(&Rounded(self.dtype), inputs, outputs, Start { dweight, dbias });

        let dout = self.tensor(device, &self.dout)?;
        let start = |values: &[f64]| data::tensor(device, values, [values.len()], DType::F32);
        let (mut dweight, mut dbias) = (start(dweight)?, start(dbias)?);
        let both = ParameterGradients { dweight: Some(&mut dweight), dbias: Some(&mut dbias) };
        let dx = self.run_backward(device, dout.clone(), both)?;
        expect::form(case, "dx", &dx, (&self.shape(), self.dtype))?;
        let (of_dx, of_weight, of_bias) = self.magnitudes(inputs);
        let floor = Floor::Cancelling { dtype: self.dtype, magnitude: of_dx };
        check_tensor(case, "dx", &dx, Expected { exact: &exact.dx, naive: &naive.dx, floor })?;
        let floor = Floor::Cancelling { dtype: DType::F32, magnitude: of_weight };
        check_tensor(case, "dweight", &dweight, Expected { exact: &exact.dweight, naive: &naive.dweight, floor })?;
        let floor = Floor::Cancelling { dtype: DType::F32, magnitude: of_bias };
        check_tensor(case, "dbias", &dbias, Expected { exact: &exact.dbias, naive: &naive.dbias, floor })?;

        // One gradient alone, or none, has the same bits, and so has a dout whose buffer may become dx.
        expect::same_bits(case, "the shared dout", &dout, &self.tensor(device, &self.dout)?)?;
        let (mut weight_alone, mut bias_alone) = (start(&self.start[0])?, start(&self.start[1])?);
        let alone = ParameterGradients { dweight: Some(&mut weight_alone), dbias: None };
        expect::same_bits(case, "dx", &dx, &self.run_backward(device, elementwise::copy(&dout)?, alone)?)?;
        let alone = ParameterGradients { dweight: None, dbias: Some(&mut bias_alone) };
        expect::same_bits(case, "dx", &dx, &self.run_backward(device, elementwise::copy(&dout)?, alone)?)?;
        expect::same_bits(case, "dweight", &dweight, &weight_alone)?;
        expect::same_bits(case, "dbias", &dbias, &bias_alone)?;
        let frozen = self.run_backward(device, dout, ParameterGradients::default())?;
        expect::same_bits(case, "dx", &dx, &frozen)
    }

    /// Largest term of dx, and largest sum of magnitudes of dweight and of dbias.
    fn magnitudes(&self, inputs: Inputs<'_>) -> (f64, f64, f64) {
        let hidden_size = self.weight.len();
        let forward = oracle::forward(&Exact, inputs);
        let term = |i: usize| (forward.rstd[i / hidden_size] * self.dout[i] * self.weight[i % hidden_size]).abs();
        let of_dx = (0..self.dout.len()).map(term).fold(0.0, f64::max);
        let column = |start: &[f64], term: &dyn Fn(usize) -> f64| {
            let sum = |i: usize| (0..self.rows).map(|row| term(row * hidden_size + i).abs()).sum::<f64>();
            (0..hidden_size).map(|i| start[i].abs() + sum(i)).fold(0.0, f64::max)
        };
        // The row and its mean are subtracted, so each counts.
        let size = |i: usize| forward.sum[i].abs() + forward.mean[i / hidden_size].abs();
        let of_weight = column(&self.start[0], &|i| self.dout[i] * size(i) * forward.rstd[i / hidden_size]);
        (of_dx, of_weight, column(&self.start[1], &|i| self.dout[i]))
    }
}

/// A mean a thousand times the deviation: the difference of mean square and squared mean would have lost the variance.
fn far_from_zero(device: &Device, case: &Case) -> Checked {
    let variant = Variant { scale: 1.0, mean: 1000.0, ..PLAIN };
    Problem::new((3, 1031), (DType::F32, DType::F32), variant).check(device, case)
}

/// More rows than many devices take cubes in one dimension (65535).
fn more_rows_than_cubes(device: &Device, case: &Case) -> Checked {
    let variant = Variant { residual: true, bias: true, dsum: true, eps: 1e-6, scale: 1.0, mean: 0.0 };
    Problem::new((66_001, 3), (DType::F32, DType::F32), variant).check(device, case)
}

/// Padding: `rstd` is `1 / sqrt(eps)`, the output the bias, the gradient finite.
fn constant_rows(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let variant = Variant { scale: 0.0, mean: 4.0, eps: 1e-2, ..PLAIN };
        Problem::new((3, 64), (dtype, dtype), variant).check(device, case)?;
    }
    Ok(())
}

fn rejects_operands(device: &Device, case: &Case) -> Checked {
    let floats = |shape: [usize; 2]| device.zeros(shape, DType::F32, Category::Activations);
    let row = |length| device.zeros([length], DType::F32, Category::Activations);
    let (x, weight) = (floats([2, 4])?, row(4)?);
    let forward = |x: &Tensor, residual: Option<&Tensor>, weight: &Tensor, bias: Option<&Tensor>| {
        layer_norm::forward(x.clone(), residual, Affine { weight, bias }, 1e-5)
    };
    expect::rejects(case, Rejects::Shape("x"), forward(&row(8)?, None, &weight, None))?;
    expect::rejects(case, Rejects::Shape("weight"), forward(&x, None, &row(5)?, None))?;
    expect::rejects(case, Rejects::Shape("bias"), forward(&x, None, &weight, Some(&row(5)?)))?;
    expect::rejects(case, Rejects::Shape("residual"), forward(&x, Some(&floats([2, 5])?), &weight, None))?;
    let integers = data::integers(device, &[0; 4])?;
    expect::rejects(case, Rejects::DType("weight"), forward(&x, None, &integers, None))?;
    expect::rejects(case, Rejects::DType("bias"), forward(&x, None, &weight, Some(&integers)))?;
    for eps in [0.0, -1e-5, f32::NAN, f32::INFINITY] {
        let refused = layer_norm::forward(x.clone(), None, Affine { weight: &weight, bias: None }, eps);
        expect::rejects(case, Rejects::Spec("eps"), refused)?;
    }
    let backward = |dout: Tensor, [mean, rstd]: [usize; 2], [dweight, dbias]: [usize; 2]| {
        let (mean, rstd, mut dweight, mut dbias) = (row(mean)?, row(rstd)?, row(dweight)?, row(dbias)?);
        let inputs = layer_norm::Backward { dout, dsum: None, sum: &x, weight: &weight, mean: &mean, rstd: &rstd };
        let gradients = ParameterGradients { dweight: Some(&mut dweight), dbias: Some(&mut dbias) };
        layer_norm::backward(inputs, gradients, 1e-5)
    };
    expect::rejects(case, Rejects::Shape("dout"), backward(floats([3, 4])?, [2, 2], [4, 4]))?;
    expect::rejects(case, Rejects::Shape("mean"), backward(floats([2, 4])?, [3, 2], [4, 4]))?;
    expect::rejects(case, Rejects::Shape("rstd"), backward(floats([2, 4])?, [2, 3], [4, 4]))?;
    expect::rejects(case, Rejects::Shape("dweight"), backward(floats([2, 4])?, [2, 2], [5, 4]))?;
    expect::rejects(case, Rejects::Shape("dbias"), backward(floats([2, 4])?, [2, 2], [4, 5]))
}

fn rejects_shared(device: &Device, case: &Case) -> Checked {
    let floats = |shape: [usize; 2]| device.zeros(shape, DType::F32, Category::Activations);
    let row = |length| device.zeros([length], DType::F32, Category::Gradients);
    let (sum, weight, statistic, held) = (floats([2, 4])?, row(4)?, row(2)?, row(4)?);
    for arg in ["dweight", "dbias"] {
        let mut shared = held.clone();
        let gradients = match arg {
            "dweight" => ParameterGradients { dweight: Some(&mut shared), dbias: None },
            _ => ParameterGradients { dweight: None, dbias: Some(&mut shared) },
        };
        let (mean, rstd) = (&statistic, &statistic);
        let dout = floats([2, 4])?;
        let inputs = layer_norm::Backward { dout, dsum: None, sum: &sum, weight: &weight, mean, rstd };
        expect::rejects(case, Rejects::Shared(arg), layer_norm::backward(inputs, gradients, 1e-5))?;
    }
    Ok(())
}
