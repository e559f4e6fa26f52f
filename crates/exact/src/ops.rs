//! Every operator of a model by its oracle.

use rayon::prelude::*;
use unsloth_core::{
    DType, Error, KvView, Lengths, Result, Sequences, Tensor, Weight,
    ops::{
        attention,
        cross_entropy::{self, IGNORE_INDEX},
        elementwise, embedding, glu, layer_norm, linear_cross_entropy, reduce, rms_norm, rope,
    },
};
use unsloth_oracle::{self as oracle, arith::Exact, linear::Dims};

use crate::backend::{ExactBackend, integers, overwrite, tensor, values};

/// The elements of a weight.
pub(crate) fn matrix(weight: &Weight) -> Result<Vec<f64>> {
    values(&weight.to_dense()?)
}

pub(crate) fn optional(tensor: Option<&Tensor>) -> Result<Option<Vec<f64>>> {
    tensor.map(values).transpose()
}

pub(crate) fn unsupported<T>(op: &'static str, what: &'static str) -> Result<T> {
    Err(Error::Unsupported { op, what, device: "exact".to_owned() })
}

/// Indices of a table with so many rows.
fn indices(op: &'static str, field: &'static str, tensor: &Tensor, len: usize) -> Result<Vec<i32>> {
    let found = integers(tensor)?;
    let is_inside = |index: &&i32| usize::try_from(**index).is_ok_and(|index| index < len);
    match found.iter().find(|index| !is_inside(index)) {
        Some(index) => Err(Error::InvalidSpec {
            op,
            field,
            value: index.to_string(),
            rule: "0 or more and below the table's size",
        }),
        None => Ok(found),
    }
}

/// Classes, of which there are so many, or no target.
fn targets(op: &'static str, tensor: &Tensor, num_classes: usize) -> Result<Vec<i32>> {
    let found = integers(tensor)?;
    let is_good = |target: &&i32| **target == IGNORE_INDEX || usize::try_from(**target).is_ok_and(|t| t < num_classes);
    match found.iter().find(|target| !is_good(target)) {
        Some(target) => {
            let value = target.to_string();
            Err(Error::InvalidSpec {
                op,
                field: "targets",
                value,
                rule: "-100, or 0 or more and below the vocabulary's size",
            })
        }
        None => Ok(found),
    }
}

/// Runs an oracle on blocks of rows side by side: rows of `rows` have `width` elements.
pub(crate) fn by_rows(
    dims: Dims,
    rows: &[f64],
    width: usize,
    run: impl Fn(Dims, &[f64]) -> Vec<f64> + Sync,
) -> Vec<f64> {
    const BLOCK: usize = 4;
    let block = |rows: &[f64]| run(Dims { rows: rows.len() / width, ..dims }, rows);
    if width == 0 {
        return run(dims, rows);
    }
    rows.par_chunks(BLOCK * width).flat_map_iter(block).collect()
}

impl elementwise::Elementwise for ExactBackend {
    fn add(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        tensor(&a, *a.shape(), oracle::elementwise::add(&Exact, &values(&a)?, &values(b)?))
    }
    fn mul(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        tensor(&a, *a.shape(), oracle::elementwise::mul(&Exact, &values(&a)?, &values(b)?))
    }
    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        tensor(&x, *x.shape(), oracle::elementwise::scale(&Exact, &values(&x)?, f64::from(factor)))
    }
    fn scale_by(&self, x: Tensor, scalar: &Tensor) -> Result<Tensor> {
        tensor(&x, *x.shape(), oracle::elementwise::scale(&Exact, &values(&x)?, values(scalar)?[0]))
    }
    fn accumulate(&self, accumulator: &mut Tensor, x: &Tensor) -> Result<()> {
        let sums = oracle::elementwise::accumulate(&Exact, &values(accumulator)?, &values(x)?);
        overwrite(("accumulate", "accumulator"), accumulator, &sums)
    }
    /// There is one float type.
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        Err(Error::UnsupportedDType { op: "cast", dtype, device: x.device().name() })
    }
    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        if x.dtype() == DType::I32 {
            return x.device().from_slice(&integers(x)?, *x.shape(), x.buffer().category());
        }
        let copy = tensor(x, *x.shape(), values(x)?)?;
        copy.retag(x.buffer().category());
        Ok(copy)
    }
    fn fill_zero(&self, x: &mut Tensor) -> Result<()> {
        if x.dtype() == DType::I32 {
            return x.write(&vec![0i32; x.num_elements()]);
        }
        overwrite(("fill_zero", "x"), x, &vec![0.0; x.num_elements()])
    }
}

