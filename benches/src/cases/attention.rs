//! `attention` of one causal sequence, and of one token against a cache.

use anyhow::Result;
use candle_core as candle;
use serde_json::json;
use unsloth_rs::{
    DType, Device, Tensor,
    core::{
        KvView, Lengths, Sequences,
        ops::attention::{self, Backward, Forward, Inputs, Options},
    },
    cpu::candle::to_candle,
};
use unsloth_testkit::{
    arith::Exact,
    budget::Floor,
    oracle::attention::{self as oracle, Problem},
};

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, random},
    check::{Host, cancelling, hold, references},
    models::ModelShape,
};

const OP: &str = "attention";
/// Queries at the end of a sequence whose results are compared: for the keys beside them these are all queries.
const SAMPLE: usize = 12;
/// Longest sequence of models that are not the smallest: one shows how cost grows.
const LONGEST_OF_OTHERS: usize = 4096;
/// Scores that a peer may hold at once, of 4 bytes each.
const MOST_SCORES: usize = 1 << 28;

/// Forward and backward over the lengths, and a new token against a cache of the longest.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let mut cases = each(selection.small_models(), &selection.dtypes, |model, dtype| {
        let of = |seq_len| [forward_case(model, seq_len, dtype), backward_case(model, seq_len, dtype)];
        selection.lens_of(&model, &selection.seq_lens, LONGEST_OF_OTHERS).into_iter().flat_map(of).collect()
    });
    let others = &selection.models[selection.small_models().len()..];
    cases.extend(each(others, &selection.dtypes, |model, dtype| {
        let lens = if selection.all_lens { &selection.seq_lens[..] } else { &[2048] };
        let of = |&seq_len: &usize| [forward_case(model, seq_len, dtype), backward_case(model, seq_len, dtype)];
        lens.iter().flat_map(of).collect()
    }));
    cases.extend(each(&selection.models, &selection.dtypes, |model, dtype| {
        let capacity = 4 * selection.tokens;
        let shape = shape(&model, 1, capacity);
        vec![Case::new((OP, "cached"), (model.name, shape), dtype, move |at| cached(at, model, (capacity, dtype)))]
    }));
    cases
}

fn shape(model: &ModelShape, seq_q: usize, seq_k: usize) -> String {
    let ModelShape { num_heads, num_kv_heads, head_dim, .. } = model;
    format!("{seq_q} x {num_heads} on {seq_k} x {num_kv_heads}, {head_dim}")
}

fn forward_case(model: ModelShape, seq_len: usize, dtype: DType) -> Case {
    let shape = shape(&model, seq_len, seq_len);
    Case::new((OP, "forward"), (model.name, shape), dtype, move |at| forward(at, model, (seq_len, dtype)))
}

fn backward_case(model: ModelShape, seq_len: usize, dtype: DType) -> Case {
    let shape = shape(&model, seq_len, seq_len);
    Case::new((OP, "backward"), (model.name, shape), dtype, move |at| backward(at, model, (seq_len, dtype)))
}

