//! The products with weights by their oracles.

use unsloth_core::{
    Result, Tensor, Weight,
    ops::{dora, linear, lora_linear},
};
use unsloth_oracle::{self as oracle, arith::Exact, linear::Dims};

use crate::{
    backend::{ExactBackend, overwrite, tensor, values},
    ops::{by_rows, matrix, optional, unsupported},
};

pub(crate) fn dims(spec: &linear::Spec) -> Dims {
    Dims { rows: spec.rows, in_features: spec.in_features, out_features: spec.out_features }
}

impl linear::Linear for ExactBackend {
    fn linear_forward(
        &self,
        spec: &linear::Spec,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (rows, weight, bias) = (values(x)?, matrix(weight)?, optional(bias)?);
        let y = by_rows(dims(spec), &rows, spec.in_features, |dims, x| {
            oracle::linear::forward(&Exact, dims, x, &weight, bias.as_deref())
        });
        tensor(x, [spec.rows, spec.out_features], y)
    }
    fn linear_input_gradient(&self, spec: &linear::Spec, dy: &Tensor, weight: &Weight) -> Result<Tensor> {
        let (rows, weight) = (values(dy)?, matrix(weight)?);
        let dx = by_rows(dims(spec), &rows, spec.out_features, |dims, dy| {
            oracle::linear::input_gradient(&Exact, dims, dy, &weight)
        });
        tensor(dy, [spec.rows, spec.in_features], dx)
    }
    fn linear_weight_gradient(&self, spec: &linear::Spec, dy: &Tensor, x: &Tensor, dweight: &mut Tensor) -> Result<()> {
        let before = values(dweight)?;
        let sums = oracle::linear::weight_gradient(&Exact, dims(spec), &values(dy)?, &values(x)?, &before);
        overwrite(("linear", "dweight"), dweight, &sums)
    }
    fn linear_bias_gradient(&self, spec: &linear::Spec, dy: &Tensor, dbias: &mut Tensor) -> Result<()> {
        let sums = oracle::linear::bias_gradient(&Exact, dims(spec), &values(dy)?, &values(dbias)?);
        overwrite(("linear", "dbias"), dbias, &sums)
    }
}

impl lora_linear::LoraLinear for ExactBackend {
    fn lora_linear_hidden(
        &self,
        spec: &lora_linear::Spec,
        x: &Tensor,
        adapter: lora_linear::Adapter<'_>,
    ) -> Result<Tensor> {
        if spec.dropout.is_some() {
            return unsupported("lora_linear", "dropout");
        }
        let lora_a = values(adapter.lora_a)?;
        let h = oracle::lora_linear::hidden(&Exact, layer(spec, (&[], None), (&lora_a, &[])), &values(x)?);
        tensor(x, [spec.base.rows, spec.rank], h)
    }
    fn lora_linear_forward(
        &self,
        spec: &lora_linear::Spec,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        adapter: lora_linear::Adapter<'_>,
    ) -> Result<lora_linear::Forward> {
        if spec.dropout.is_some() {
            return unsupported("lora_linear", "dropout");
        }
        let (weight, bias) = (matrix(weight)?, optional(bias)?);
        let (lora_a, lora_b) = (values(adapter.lora_a)?, values(adapter.lora_b)?);
        let layer = layer(spec, (&weight, bias.as_deref()), (&lora_a, &lora_b));
        let found = oracle::lora_linear::forward(&Exact, layer, &values(x)?);
        let y = tensor(x, [spec.base.rows, spec.base.out_features], found.y)?;
        Ok(lora_linear::Forward { y, h: tensor(x, [spec.base.rows, spec.rank], found.h)? })
    }
    fn lora_linear_backward(
        &self,
        spec: &lora_linear::Spec,
        inputs: lora_linear::Backward<'_>,
        gradients: lora_linear::ParameterGradients<'_>,
    ) -> Result<Option<Tensor>> {
        let weight = matrix(inputs.weight)?;
        let (lora_a, lora_b) = (values(inputs.adapter.lora_a)?, values(inputs.adapter.lora_b)?);
        let layer = layer(spec, (&weight, None), (&lora_a, &lora_b));
        let start = |gradient: Option<&Tensor>, len| gradient.map_or_else(|| Ok(vec![0.0; len]), values);
        let before_a = start(gradients.dlora_a.as_deref(), lora_a.len())?;
        let before_b = start(gradients.dlora_b.as_deref(), lora_b.len())?;
        let passed = (&values(inputs.x)?[..], &values(inputs.h)?[..], &values(inputs.dy)?[..]);
        let found = oracle::lora_linear::backward(&Exact, layer, passed, (&before_a, &before_b));
        let sums = [("dlora_a", gradients.dlora_a, found.dlora_a), ("dlora_b", gradients.dlora_b, found.dlora_b)];
        for (arg, gradient, sums) in sums {
            gradient.map_or(Ok(()), |gradient| overwrite(("lora_linear", arg), gradient, &sums))?;
        }
        let shape = [spec.base.rows, spec.base.in_features];
        inputs.needs_dx.then(|| tensor(inputs.x, shape, found.dx)).transpose()
    }
}

fn layer<'a>(
    spec: &lora_linear::Spec,
    (weight, bias): (&'a [f64], Option<&'a [f64]>),
    (lora_a, lora_b): (&'a [f64], &'a [f64]),
) -> oracle::lora_linear::Layer<'a> {
    let (rank, scale) = (spec.rank, f64::from(spec.scale));
    oracle::lora_linear::Layer { dims: dims(&spec.base), weight, bias, lora_a, lora_b, rank, scale, keep: None }
}

impl dora::Dora for ExactBackend {
    fn dora_norms(&self, spec: &dora::NormSpec, weight: &Weight, lora_a: &Tensor, lora_b: &Tensor) -> Result<Tensor> {
        let (weight, a, b) = (matrix(weight)?, values(lora_a)?, values(lora_b)?);
        let (in_features, scale) = (spec.in_features, f64::from(spec.scale));
        let adapted = oracle::dora::Adapted { weight: &weight, lora_a: &a, lora_b: &b, in_features, scale };
        tensor(lora_a, [spec.out_features], oracle::dora::norms(&Exact, adapted))
    }
    fn dora_forward(
        &self,
        spec: &dora::Spec,
        t: &Tensor,
        lengths: dora::Lengths<'_>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let bias = optional(bias)?.unwrap_or_else(|| vec![0.0; spec.out_features]);
        let lengths = (&values(lengths.magnitude)?[..], &values(lengths.norms)?[..]);
        tensor(t, *t.shape(), oracle::dora::forward(&Exact, &values(t)?, lengths, &bias))
    }
    fn dora_backward(
        &self,
        _spec: &dora::Spec,
        dy: Tensor,
        t: &Tensor,
        lengths: dora::Lengths<'_>,
        dmagnitude: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let lengths = (&values(lengths.magnitude)?[..], &values(lengths.norms)?[..]);
        let found = oracle::dora::backward(&Exact, &values(&dy)?, &values(t)?, lengths);
        if let Some(dmagnitude) = dmagnitude {
            let sums = oracle::elementwise::accumulate(&Exact, &values(dmagnitude)?, &found.dmagnitude);
            overwrite(("dora", "dmagnitude"), dmagnitude, &sums)?;
        }
        tensor(t, *t.shape(), found.dt)
    }
}
