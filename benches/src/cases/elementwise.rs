//! `elementwise` of tensors as large as those between the matrices of a feed-forward part.

use anyhow::Result;
use serde_json::json;
use unsloth_rs::{Category, DType, Tensor, core::ops::elementwise, cpu::candle::to_candle};
use unsloth_testkit::budget::Floor;

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, constant, random},
    check::{Host, cancelling, hold, references, spread},
};

const OP: &str = "elementwise";
const FACTOR: f32 = 0.3;

/// Every operator that has a cost of its own.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let tokens = selection.tokens;
    each(&selection.models[..1], &selection.dtypes, |model, dtype| {
        let size = [tokens, model.intermediate_size];
        let shape = || (model.name, format!("{tokens} x {}", model.intermediate_size));
        let calls = [Call::Add, Call::Mul, Call::Scale, Call::Accumulate, Call::Cast, Call::Copy, Call::FillZero];
        let case = |call: Call| Case::new((OP, call.name()), shape(), dtype, move |at| prepare(at, call, size, dtype));
        calls.into_iter().map(case).collect()
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Add,
    Mul,
    Scale,
    Accumulate,
    Cast,
    Copy,
    FillZero,
}

impl Call {
    fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Mul => "mul",
            Self::Scale => "scale",
            Self::Accumulate => "accumulate",
            Self::Cast => "cast",
            Self::Copy => "copy",
            Self::FillZero => "fill_zero",
        }
    }

    /// What a call computes.
    fn result(self, a: &[f64], b: &[f64]) -> Vec<f64> {
        let pairs = a.iter().zip(b);
        match self {
            Self::Add | Self::Accumulate => pairs.map(|(a, b)| a + b).collect(),
            Self::Mul => pairs.map(|(a, b)| a * b).collect(),
            Self::Scale => a.iter().map(|a| a * f64::from(FACTOR)).collect(),
            Self::Cast | Self::Copy => a.to_vec(),
            Self::FillZero => vec![0.0; a.len()],
        }
    }
}

/// The type that `cast` casts to: f32 to half precision, half precision to f32.
fn other(dtype: DType) -> DType {
    if dtype == DType::F32 { DType::BF16 } else { DType::F32 }
}

/// A call that returns a tensor of its own.
fn apply(call: Call, a: &Tensor, b: &Tensor) -> unsloth_rs::Result<Tensor> {
    match call {
        Call::Add => elementwise::add(a.clone(), b),
        Call::Mul => elementwise::mul(a.clone(), b),
        Call::Scale => elementwise::scale(a.clone(), FACTOR),
        Call::Cast => elementwise::cast(a, other(a.dtype())),
        Call::Copy => elementwise::copy(a),
        Call::Accumulate => {
            let mut sum = elementwise::copy(&elementwise::cast(b, DType::F32)?)?;
            elementwise::accumulate(&mut sum, a).map(|()| sum)
        }
        Call::FillZero => {
            let mut x = elementwise::copy(a)?;
            elementwise::fill_zero(&mut x).map(|()| x)
        }
    }
}

fn prepare(context: &Context<'_>, call: Call, shape: [usize; 2], dtype: DType) -> Result<Prepared> {
    let device = context.device;
    let (a, b) = (random(device, shape, dtype, 1)?, random(device, shape, dtype, 2)?);
    let mut sum = device.zeros(shape, DType::F32, Category::Gradients)?;
    let mut filled = device.zeros(shape, dtype, Category::Activations)?;
    let candle = (context.with_candle && call == Call::Add).then(|| -> Result<Run> {
        let (a, b) = (to_candle(&a)?, to_candle(&b)?);
        Ok(Run::call(move || &a + &b))
    });
    let (checked_a, checked_b) = (a.clone(), b.clone());
    let check = move || {
        let (out, at) = (apply(call, &checked_a, &checked_b)?, spread(shape[0], 3));
        let (a, b) = (Host::read(&checked_a)?.rows(&at), Host::read(&checked_b)?.rows(&at));
        let (exact, naive) = references!(out.dtype(), |arith| {
            use unsloth_testkit::arith::Arith;
            call.result(&a, &b).into_iter().map(|value| arith.store(value)).collect::<Vec<f64>>()
        });
        let floor = if call == Call::FillZero { Floor::Exact } else { cancelling(out.dtype(), 1.0) };
        hold((OP, call.name()), &Host::read(&out)?.rows(&at), (&exact, &naive), floor)
    };
    // What is written over stays of its size however often: sums grow slowly, products are with 1.
    let timed = elementwise::copy(&a)?;
    let run = match call {
        Call::Add => Run::in_place(timed, move |a| elementwise::add(a, &b)),
        Call::Mul => {
            let ones = constant(device, shape, dtype, 1.0)?;
            Run::in_place(timed, move |a| elementwise::mul(a, &ones))
        }
        Call::Scale => Run::in_place(timed, |a| elementwise::scale(a, -1.0)),
        Call::Accumulate => Run::call(move || elementwise::accumulate(&mut sum, &a)),
        Call::FillZero => Run::call(move || elementwise::fill_zero(&mut filled)),
        Call::Cast | Call::Copy => Run::call(move || apply(call, &a, &b)),
    };
    let torch = json!({ "op": OP, "part": call.name(), "rows": shape[0], "columns": shape[1], "dtype": dtype.name() });
    Ok(Prepared::new(check, run).with_candle(candle.transpose()?).with_torch(torch))
}