/// By the kernel that PyTorch takes, and where its memory holds all scores, as separate operators that form them. On a card also by its flash
/// attention, whatever it would take.
fn torch(
    device: &Device,
    part: &str,
    model: &ModelShape,
    (seq_q, seq_k, dtype): (usize, usize, DType),
) -> Vec<(&'static str, serde_json::Value)> {
    let is_cpu = crate::machine::is_cpu(device);
    let most_scores = if is_cpu { MOST_SCORES } else { MOST_SCORES << 3 };
    let all = [("torch", None), ("torch unfused", Some("MATH")), ("torch flash", Some("FLASH_ATTENTION"))];
    let task = |kernel: Option<&str>| {
        json!({ "op": OP, "part": part, "seq_q": seq_q, "seq_k": seq_k, "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim, "dtype": dtype.name(), "kernel": kernel })
    };
    let is_run = |kernel: &Option<&str>| match *kernel {
        Some("MATH") => model.num_heads * seq_q * seq_k <= most_scores,
        Some(_) => !is_cpu && dtype != DType::F32,
        None => true,
    };
    all.into_iter().filter(|(_, kernel)| is_run(kernel)).map(|(name, kernel)| (name, task(kernel))).collect()
}

/// One sequence.
#[derive(Clone)]
struct Tensors {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    seqs: Sequences,
    options: Options,
}

impl Tensors {
    fn new(device: &Device, model: &ModelShape, (seq_len, dtype): (usize, DType)) -> Result<Self> {
        let heads = |heads, seed| random(device, [seq_len, heads, model.head_dim], dtype, seed);
        Ok(Self {
            q: heads(model.num_heads, 1)?,
            k: heads(model.num_kv_heads, 2)?,
            v: heads(model.num_kv_heads, 3)?,
            dout: heads(model.num_heads, 4)?,
            seqs: Sequences::from_lengths(device, &[seq_len])?,
            options: Options::causal(model.head_dim),
        })
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs { q: &self.q, k: &self.k, v: &self.v, seq_q: &self.seqs, seq_k: &self.seqs }
    }

    fn forward(&self) -> unsloth_rs::Result<Forward> {
        attention::forward(self.inputs(), self.options)
    }

    fn backward(&self, forward: &Forward) -> unsloth_rs::Result<attention::Gradients> {
        let backward = Backward { dout: &self.dout, out: &forward.out, lse: &forward.lse };
        attention::backward(self.inputs(), backward, self.options)
    }
}

/// The last queries of one group of heads with all of its keys, on the host.
struct Sample {
    problem: Problem,
    /// Key head.
    kv_head: usize,
    /// First query, of so many.
    queries: std::ops::Range<usize>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    dout: Vec<f64>,
}

impl Sample {
    fn new(tensors: &Tensors, kv_head: usize) -> Result<Self> {
        let (seq_len, num_heads, head_dim) = (tensors.q.shape()[0], tensors.q.shape()[1], tensors.q.shape()[2]);
        let group = num_heads / tensors.k.shape()[1];
        let queries = seq_len.saturating_sub(SAMPLE)..seq_len;
        let (lens_q, lens_k) = (vec![queries.len()], vec![seq_len]);
        let options = tensors.options;
        let problem = Problem { num_heads: group, num_kv_heads: 1, head_dim, options, lens_q, lens_k };
        let mut sample = Self { problem, kv_head, queries, q: vec![], k: vec![], v: vec![], dout: vec![] };
        (sample.q, sample.dout) = (sample.like_q(&tensors.q)?, sample.like_q(&tensors.dout)?);
        (sample.k, sample.v) = (sample.like_k(&tensors.k, 0)?, sample.like_k(&tensors.v, 0)?);
        Ok(sample)
    }

    /// These queries' elements of a tensor like q.
    fn like_q(&self, tensor: &Tensor) -> Result<Vec<f64>> {
        let (num_heads, group) = (tensor.shape()[1], self.problem.num_heads);
        let first = self.kv_head * group;
        let rows =
            self.queries.clone().flat_map(|token| (first..first + group).map(move |head| token * num_heads + head));
        Ok(Host::read(tensor)?.rows(&rows.collect::<Vec<_>>()))
    }

    /// The key head's elements of a tensor like k, from a token on.
    fn like_k(&self, tensor: &Tensor, from: usize) -> Result<Vec<f64>> {
        let (tokens, num_kv_heads) = (tensor.shape()[0], tensor.shape()[1]);
        let rows: Vec<usize> = (from..tokens).map(|token| token * num_kv_heads + self.kv_head).collect();
        Ok(Host::read(tensor)?.rows(&rows))
    }

    /// The part of the oracle's gradient of a tensor like k that all queries have contributed to.
    fn complete<'a>(&self, gradient: &'a [f64]) -> &'a [f64] {
        &gradient[self.queries.start * self.problem.head_dim..]
    }

    fn inputs(&self) -> oracle::Inputs<'_> {
        oracle::Inputs { q: &self.q, k: &self.k, v: &self.v }
    }
}

/// Holds outputs of the last queries, and where they are given gradients of these and of the last keys, to the oracle.
fn hold_tail(tensors: &Tensors, forward: &Forward, gradients: Option<&attention::Gradients>) -> Result<()> {
    let dtype = tensors.q.dtype();
    for kv_head in [0, tensors.k.shape()[1] - 1] {
        let sample = Sample::new(tensors, kv_head)?;
        let (problem, x) = (&sample.problem, sample.inputs());
        let (exact, naive) = references!(dtype, |a| oracle::forward(a, problem, x));
        let terms = oracle::magnitudes(problem, x, &sample.dout, &exact);
        // An error of the largest score is a relative error of its exponential.
        let of_exp = 1.0 + terms.score / Floor::F32_STEPS;
        let floor = |magnitude: f64| cancelling(dtype, magnitude * of_exp);
        hold((OP, "out"), &sample.like_q(&forward.out)?, (&exact.out, &naive.out), floor(terms.out))?;
        let Some(gradients) = gradients else { continue };
        let back = references!(dtype, |a| {
            let forward = oracle::forward(a, problem, x);
            oracle::backward(a, problem, x, &sample.dout, &forward)
        });
        let dq = sample.like_q(&gradients.dq)?;
        hold((OP, "dq"), &dq, (&back.0.dq, &back.1.dq), floor(terms.dq))?;
        let keys = |tensor| sample.like_k(tensor, sample.queries.start);
        let dk = (sample.complete(&back.0.dk), sample.complete(&back.1.dk));
        hold((OP, "dk"), &keys(&gradients.dk)?, dk, floor(terms.dk))?;
        let dv = (sample.complete(&back.0.dv), sample.complete(&back.1.dv));
        hold((OP, "dv"), &keys(&gradients.dv)?, dv, floor(terms.dv))?;
    }
    Ok(())
}

