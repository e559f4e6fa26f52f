//! `layer_norm` of a micro-batch.

use anyhow::{Context as _, Result};
use serde_json::json;
use unsloth_rs::{
    Category, DType,
    core::ops::{
        elementwise,
        layer_norm::{self, Affine, Backward, ParameterGradients},
    },
};
use unsloth_testkit::{
    budget::Floor,
    oracle::layer_norm::{self as oracle, OutputGradients, Start},
};

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, UNIFORM_TO_UNIT, constant, random, random_scaled},
    check::{Host, cancelling, hold, references, spread},
};

const OP: &str = "layer_norm";
const EPS: f32 = 1e-5;

/// Forward, with a residual, and backward with the gradients of weight and bias.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let tokens = selection.tokens;
    each(&selection.models, &selection.dtypes, |model, dtype| {
        let rows = Rows { shape: [tokens, model.hidden_size], dtype };
        let shape = || (model.name, format!("{tokens} x {}", model.hidden_size));
        vec![
            Case::new((OP, "forward"), shape(), dtype, move |at| forward(at, rows, false)),
            Case::new((OP, "forward with residual"), shape(), dtype, move |at| forward(at, rows, true)),
            Case::new((OP, "backward with parameters"), shape(), dtype, move |at| backward(at, rows)),
        ]
    })
}

#[derive(Clone, Copy)]
struct Rows {
    shape: [usize; 2],
    dtype: DType,
}

/// Inputs of the oracle on some rows.
struct Sample {
    x: Vec<f64>,
    residual: Option<Vec<f64>>,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

impl Sample {
    fn inputs(&self) -> oracle::Inputs<'_> {
        let (x, residual, weight) = (&self.x, self.residual.as_deref(), &self.weight);
        oracle::Inputs { x, residual, weight, bias: Some(&self.bias), eps: f64::from(EPS) }
    }
}

fn forward(context: &Context<'_>, Rows { shape, dtype }: Rows, has_residual: bool) -> Result<Prepared> {
    let device = context.device;
    let channels = |seed| random(device, [shape[1]], dtype, seed);
    let (x, weight, bias) = (random(device, shape, dtype, 1)?, channels(3)?, channels(5)?);
    let residual = has_residual.then(|| random(device, shape, dtype, 2)).transpose()?;
    let run = {
        let (weight, bias, residual) = (weight.clone(), bias.clone(), residual.clone());
        move |x| {
            let affine = Affine { weight: &weight, bias: Some(&bias) };
            layer_norm::forward(x, residual.as_ref(), affine, EPS)
        }
    };
    let (checked, timed) = (run.clone(), elementwise::copy(&x)?);
    let run = match has_residual {
        true => Run::in_place(timed, move |x| run(x)?.sum.context("no sum")),
        false => Run::call(move || run(timed.clone())),
    };
    let check = move || {
        let forward = checked(x.clone())?;
        let at = spread(shape[0], 5);
        let residual = residual.as_ref().map(|residual| Ok::<_, anyhow::Error>(Host::read(residual)?.rows(&at)));
        let (weight, bias) = (Host::read(&weight)?.all(), Host::read(&bias)?.all());
        let sample = Sample { x: Host::read(&x)?.rows(&at), residual: residual.transpose()?, weight, bias };
        let (exact, naive) = references!(dtype, |a| oracle::forward(a, sample.inputs()));
        let out = Host::read(&forward.out)?.rows(&at);
        hold((OP, "out"), &out, (&exact.out, &naive.out), Floor::Stored(dtype))?;
        let rstd = Host::read(&forward.rstd)?.with_columns(1).rows(&at);
        hold((OP, "rstd"), &rstd, (&exact.rstd, &naive.rstd), Floor::Stored(DType::F32))
    };
    let torch = json!({ "op": OP, "part": if has_residual { "forward with residual" } else { "forward" },
        "rows": shape[0], "hidden_size": shape[1], "dtype": dtype.name() });
    Ok(Prepared::new(check, run).with_torch(torch))
}