impl reduce::Reduce for ExactBackend {
    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        tensor(x, [1], vec![oracle::reduce::sum(&Exact, &values(x)?)])
    }
    fn all_finite(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        let mut is_finite = true;
        for tensor in tensors {
            is_finite &= values(tensor)?.iter().all(|value| value.is_finite());
        }
        tensor(tensors[0], [1], vec![if is_finite { 1.0 } else { 0.0 }])
    }
    fn grad_norm(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        let all = tensors.iter().map(|tensor| values(tensor)).collect::<Result<Vec<_>>>()?;
        tensor(tensors[0], [1], vec![oracle::reduce::grad_norm(&Exact, &all)])
    }
}

impl embedding::Embedding for ExactBackend {
    fn embedding_forward(&self, spec: &embedding::Spec, weight: &Weight, ids: &Tensor) -> Result<Tensor> {
        let rows = indices("embedding", "ids", ids, spec.vocab_size)?;
        let out = oracle::embedding::forward(&Exact, &matrix(weight)?, &rows, spec.hidden_size);
        tensor(ids, [spec.tokens, spec.hidden_size], out)
    }
    fn embedding_backward(
        &self,
        spec: &embedding::Spec,
        ids: &Tensor,
        dout: &Tensor,
        dweight: &mut Tensor,
    ) -> Result<()> {
        let rows = indices("embedding", "ids", ids, spec.vocab_size)?;
        let before = values(dweight)?;
        let sums = oracle::embedding::backward(&Exact, &before, &rows, &values(dout)?, spec.hidden_size);
        overwrite(("embedding", "dweight"), dweight, &sums)
    }
}

impl rms_norm::RmsNorm for ExactBackend {
    fn rms_norm_forward(
        &self,
        spec: &rms_norm::Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        weight: &Tensor,
    ) -> Result<rms_norm::Forward> {
        let (rows, residual, weight) = (values(&x)?, optional(residual)?, values(weight)?);
        let inputs = oracle::rms_norm::Inputs {
            x: &rows,
            residual: residual.as_deref(),
            weight: &weight,
            eps: f64::from(spec.eps),
            weight_offset: f64::from(spec.weight_offset),
        };
        let found = oracle::rms_norm::forward(&Exact, inputs);
        let sum = residual.is_some().then(|| tensor(&x, *x.shape(), found.sum)).transpose()?;
        let (out, rstd) = (tensor(&x, *x.shape(), found.out)?, tensor(&x, [spec.rows], found.rstd)?);
        Ok(rms_norm::Forward { out, sum, rstd })
    }
    fn rms_norm_backward(
        &self,
        spec: &rms_norm::Spec,
        inputs: rms_norm::Backward<'_>,
        dweight: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let (x, weight, dout) = (values(inputs.sum)?, values(inputs.weight)?, values(&inputs.dout)?);
        let dsum = optional(inputs.dsum)?;
        let start = dweight.as_deref().map_or_else(|| Ok(vec![0.0; spec.hidden_size]), values)?;
        let forward = oracle::rms_norm::Inputs {
            x: &x,
            residual: None,
            weight: &weight,
            eps: f64::from(spec.eps),
            weight_offset: f64::from(spec.weight_offset),
        };
        let gradients = oracle::rms_norm::OutputGradients { dout: &dout, dsum: dsum.as_deref() };
        let found = oracle::rms_norm::backward(&Exact, forward, gradients, &start);
        if let Some(dweight) = dweight {
            overwrite(("rms_norm", "dweight"), dweight, &found.dweight)?;
        }
        tensor(inputs.sum, *inputs.sum.shape(), found.dx)
    }
}