fn forward(context: &Context<'_>, model: ModelShape, (seq_len, dtype): (usize, DType)) -> Result<Prepared> {
    let tensors = Tensors::new(context.device, &model, (seq_len, dtype))?;
    let fits = model.num_heads * seq_len * seq_len <= MOST_SCORES;
    let candle = (context.with_candle && fits).then(|| peer(&tensors)).transpose()?;
    let checked = tensors.clone();
    let check = move || hold_tail(&checked, &checked.forward()?, None);
    let torch = torch(context.device, "forward", &model, (seq_len, seq_len, dtype));
    Ok(Prepared::new(check, Run::call(move || tensors.forward())).with_candle(candle).with_torch_as(torch))
}

/// As a user of candle writes it where gradients are wanted.
fn peer(tensors: &Tensors) -> Result<Run> {
    let (seq_len, num_heads) = (tensors.q.shape()[0], tensors.q.shape()[1]);
    let group = num_heads / tensors.k.shape()[1];
    let heads_first =
        |tensor: &Tensor| -> Result<candle::Tensor> { Ok(to_candle(tensor)?.transpose(0, 1)?.contiguous()?) };
    let repeated = |tensor: &Tensor| -> Result<candle::Tensor> {
        let once = heads_first(tensor)?;
        let (heads, tokens, dim) = once.dims3()?;
        let all = once.unsqueeze(1)?.broadcast_as((heads, group, tokens, dim))?;
        Ok(all.reshape((heads * group, tokens, dim))?)
    };
    let (q, k, v) = (heads_first(&tensors.q)?, repeated(&tensors.k)?, repeated(&tensors.v)?);
    let visible = candle::Tensor::tril2(seq_len, candle::DType::F32, &candle::Device::Cpu)?;
    let mask = ((visible - 1.0)? * 1e9)?.to_dtype(q.dtype())?.unsqueeze(0)?;
    let scale = f64::from(tensors.options.scale);
    Ok(Run::call(move || -> candle::Result<candle::Tensor> {
        let scores = (q.matmul(&k.t()?)? * scale)?.broadcast_add(&mask)?;
        let exponentials = scores.broadcast_sub(&scores.max_keepdim(2)?)?.exp()?;
        exponentials.broadcast_div(&exponentials.sum_keepdim(2)?)?.matmul(&v)
    }))
}

fn backward(context: &Context<'_>, model: ModelShape, (seq_len, dtype): (usize, DType)) -> Result<Prepared> {
    let tensors = Tensors::new(context.device, &model, (seq_len, dtype))?;
    let forward = tensors.forward()?;
    let checked = tensors.clone();
    let check = move || {
        let forward = checked.forward()?;
        hold_tail(&checked, &forward, Some(&checked.backward(&forward)?))
    };
    let torch = torch(context.device, "backward", &model, (seq_len, seq_len, dtype));
    Ok(Prepared::new(check, Run::call(move || tensors.backward(&forward))).with_torch_as(torch))
}

/// The last query of a sequence whose keys lie in a cache.
fn cached(context: &Context<'_>, model: ModelShape, (capacity, dtype): (usize, DType)) -> Result<Prepared> {
    let device = context.device;
    let all = Tensors::new(device, &model, (capacity, dtype))?;
    let cache = [1, capacity, model.num_kv_heads, model.head_dim];
    let (k, v) = (all.k.clone().reshape(cache)?, all.v.clone().reshape(cache)?);
    let (one, lens) = (Sequences::from_lengths(device, &[1])?, Lengths::new(device, &[capacity])?);
    let q = random(device, [1, model.num_heads, model.head_dim], dtype, 5)?;
    let options = all.options;
    let run = {
        let q = q.clone();
        move || attention::cached(&q, &one, KvView { k: &k, v: &v, lens: &lens }, options)
    };
    let checked = run.clone();
    let check = move || {
        let (out, group) = (checked()?, model.num_heads / model.num_kv_heads);
        for kv_head in [0, model.num_kv_heads - 1] {
            let heads: Vec<usize> = (kv_head * group..(kv_head + 1) * group).collect();
            let rows: Vec<usize> = (0..capacity).map(|token| token * model.num_kv_heads + kv_head).collect();
            let (k, v) = (Host::read(&all.k)?.rows(&rows), Host::read(&all.v)?.rows(&rows));
            let q = Host::read(&q)?.rows(&heads);
            let (num_heads, head_dim) = (group, model.head_dim);
            let (lens_q, lens_k) = (vec![1], vec![capacity]);
            let problem = Problem { num_heads, num_kv_heads: 1, head_dim, options, lens_q, lens_k };
            let x = oracle::Inputs { q: &q, k: &k, v: &v };
            let (exact, naive) = references!(dtype, |a| oracle::forward(a, &problem, x));
            let terms = oracle::magnitudes(&problem, x, &vec![0.0; q.len()], &oracle::forward(&Exact, &problem, x));
            let floor = cancelling(dtype, terms.out * (1.0 + terms.score / Floor::F32_STEPS));
            hold((OP, "out"), &Host::read(&out)?.rows(&heads), (&exact.out, &naive.out), floor)?;
        }
        Ok(())
    };
    let torch = torch(device, "cached", &model, (1, capacity, dtype));
    Ok(Prepared::new(check, Run::call(run)).with_torch_as(torch))
}
