//! `rms_norm` of a micro-batch.

use anyhow::{Context as _, Result};
use candle_core as candle;
use serde_json::json;
use unsloth_rs::{
    Category, DType, Tensor,
    core::ops::{
        elementwise, reduce,
        rms_norm::{self, Backward},
    },
    cpu::candle::to_candle,
};
use unsloth_testkit::{
    budget::Floor,
    oracle::rms_norm::{self as oracle, OutputGradients},
};

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, UNIFORM_TO_UNIT, constant, random, random_scaled},
    check::{Host, cancelling, hold, references, spread},
};

const OP: &str = "rms_norm";
const EPS: f32 = 1e-5;

/// Forward, with a residual, backward, backward with the weight's gradient; and the traffic of a form that is not fused.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let tokens = selection.tokens;
    each(&selection.models, &selection.dtypes, |model, dtype| {
        let rows = Rows { shape: [tokens, model.hidden_size], dtype };
        let shape = || (model.name, format!("{tokens} x {}", model.hidden_size));
        vec![
            Case::new((OP, "forward"), shape(), dtype, move |at| forward(at, rows, false)),
            Case::new((OP, "forward with residual"), shape(), dtype, move |at| forward(at, rows, true)),
            Case::new((OP, "forward, unfused traffic"), shape(), dtype, move |at| unfused(at, rows)),
            Case::new((OP, "backward"), shape(), dtype, move |at| backward(at, rows, false)),
            Case::new((OP, "backward with dweight"), shape(), dtype, move |at| backward(at, rows, true)),
        ]
    })
}

#[derive(Clone, Copy)]
struct Rows {
    shape: [usize; 2],
    dtype: DType,
}

/// Inputs of the oracle on rows `at`.
struct Sample {
    at: Vec<usize>,
    x: Vec<f64>,
    residual: Option<Vec<f64>>,
    weight: Vec<f64>,
}

impl Sample {
    fn inputs(&self) -> oracle::Inputs<'_> {
        let (x, residual, weight) = (&self.x, self.residual.as_deref(), &self.weight);
        oracle::Inputs { x, residual, weight, eps: f64::from(EPS), weight_offset: 0.0 }
    }
}

fn forward(context: &Context<'_>, Rows { shape, dtype }: Rows, has_residual: bool) -> Result<Prepared> {
    let device = context.device;
    let (x, weight) = (random(device, shape, dtype, 1)?, random(device, [shape[1]], dtype, 3)?);
    let residual = has_residual.then(|| random(device, shape, dtype, 2)).transpose()?;
    let candle = (context.with_candle && !has_residual).then(|| peer(&x, &weight)).transpose()?;
    let run = {
        let (weight, residual) = (weight.clone(), residual.clone());
        move |x| rms_norm::forward(x, residual.as_ref(), &weight, EPS, 0.0)
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
        let (x, weight) = (Host::read(&x)?.rows(&at), Host::read(&weight)?.all());
        let sample = Sample { at, x, residual: residual.transpose()?, weight };
        let (exact, naive) = references!(dtype, |a| oracle::forward(a, sample.inputs()));
        let out = Host::read(&forward.out)?.rows(&sample.at);
        hold((OP, "out"), &out, (&exact.out, &naive.out), Floor::Stored(dtype))?;
        let rstd = Host::read(&forward.rstd)?.with_columns(1).rows(&sample.at);
        hold((OP, "rstd"), &rstd, (&exact.rstd, &naive.rstd), Floor::Stored(DType::F32))
    };
    let torch = json!({ "op": OP, "part": if has_residual { "forward with residual" } else { "forward" },
        "rows": shape[0], "hidden_size": shape[1], "dtype": dtype.name() });
    Ok(Prepared::new(check, run).with_candle(candle).with_torch(torch))
}

/// As a user of candle writes it where gradients are wanted: its own fused norm has none.
fn peer(x: &Tensor, weight: &Tensor) -> Result<Run> {
    let (x, weight) = (to_candle(x)?, to_candle(weight)?);
    Ok(Run::call(move || -> candle::Result<candle::Tensor> {
        let wide = x.to_dtype(candle::DType::F32)?;
        let scale = (wide.sqr()?.mean_keepdim(1)? + f64::from(EPS))?.sqrt()?;
        wide.broadcast_div(&scale)?.to_dtype(x.dtype())?.broadcast_mul(&weight)
    }))
}

