//! `lora_linear` at the projections of a model.

use anyhow::Result;
use serde_json::json;
use unsloth_rs::{
    Category, DType, Device, Tensor,
    core::{
        Weight,
        ops::lora_linear::{self, Adapter, Backward, ParameterGradients},
    },
};
use unsloth_testkit::{
    arith::Exact,
    oracle::{
        linear::Dims,
        lora_linear::{self as oracle, Layer},
    },
};

use super::{Selection, each, linear::projections};
use crate::{
    case::{Case, Context, Prepared, Run, random},
    check::{Host, cancelling, hold, largest, magnitudes, references, spread},
};

const OP: &str = "lora_linear";
const RANK: usize = 16;
const SCALE: f32 = 0.5;

/// Forward, and backward with all three gradients.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let tokens = selection.tokens;
    each(&selection.models, &selection.dtypes, |model, dtype| {
        let projection = |(name, in_features, out_features)| {
            let dims = Dims { rows: tokens, in_features, out_features };
            let shape = || (model.name, format!("{name} {tokens} x {in_features} -> {out_features}, rank {RANK}"));
            [
                Case::new((OP, "forward"), shape(), dtype, move |at| forward(at, dims, dtype)),
                Case::new((OP, "backward"), shape(), dtype, move |at| backward(at, dims, dtype)),
            ]
        };
        projections(&model, selection.all_calls).into_iter().flat_map(projection).collect()
    })
}

/// The tensors of a layer. Adapters are f32, as training has them.
#[derive(Clone)]
struct Tensors {
    x: Tensor,
    dense: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
}

impl Tensors {
    fn new(device: &Device, dims: Dims, dtype: DType) -> Result<Self> {
        let dense = random(device, [dims.out_features, dims.in_features], dtype, 2)?;
        Ok(Self {
            x: random(device, [dims.rows, dims.in_features], dtype, 1)?,
            weight: device.prepare_weight(dense.clone())?,
            dense,
            lora_a: random(device, [RANK, dims.in_features], DType::F32, 3)?,
            lora_b: random(device, [dims.out_features, RANK], DType::F32, 4)?,
        })
    }

    fn adapter(&self) -> Adapter<'_> {
        Adapter { lora_a: &self.lora_a, lora_b: &self.lora_b, scale: SCALE, dropout: None }
    }

    fn forward(&self) -> unsloth_rs::Result<lora_linear::Forward> {
        lora_linear::forward(&self.x, &self.weight, None, self.adapter())
    }
}

/// Values of the part of a layer that is compared.
struct Sample {
    dims: Dims,
    weight: Vec<f64>,
    lora_a: Vec<f64>,
    lora_b: Vec<f64>,
}

impl Sample {
    fn layer(&self) -> Layer<'_> {
        let Self { dims, weight, lora_a, lora_b } = self;
        let (scale, bias, keep) = (f64::from(SCALE), None, None);
        Layer { dims: *dims, weight, bias, lora_a, lora_b, rank: RANK, scale, keep }
    }

    fn magnitudes(&self) -> Self {
        let [weight, lora_a, lora_b] = [&self.weight, &self.lora_a, &self.lora_b].map(|values| magnitudes(values));
        Self { dims: self.dims, weight, lora_a, lora_b }
    }
}

fn torch(part: &str, dims: Dims, dtype: DType) -> serde_json::Value {
    let Dims { rows, in_features, out_features } = dims;
    json!({ "op": OP, "part": part, "rows": rows, "in_features": in_features, "out_features": out_features,
        "rank": RANK, "scale": SCALE, "dtype": dtype.name() })
}

fn forward(context: &Context<'_>, dims: Dims, dtype: DType) -> Result<Prepared> {
    let tensors = Tensors::new(context.device, dims, dtype)?;
    let checked = tensors.clone();
    let check = move || {
        let forward = checked.forward()?;
        let (rows, columns) = (spread(dims.rows, 4), spread(dims.out_features, 16));
        let x = Host::read(&checked.x)?.rows(&rows);
        let sample = Sample {
            dims: Dims { rows: rows.len(), out_features: columns.len(), ..dims },
            weight: Host::read(&checked.dense)?.rows(&columns),
            lora_a: Host::read(&checked.lora_a)?.all(),
            lora_b: Host::read(&checked.lora_b)?.rows(&columns),
        };
        let (exact, naive) = references!(dtype, |a| oracle::forward(a, sample.layer(), &x));
        let terms = oracle::forward(&Exact, sample.magnitudes().layer(), &magnitudes(&x));
        let y = Host::read(&forward.y)?.block(&rows, &columns);
        hold((OP, "y"), &y, (&exact.y, &naive.y), cancelling(dtype, largest(&terms.y)))?;
        let h = Host::read(&forward.h)?.rows(&rows);
        hold((OP, "h"), &h, (&exact.h, &naive.h), cancelling(DType::F32, largest(&terms.h)))
    };
    Ok(Prepared::new(check, Run::call(move || tensors.forward())).with_torch(torch("forward", dims, dtype)))
}

