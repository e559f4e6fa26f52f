//! `glu` of a micro-batch.

use anyhow::Result;
use serde_json::json;
use unsloth_rs::{
    DType, Tensor,
    core::ops::{
        elementwise,
        glu::{self, Activation},
    },
    cpu::candle::to_candle,
};
use unsloth_testkit::{budget::Floor, oracle::glu as oracle};

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, constant, random},
    check::{Host, cancelling, hold, references, spread},
};

const OP: &str = "glu";

/// SwiGLU forward and backward, its unfused traffic, and GeGLU where all calls are wanted.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let tokens = selection.tokens;
    let activations =
        [("silu", Activation::Silu), ("gelu_tanh", Activation::GeluTanh), ("gelu_erf", Activation::GeluErf)];
    let activations = if selection.all_calls { &activations[..] } else { &activations[..1] };
    each(&selection.models, &selection.dtypes, |model, dtype| {
        let size = [tokens, model.intermediate_size];
        let shape = || (model.name, format!("{tokens} x {}", model.intermediate_size));
        let mut cases = Vec::new();
        for &(name, activation) in activations {
            let (part, back) = (format!("forward {name}"), format!("backward {name}"));
            cases
                .push(Case::new((OP, &part), shape(), dtype, move |at| forward(at, (size, dtype), (name, activation))));
            cases.push(Case::new((OP, &back), shape(), dtype, move |at| {
                backward(at, (size, dtype), (name, activation))
            }));
        }
        let unfused = move |at: &Context<'_>| unfused(at, (size, dtype));
        cases.push(Case::new((OP, "forward, unfused traffic"), shape(), dtype, unfused));
        cases
    })
}

/// Rows of inputs that are compared.
fn sample(tensors: &[&Tensor]) -> Result<Vec<Vec<f64>>> {
    let at = spread(tensors[0].shape()[0], 4);
    tensors.iter().map(|tensor| Ok(Host::read(tensor)?.rows(&at))).collect()
}

type Sized = ([usize; 2], DType);

fn forward(context: &Context<'_>, (shape, dtype): Sized, (name, activation): (&str, Activation)) -> Result<Prepared> {
    let (gate, up) = (random(context.device, shape, dtype, 1)?, random(context.device, shape, dtype, 2)?);
    let candle = (context.with_candle && activation == Activation::Silu).then(|| peer(&gate, &up)).transpose()?;
    let run = {
        let (gate, up) = (gate.clone(), up.clone());
        move || glu::forward(&gate, &up, activation)
    };
    let checked = run.clone();
    let check = move || {
        let values = sample(&[&gate, &up, &checked()?])?;
        let (exact, naive) = references!(dtype, |a| oracle::forward(a, &values[0], &values[1], activation));
        // Inputs are below 1: no term is larger.
        hold((OP, "out"), &values[2], (&exact, &naive), cancelling(dtype, 1.0))
    };
    let torch = json!({ "op": OP, "part": format!("forward {name}"), "rows": shape[0], "columns": shape[1],
        "dtype": dtype.name() });
    Ok(Prepared::new(check, Run::call(run)).with_candle(candle).with_torch(torch))
}

fn peer(gate: &Tensor, up: &Tensor) -> Result<Run> {
    let (gate, up) = (to_candle(gate)?, to_candle(up)?);
    Ok(Run::call(move || gate.silu()? * &up))
}

fn backward(context: &Context<'_>, (shape, dtype): Sized, (name, activation): (&str, Activation)) -> Result<Prepared> {
    let device = context.device;
    let (gate, up) = (random(device, shape, dtype, 1)?, random(device, shape, dtype, 2)?);
    let dout = random(device, shape, dtype, 3)?;
    // At a large gate an activation is the identity: with a `dout` of 1 the two gradients are `up` and `gate`, call after call.
    let (large, ones) = (|| constant(device, shape, dtype, 24.0), constant(device, shape, dtype, 1.0)?);
    let run = Run::in_place((large()?, large()?), move |(gate, up)| {
        glu::backward(&ones, gate, up, activation).map(|gradients| (gradients.dgate, gradients.dup))
    });
    let check = move || {
        let gradients = glu::backward(&dout, gate.clone(), up.clone(), activation)?;
        let values = sample(&[&dout, &gate, &up, &gradients.dgate, &gradients.dup])?;
        let inputs = (&*values[1], &*values[2]);
        let (exact, naive) = references!(dtype, |a| oracle::backward(a, &values[0], inputs, activation));
        hold((OP, "dgate"), &values[3], (&exact.dgate, &naive.dgate), cancelling(dtype, 1.0))?;
        hold((OP, "dup"), &values[4], (&exact.dup, &naive.dup), cancelling(dtype, 1.0))
    };
    let torch = json!({ "op": OP, "part": format!("backward {name}"), "rows": shape[0], "columns": shape[1],
        "dtype": dtype.name() });
    Ok(Prepared::new(check, run).with_torch(torch))
}

/// What separate kernels for the activation and the product would move, in this library's own elementwise kernels: a copy has the
/// traffic of the activation.
fn unfused(context: &Context<'_>, (shape, dtype): Sized) -> Result<Prepared> {
    let (gate, up) = (random(context.device, shape, dtype, 1)?, random(context.device, shape, dtype, 2)?);
    let run = {
        let (gate, up) = (gate.clone(), up.clone());
        move || elementwise::mul(elementwise::copy(&gate)?, &up)
    };
    let checked = run.clone();
    let check = move || {
        let values = sample(&[&gate, &up, &checked()?])?;
        let exact: Vec<f64> = values[0].iter().zip(&values[1]).map(|(gate, up)| gate * up).collect();
        hold((OP, "out"), &values[2], (&exact, &exact), Floor::Stored(dtype))
    };
    Ok(Prepared::new(check, Run::call(run)))
}
