//! `linear` at the projections of a model, and a square product.

use anyhow::Result;
use serde_json::json;
use unsloth_rs::{Category, DType, Device, Tensor, core::ops::linear, cpu::candle::to_candle};
use unsloth_testkit::oracle::linear::{self as oracle, Dims};

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, random},
    check::{Host, cancelling, hold, largest, magnitudes, references, spread},
    models::ModelShape,
};

const OP: &str = "linear";
const SQUARE: usize = 2048;
/// Rows and columns of a result that are compared with the oracle.
const SAMPLE: (usize, usize) = (4, 16);

/// Name, inputs and outputs of a model's projections; those that take longest first.
pub(super) fn projections(model: &ModelShape, all: bool) -> Vec<(&'static str, usize, usize)> {
    let ModelShape { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, .. } = *model;
    let mut found = vec![("gate_proj", hidden_size, intermediate_size), ("down_proj", intermediate_size, hidden_size)];
    if all {
        found.push(("q_proj", hidden_size, num_heads * head_dim));
        found.push(("k_proj", hidden_size, num_kv_heads * head_dim));
    }
    found
}

/// The three products of each projection, its forward pass for one row, and a square product.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let tokens = selection.tokens;
    let square = |&dtype: &DType| {
        let dims = Dims { rows: SQUARE, in_features: SQUARE, out_features: SQUARE };
        case(Product::Forward, ("square", "matmul"), dims, dtype)
    };
    let mut cases: Vec<Case> = selection.dtypes.iter().map(square).collect();
    cases.extend(each(&selection.models, &selection.dtypes, |model, dtype| {
        let projection = |(name, in_features, out_features)| {
            let dims = Dims { rows: tokens, in_features, out_features };
            let part = |product, rows| case(product, (model.name, name), Dims { rows, ..dims }, dtype);
            let mut parts = vec![part(Product::Forward, tokens), part(Product::InputGradient, tokens)];
            if selection.all_calls || name == "gate_proj" {
                parts.extend([part(Product::WeightGradient, tokens), part(Product::Forward, 1)]);
            }
            parts
        };
        projections(&model, selection.all_calls).into_iter().flat_map(projection).collect()
    }));
    cases
}

#[derive(Clone, Copy)]
enum Product {
    Forward,
    InputGradient,
    WeightGradient,
}

impl Product {
    fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::InputGradient => "input gradient",
            Self::WeightGradient => "weight gradient",
        }
    }
}

fn case(product: Product, (model, projection): (&str, &str), dims: Dims, dtype: DType) -> Case {
    let Dims { rows, in_features, out_features } = dims;
    let shape = format!("{projection} {rows} x {in_features} -> {out_features}");
    Case::new((OP, product.name()), (model, shape), dtype, move |context| {
        let torch = json!({ "op": OP, "part": product.name(), "rows": rows, "in_features": in_features,
            "out_features": out_features, "dtype": dtype.name() });
        let prepared = match product {
            Product::Forward => forward(context, dims, dtype),
            Product::InputGradient => input_gradient(context, dims, dtype),
            Product::WeightGradient => weight_gradient(context.device, dims, dtype),
        };
        Ok(prepared?.with_torch(torch))
    })
}

/// Holds sums of products to the oracle's, given what it makes of the inputs and of their magnitudes.
fn hold_sums(name: &str, actual: &[f64], results: (Vec<f64>, Vec<f64>), terms: &[f64], dtype: DType) -> Result<()> {
    hold((OP, name), actual, (&results.0, &results.1), cancelling(dtype, largest(terms)))
}