impl layer_norm::LayerNorm for ExactBackend {
    fn layer_norm_forward(
        &self,
        spec: &layer_norm::Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        affine: layer_norm::Affine<'_>,
    ) -> Result<layer_norm::Forward> {
        let (rows, residual) = (values(&x)?, optional(residual)?);
        let (weight, bias) = (values(affine.weight)?, optional(affine.bias)?);
        let (residual, bias) = (residual.as_deref(), bias.as_deref());
        let inputs = oracle::layer_norm::Inputs { x: &rows, residual, weight: &weight, bias, eps: f64::from(spec.eps) };
        let found = oracle::layer_norm::forward(&Exact, inputs);
        let sum = residual.is_some().then(|| tensor(&x, *x.shape(), found.sum)).transpose()?;
        let statistic = |values| tensor(&x, [spec.rows], values);
        let (mean, rstd) = (statistic(found.mean)?, statistic(found.rstd)?);
        Ok(layer_norm::Forward { out: tensor(&x, *x.shape(), found.out)?, sum, mean, rstd })
    }
    fn layer_norm_backward(
        &self,
        spec: &layer_norm::Spec,
        inputs: layer_norm::Backward<'_>,
        gradients: layer_norm::ParameterGradients<'_>,
    ) -> Result<Tensor> {
        let (x, weight, dout) = (values(inputs.sum)?, values(inputs.weight)?, values(&inputs.dout)?);
        let dsum = optional(inputs.dsum)?;
        let layer_norm::ParameterGradients { dweight, dbias } = gradients;
        let start = |gradient: Option<&Tensor>| gradient.map_or_else(|| Ok(vec![0.0; spec.hidden_size]), values);
        let (of_weight, of_bias) = (start(dweight.as_deref())?, start(dbias.as_deref())?);
        let start = oracle::layer_norm::Start { dweight: &of_weight, dbias: &of_bias };
        let eps = f64::from(spec.eps);
        let forward = oracle::layer_norm::Inputs { x: &x, residual: None, weight: &weight, bias: None, eps };
        let outputs = oracle::layer_norm::OutputGradients { dout: &dout, dsum: dsum.as_deref() };
        let found = oracle::layer_norm::backward(&Exact, forward, outputs, start);
        for (arg, gradient, values) in [("dweight", dweight, found.dweight), ("dbias", dbias, found.dbias)] {
            if let Some(gradient) = gradient {
                overwrite(("layer_norm", arg), gradient, &values)?;
            }
        }
        tensor(inputs.sum, *inputs.sum.shape(), found.dx)
    }
}

impl rope::Rope for ExactBackend {
    fn rope(&self, spec: &rope::Spec, q: Tensor, k: Tensor, angles: rope::Angles<'_>) -> Result<(Tensor, Tensor)> {
        let (cos, sin) = (values(angles.cos)?, values(angles.sin)?);
        let positions = indices("rope", "positions", angles.positions, spec.num_positions)?;
        let rotation = oracle::rope::Rotation {
            cos: &cos,
            sin: &sin,
            positions: &positions,
            head_dim: spec.head_dim,
            layout: spec.layout,
            direction: spec.direction,
        };
        let rotated = |x: &Tensor| tensor(x, *x.shape(), oracle::rope::rotate(&Exact, &values(x)?, rotation));
        Ok((rotated(&q)?, rotated(&k)?))
    }
}

impl glu::Glu for ExactBackend {
    fn glu_forward(&self, spec: &glu::Spec, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let out = oracle::glu::forward(&Exact, &values(gate)?, &values(up)?, spec.activation);
        tensor(gate, *gate.shape(), out)
    }
    fn glu_backward(&self, spec: &glu::Spec, dout: &Tensor, gate: Tensor, up: Tensor) -> Result<glu::Gradients> {
        let inputs = (&values(&gate)?[..], &values(&up)?[..]);
        let found = oracle::glu::backward(&Exact, &values(dout)?, inputs, spec.activation);
        let (dgate, dup) = (tensor(&gate, *gate.shape(), found.dgate)?, tensor(&up, *up.shape(), found.dup)?);
        Ok(glu::Gradients { dgate, dup })
    }
}

/// The heads, masks and boundaries of an attention.
fn problem(spec: &attention::Spec, q: &Sequences, k: &Sequences) -> oracle::attention::Problem {
    let lengths = |sequences: &Sequences| sequences.offsets().windows(2).map(|pair| pair[1] - pair[0]).collect();
    oracle::attention::Problem {
        num_heads: spec.num_heads,
        num_kv_heads: spec.num_kv_heads,
        head_dim: spec.head_dim,
        options: spec.options,
        lens_q: lengths(q),
        lens_k: lengths(k),
    }
}