fn backward(context: &Context<'_>, Rows { shape, dtype }: Rows) -> Result<Prepared> {
    let device = context.device;
    let (x, weight) = (random(device, shape, dtype, 1)?, random(device, [shape[1]], dtype, 3)?);
    let dout = random(device, shape, dtype, 4)?;
    let affine = Affine { weight: &weight, bias: None };
    let layer_norm::Forward { mean, rstd, .. } = layer_norm::forward(x.clone(), None, affine, EPS)?;
    let timed = timed_backward(context, Rows { shape, dtype })?;
    let on = device.clone();
    let check = move || {
        let zeros = || on.zeros([shape[1]], DType::F32, Category::Gradients);
        let (mut dweight, mut dbias) = (zeros()?, zeros()?);
        let inputs = Backward { dout: dout.clone(), dsum: None, sum: &x, weight: &weight, mean: &mean, rstd: &rstd };
        let gradients = ParameterGradients { dweight: Some(&mut dweight), dbias: Some(&mut dbias) };
        let dx = Host::read(&layer_norm::backward(inputs, gradients, EPS)?)?.all();
        let dout = Host::read(&dout)?.all();
        let (weight, bias) = (Host::read(&weight)?.all(), vec![0.0; shape[1]]);
        let sample = Sample { x: Host::read(&x)?.all(), residual: None, weight, bias };
        let start = vec![0.0; shape[1]];
        let start = Start { dweight: &start, dbias: &start };
        let outputs = OutputGradients { dout: &dout, dsum: None };
        let (exact, naive) = references!(dtype, |a| oracle::backward(a, sample.inputs(), outputs, start));
        let rstd = Host::read(&rstd)?.all();
        let term = |i: usize| (rstd[i / shape[1]] * dout[i] * sample.weight[i % shape[1]]).abs();
        let magnitude = (0..dout.len()).map(term).fold(0.0, f64::max);
        hold((OP, "dx"), &dx, (&exact.dx, &naive.dx), cancelling(dtype, magnitude))?;
        let largest = |term: &dyn Fn(usize) -> f64| {
            let mut columns = vec![0.0f64; shape[1]];
            (0..dout.len()).for_each(|i| columns[i % shape[1]] += term(i).abs());
            columns.into_iter().fold(0.0, f64::max)
        };
        let magnitude = largest(&|i| dout[i] * sample.x[i] * rstd[i / shape[1]]);
        let floor = cancelling(DType::F32, magnitude);
        hold((OP, "dweight"), &Host::read(&dweight)?.all(), (&exact.dweight, &naive.dweight), floor)?;
        let floor = cancelling(DType::F32, largest(&|i| dout[i]));
        hold((OP, "dbias"), &Host::read(&dbias)?.all(), (&exact.dbias, &naive.dbias), floor)
    };
    let torch = json!({ "op": OP, "part": "backward with parameters", "rows": shape[0], "hidden_size": shape[1],
        "dtype": dtype.name() });
    Ok(Prepared::new(check, timed).with_torch(torch))
}

/// With rows of size 1 and weights of 1 a gradient keeps its size, however often it goes through.
fn timed_backward(context: &Context<'_>, Rows { shape, dtype }: Rows) -> Result<Run> {
    let device = context.device;
    let zeros = || device.zeros([shape[1]], DType::F32, Category::Gradients);
    let x = random_scaled(device, shape, dtype, (1, UNIFORM_TO_UNIT))?;
    let (weight, dout) = (constant(device, [shape[1]], dtype, 1.0)?, random(device, shape, dtype, 4)?);
    let affine = Affine { weight: &weight, bias: None };
    let layer_norm::Forward { mean, rstd, .. } = layer_norm::forward(x.clone(), None, affine, EPS)?;
    let (mut dweight, mut dbias) = (zeros()?, zeros()?);
    Ok(Run::in_place(dout, move |dout| {
        let inputs = Backward { dout, dsum: None, sum: &x, weight: &weight, mean: &mean, rstd: &rstd };
        let gradients = ParameterGradients { dweight: Some(&mut dweight), dbias: Some(&mut dbias) };
        layer_norm::backward(inputs, gradients, EPS)
    }))
}