/// What separate kernels for the square, its mean, the product with rstd and the product with the weight would move, in this
/// library's own elementwise kernels: the least time of a form that is not fused. A copy has the traffic of the square and of the
/// first product.
fn unfused(context: &Context<'_>, Rows { shape, dtype }: Rows) -> Result<Prepared> {
    let x = random(context.device, shape, dtype, 1)?;
    let run = move || -> unsloth_rs::Result<Tensor> {
        reduce::sum(&elementwise::copy(&x)?)?;
        elementwise::scale(elementwise::copy(&x)?, 2.0)
    };
    let checked = run.clone();
    let input = random(context.device, shape, dtype, 1)?;
    let check = move || {
        let (out, at) = (checked()?, spread(shape[0], 3));
        let expected: Vec<f64> = Host::read(&input)?.rows(&at).iter().map(|x| 2.0 * x).collect();
        hold((OP, "out"), &Host::read(&out)?.rows(&at), (&expected, &expected), Floor::Exact)
    };
    Ok(Prepared::new(check, Run::call(run)))
}

fn backward(context: &Context<'_>, Rows { shape, dtype }: Rows, needs_dweight: bool) -> Result<Prepared> {
    let device = context.device;
    let (x, weight) = (random(device, shape, dtype, 1)?, random(device, [shape[1]], dtype, 3)?);
    let dout = random(device, shape, dtype, 4)?;
    let rstd = rms_norm::forward(x.clone(), None, &weight, EPS, 0.0)?.rstd;
    let timed = timed_backward(context, Rows { shape, dtype }, needs_dweight)?;
    let on = device.clone();
    let check = move || {
        let mut dweight = on.zeros([shape[1]], DType::F32, Category::Gradients)?;
        let inputs = Backward { dout: dout.clone(), dsum: None, sum: &x, weight: &weight, rstd: &rstd };
        let dx = rms_norm::backward(inputs, needs_dweight.then_some(&mut dweight), EPS, 0.0)?;
        // The weight's gradient is a sum over all rows.
        let at = if needs_dweight { (0..shape[0]).collect() } else { spread(shape[0], 5) };
        let dout = Host::read(&dout)?.rows(&at);
        let sample = Sample { x: Host::read(&x)?.rows(&at), residual: None, weight: Host::read(&weight)?.all(), at };
        let outputs = OutputGradients { dout: &dout, dsum: None };
        let start = vec![0.0; shape[1]];
        let (exact, naive) = references!(dtype, |a| oracle::backward(a, sample.inputs(), outputs, &start));
        let rstd = Host::read(&rstd)?.with_columns(1).rows(&sample.at);
        let term = |i: usize| (rstd[i / shape[1]] * dout[i] * sample.weight[i % shape[1]]).abs();
        let magnitude = (0..dout.len()).map(term).fold(0.0, f64::max);
        let actual = Host::read(&dx)?.rows(&sample.at);
        hold((OP, "dx"), &actual, (&exact.dx, &naive.dx), cancelling(dtype, magnitude))?;
        if !needs_dweight {
            return Ok(());
        }
        let mut columns = vec![0.0f64; shape[1]];
        for (i, dout) in dout.iter().enumerate() {
            columns[i % shape[1]] += (dout * sample.x[i] * rstd[i / shape[1]]).abs();
        }
        let magnitude = columns.into_iter().fold(0.0, f64::max);
        let (exact, naive) = (&exact.dweight, &naive.dweight);
        hold((OP, "dweight"), &Host::read(&dweight)?.all(), (exact, naive), cancelling(DType::F32, magnitude))
    };
    let part = if needs_dweight { "backward with dweight" } else { "backward" };
    let torch = json!({ "op": OP, "part": part, "rows": shape[0], "hidden_size": shape[1], "dtype": dtype.name() });
    Ok(Prepared::new(check, timed).with_torch(torch))
}

/// With rows of size 1 and weights of 1 a gradient keeps its size, however often it goes through.
fn timed_backward(context: &Context<'_>, Rows { shape, dtype }: Rows, needs_dweight: bool) -> Result<Run> {
    let device = context.device;
    let x = random_scaled(device, shape, dtype, (1, UNIFORM_TO_UNIT))?;
    let (weight, dout) = (constant(device, [shape[1]], dtype, 1.0)?, random(device, shape, dtype, 4)?);
    let rstd = rms_norm::forward(x.clone(), None, &weight, EPS, 0.0)?.rstd;
    let mut dweight = device.zeros([shape[1]], DType::F32, Category::Gradients)?;
    Ok(Run::in_place(dout, move |dout| {
        let inputs = Backward { dout, dsum: None, sum: &x, weight: &weight, rstd: &rstd };
        rms_norm::backward(inputs, needs_dweight.then_some(&mut dweight), EPS, 0.0)
    }))
}