impl attention::Attention for ExactBackend {
    fn attention_forward(&self, spec: &attention::Spec, inputs: attention::Inputs<'_>) -> Result<attention::Forward> {
        let problem = problem(spec, inputs.seq_q, inputs.seq_k);
        let (q, k, v) = (values(inputs.q)?, values(inputs.k)?, values(inputs.v)?);
        let found = oracle::attention::forward(&Exact, &problem, oracle::attention::Inputs { q: &q, k: &k, v: &v });
        let lse = tensor(inputs.q, [spec.num_heads, problem.tokens_q()], found.lse)?;
        Ok(attention::Forward { out: tensor(inputs.q, *inputs.q.shape(), found.out)?, lse })
    }
    fn attention_backward(
        &self,
        spec: &attention::Spec,
        inputs: attention::Inputs<'_>,
        backward: attention::Backward<'_>,
    ) -> Result<attention::Gradients> {
        let problem = problem(spec, inputs.seq_q, inputs.seq_k);
        let (q, k, v) = (values(inputs.q)?, values(inputs.k)?, values(inputs.v)?);
        let x = oracle::attention::Inputs { q: &q, k: &k, v: &v };
        let forward = oracle::attention::Forward { out: values(backward.out)?, lse: values(backward.lse)? };
        let found = oracle::attention::backward(&Exact, &problem, x, &values(backward.dout)?, &forward);
        let like = |x: &Tensor, values| tensor(x, *x.shape(), values);
        let (dq, dk) = (like(inputs.q, found.dq)?, like(inputs.k, found.dk)?);
        Ok(attention::Gradients { dq, dk, dv: like(inputs.v, found.dv)? })
    }
    fn attention_cached(
        &self,
        _spec: &attention::Spec,
        _q: &Tensor,
        _seq_q: &Sequences,
        _kv: KvView<'_>,
    ) -> Result<Tensor> {
        unsupported("attention", "past keys")
    }
    fn kv_append(&self, _cache: &mut Tensor, _rows: &Tensor, _seqs: &Sequences, _start: &Lengths) -> Result<()> {
        unsupported("kv_append", "past keys")
    }
}

impl cross_entropy::CrossEntropy for ExactBackend {
    fn cross_entropy_forward(
        &self,
        spec: &cross_entropy::Spec,
        logits: &Tensor,
        classes: &Tensor,
    ) -> Result<cross_entropy::Forward> {
        let classes = targets("cross_entropy", classes, spec.vocab_size)?;
        let found = oracle::cross_entropy::forward(&Exact, &spec.loss, &values(logits)?, &classes);
        let lse = tensor(logits, [spec.tokens], found.lse)?;
        Ok(cross_entropy::Forward { loss: tensor(logits, [1], vec![found.loss])?, lse })
    }
    fn cross_entropy_backward(
        &self,
        spec: &cross_entropy::Spec,
        logits: Tensor,
        classes: &Tensor,
        lse: &Tensor,
    ) -> Result<Tensor> {
        let classes = targets("cross_entropy", classes, spec.vocab_size)?;
        let found = oracle::cross_entropy::backward(&Exact, &spec.loss, &values(&logits)?, &classes, &values(lse)?);
        tensor(&logits, *logits.shape(), found)
    }
}

impl linear_cross_entropy::LinearCrossEntropy for ExactBackend {
    /// The parts that [`oracle::linear_cross_entropy`] puts together, but for gradients that nobody wants.
    fn linear_cross_entropy(
        &self,
        spec: &linear_cross_entropy::Spec,
        x: &Tensor,
        weight: &Weight,
        classes: &Tensor,
        dweight: Option<&mut Tensor>,
    ) -> Result<linear_cross_entropy::Forward> {
        let classes = targets("linear_cross_entropy", classes, spec.vocab_size)?;
        let (rows, weight) = (values(x)?, matrix(weight)?);
        let dims = Dims { rows: spec.tokens, in_features: spec.hidden_size, out_features: spec.vocab_size };
        let logits =
            by_rows(dims, &rows, spec.hidden_size, |dims, x| oracle::linear::forward(&Exact, dims, x, &weight, None));
        let found = oracle::cross_entropy::forward(&Exact, &spec.loss, &logits, &classes);
        let loss = tensor(x, [1], vec![found.loss])?;
        if !spec.needs_dx && dweight.is_none() {
            return Ok(linear_cross_entropy::Forward { loss, dx: None });
        }
        let dlogits = oracle::cross_entropy::backward(&Exact, &spec.loss, &logits, &classes, &found.lse);
        if let Some(dweight) = dweight {
            let sums = oracle::linear::weight_gradient(&Exact, dims, &dlogits, &rows, &values(dweight)?);
            overwrite(("linear_cross_entropy", "dweight"), dweight, &sums)?;
        }
        let dx = || {
            by_rows(dims, &dlogits, spec.vocab_size, |dims, dy| {
                oracle::linear::input_gradient(&Exact, dims, dy, &weight)
            })
        };
        let dx = spec.needs_dx.then(|| tensor(x, *x.shape(), dx())).transpose()?;
        Ok(linear_cross_entropy::Forward { loss, dx })
    }
}