/// Everything that a backward pass reads and adds to.
struct Pass {
    tensors: Tensors,
    dy: Tensor,
    h: Tensor,
    dlora_a: Tensor,
    dlora_b: Tensor,
}

impl Pass {
    fn new(device: &Device, dims: Dims, dtype: DType) -> Result<Self> {
        let tensors = Tensors::new(device, dims, dtype)?;
        let zeros = |shape: [usize; 2]| device.zeros(shape, DType::F32, Category::Gradients);
        Ok(Self {
            dy: random(device, [dims.rows, dims.out_features], dtype, 5)?,
            h: tensors.forward()?.h,
            dlora_a: zeros([RANK, dims.in_features])?,
            dlora_b: zeros([dims.out_features, RANK])?,
            tensors,
        })
    }

    fn run(&mut self) -> unsloth_rs::Result<Option<Tensor>> {
        let Self { tensors, dy, h, dlora_a, dlora_b } = self;
        let adapter = tensors.adapter();
        let inputs = Backward { dy, x: &tensors.x, h, weight: &tensors.weight, adapter, needs_dx: true };
        lora_linear::backward(inputs, ParameterGradients { dlora_a: Some(dlora_a), dlora_b: Some(dlora_b) })
    }

    /// The first call's results on a few input columns, where every row counts, against the oracle.
    fn check(&mut self, dims: Dims, dtype: DType) -> Result<()> {
        let dx = self.run()?;
        let dx = Host::read(dx.as_ref().ok_or_else(|| anyhow::anyhow!("{OP}: no dx where it is wanted"))?)?;
        let columns = spread(dims.in_features, 3);
        let tensors = &self.tensors;
        let sample = Sample {
            dims: Dims { in_features: columns.len(), ..dims },
            weight: Host::read(&tensors.dense)?.columns(&columns),
            lora_a: Host::read(&tensors.lora_a)?.columns(&columns),
            lora_b: Host::read(&tensors.lora_b)?.all(),
        };
        let (x, dy) = (Host::read(&tensors.x)?.columns(&columns), Host::read(&self.dy)?.all());
        let h = Host::read(&self.h)?.all();
        let zeros = (vec![0.0; RANK * columns.len()], vec![0.0; dims.out_features * RANK]);
        let before = (&*zeros.0, &*zeros.1);
        let (exact, naive) = references!(dtype, |a| oracle::backward(a, sample.layer(), (&x, &h, &dy), before));
        let (abs_x, abs_h, abs_dy) = (magnitudes(&x), magnitudes(&h), magnitudes(&dy));
        let terms = oracle::backward(&Exact, sample.magnitudes().layer(), (&abs_x, &abs_h, &abs_dy), before);
        let (dx, dlora_a) = (dx.columns(&columns), Host::read(&self.dlora_a)?.columns(&columns));
        hold((OP, "dx"), &dx, (&exact.dx, &naive.dx), cancelling(dtype, largest(&terms.dx)))?;
        let floor = cancelling(DType::F32, largest(&terms.dlora_a));
        hold((OP, "dlora_a"), &dlora_a, (&exact.dlora_a, &naive.dlora_a), floor)?;
        let floor = cancelling(DType::F32, largest(&terms.dlora_b));
        hold((OP, "dlora_b"), &Host::read(&self.dlora_b)?.all(), (&exact.dlora_b, &naive.dlora_b), floor)
    }
}

fn backward(context: &Context<'_>, dims: Dims, dtype: DType) -> Result<Prepared> {
    let (mut timed, device) = (Pass::new(context.device, dims, dtype)?, context.device.clone());
    let check = move || Pass::new(&device, dims, dtype)?.check(dims, dtype);
    Ok(Prepared::new(check, Run::call(move || timed.run())).with_torch(torch("backward", dims, dtype)))
}
