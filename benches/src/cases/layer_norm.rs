//! `layer_norm` of a micro-batch.

use anyhow::Result;
use serde_json::json;
use unsloth_rs::{
    Category, DType, Tensor,
    core::ops::layer_norm::{self, Affine, Backward, ParameterGradients},
};
use unsloth_testkit::{
    budget::Floor,
    oracle::layer_norm::{self as oracle, OutputGradients, Start},
};

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, random},
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
        let (x, weight, bias, residual) = (x.clone(), weight.clone(), bias.clone(), residual.clone());
        move || {
            let affine = Affine { weight: &weight, bias: Some(&bias) };
            layer_norm::forward(x.clone(), residual.as_ref(), affine, EPS)
        }
    };
    let checked = run.clone();
    let check = move || {
        let forward = checked()?;
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
    Ok(Prepared::new(check, Run::call(run)).with_torch(torch))
}

fn backward(context: &Context<'_>, Rows { shape, dtype }: Rows) -> Result<Prepared> {
    let device = context.device;
    let (x, weight) = (random(device, shape, dtype, 1)?, random(device, [shape[1]], dtype, 3)?);
    let dout = random(device, shape, dtype, 4)?;
    let affine = Affine { weight: &weight, bias: None };
    let layer_norm::Forward { mean, rstd, .. } = layer_norm::forward(x.clone(), None, affine, EPS)?;
    let run = {
        let (x, weight, dout, mean, rstd) = (x.clone(), weight.clone(), dout.clone(), mean, rstd.clone());
        move |dweight: &mut Tensor, dbias: &mut Tensor| {
            let dout = dout.clone();
            let inputs = Backward { dout, dsum: None, sum: &x, weight: &weight, mean: &mean, rstd: &rstd };
            let gradients = ParameterGradients { dweight: Some(dweight), dbias: Some(dbias) };
            layer_norm::backward(inputs, gradients, EPS)
        }
    };
    let zeros = move |device: &unsloth_rs::Device| device.zeros([shape[1]], DType::F32, Category::Gradients);
    let (checked, on) = (run.clone(), device.clone());
    let check = move || {
        let (mut dweight, mut dbias) = (zeros(&on)?, zeros(&on)?);
        let dx = Host::read(&checked(&mut dweight, &mut dbias)?)?.all();
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
    let (mut dweight, mut dbias) = (zeros(device)?, zeros(device)?);
    let torch = json!({ "op": OP, "part": "backward with parameters", "rows": shape[0], "hidden_size": shape[1],
        "dtype": dtype.name() });
    let run = Run::call(move || run(&mut dweight, &mut dbias));
    Ok(Prepared::new(check, run).with_torch(torch))
}