fn forward(context: &Context<'_>, dims: Dims, dtype: DType) -> Result<Prepared> {
    let device = context.device;
    let x = random(device, [dims.rows, dims.in_features], dtype, 1)?;
    let dense = random(device, [dims.out_features, dims.in_features], dtype, 2)?;
    let candle = context.with_candle.then(|| peer(&x, &dense)).transpose()?;
    let weight = device.prepare_weight(dense.clone())?;
    let run = {
        let x = x.clone();
        move || linear::forward(&x, &weight, None)
    };
    let checked = run.clone();
    let check = move || {
        let y = Host::read(&checked()?)?;
        let (rows, columns) = (spread(dims.rows, SAMPLE.0), spread(dims.out_features, SAMPLE.1));
        let dims = Dims { rows: rows.len(), out_features: columns.len(), ..dims };
        let (x, w) = (Host::read(&x)?.rows(&rows), Host::read(&dense)?.rows(&columns));
        let results = references!(dtype, |a| oracle::forward(a, dims, &x, &w, None));
        let terms = oracle::forward(&unsloth_testkit::arith::Exact, dims, &magnitudes(&x), &magnitudes(&w), None);
        hold_sums("y", &y.block(&rows, &columns), results, &terms, dtype)
    };
    Ok(Prepared::new(check, Run::call(run)).with_candle(candle))
}

fn peer(x: &Tensor, dense: &Tensor) -> Result<Run> {
    let (x, weight) = (to_candle(x)?, to_candle(dense)?.t()?);
    Ok(Run::call(move || x.matmul(&weight)))
}

fn input_gradient(context: &Context<'_>, dims: Dims, dtype: DType) -> Result<Prepared> {
    let device = context.device;
    let dy = random(device, [dims.rows, dims.out_features], dtype, 1)?;
    let dense = random(device, [dims.out_features, dims.in_features], dtype, 2)?;
    let candle = context.with_candle.then(|| -> Result<Run> {
        let (dy, weight) = (to_candle(&dy)?, to_candle(&dense)?);
        Ok(Run::call(move || dy.matmul(&weight)))
    });
    let weight = device.prepare_weight(dense.clone())?;
    let run = {
        let dy = dy.clone();
        move || linear::input_gradient(&dy, &weight)
    };
    let checked = run.clone();
    let check = move || {
        let dx = Host::read(&checked()?)?;
        let (rows, columns) = (spread(dims.rows, SAMPLE.0), spread(dims.in_features, SAMPLE.1));
        let dims = Dims { rows: rows.len(), in_features: columns.len(), ..dims };
        let (dy, w) = (Host::read(&dy)?.rows(&rows), Host::read(&dense)?.columns(&columns));
        let results = references!(dtype, |a| oracle::input_gradient(a, dims, &dy, &w));
        let terms = oracle::input_gradient(&unsloth_testkit::arith::Exact, dims, &magnitudes(&dy), &magnitudes(&w));
        hold_sums("dx", &dx.block(&rows, &columns), results, &terms, dtype)
    };
    Ok(Prepared::new(check, Run::call(run)).with_candle(candle.transpose()?))
}

fn weight_gradient(device: &Device, dims: Dims, dtype: DType) -> Result<Prepared> {
    let dy = random(device, [dims.rows, dims.out_features], dtype, 1)?;
    let x = random(device, [dims.rows, dims.in_features], dtype, 2)?;
    let zeros =
        move |device: &Device| device.zeros([dims.out_features, dims.in_features], DType::F32, Category::Gradients);
    let mut dweight = zeros(device)?;
    let (checked_dy, checked_x, on) = (dy.clone(), x.clone(), device.clone());
    let check = move || {
        let (dy, x) = (&checked_dy, &checked_x);
        let mut dweight = zeros(&on)?;
        linear::weight_gradient(dy, x, &mut dweight)?;
        let (rows, columns) = (spread(dims.out_features, SAMPLE.1), spread(dims.in_features, SAMPLE.1));
        let dims = Dims { in_features: columns.len(), out_features: rows.len(), ..dims };
        let (dy, x) = (Host::read(dy)?.columns(&rows), Host::read(x)?.columns(&columns));
        let before = vec![0.0; rows.len() * columns.len()];
        let results = references!(dtype, |a| oracle::weight_gradient(a, dims, &dy, &x, &before));
        let (dy, x) = (magnitudes(&dy), magnitudes(&x));
        let terms = oracle::weight_gradient(&unsloth_testkit::arith::Exact, dims, &dy, &x, &before);
        hold_sums("dweight", &Host::read(&dweight)?.block(&rows, &columns), results, &terms, DType::F32)
    };
    Ok(Prepared::new(check, Run::call(move || linear::weight_gradient(&dy, &x, &mut dweight))))
}
