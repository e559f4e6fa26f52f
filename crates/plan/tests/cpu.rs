//! Each operator leaves the same entries in the ledger as in that of the CPU backend it stands for: live, peak, and at the
//! peak, by category and to the byte.
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use unsloth_core::{
    Category, DType, Device, KvView, Lengths, Result, Sequences, Shape, Tensor, Usage, Weight,
    ops::{
        adafactor, adamw, adamw8bit, attention, cross_entropy, dora, elementwise, embedding, glu, layer_norm, linear,
        linear_cross_entropy, lion, lora_linear, muon, reduce, rms_norm, rope, sgd, stochastic_rounding,
    },
    rng::Philox,
};
use unsloth_cpu::{CpuBackend, CpuOptions};
use unsloth_plan::{PlanBackend, PlanOptions, Target};

/// Not what a machine is likely to have, so that a default in either backend would show.
const NUM_THREADS: usize = 3;
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn usage(device: &Device, run: &impl Fn(&Device) -> Result<()>) -> Usage {
    run(device).unwrap();
    device.usage()
}

/// Runs the same calls on both devices.
#[track_caller]
fn same(what: &str, run: impl Fn(&Device) -> Result<()>) {
    let options = CpuOptions { num_threads: Some(NUM_THREADS), ..CpuOptions::default() };
    let cpu = usage(&Device::new(CpuBackend::new(options).unwrap()), &run);
    let options = PlanOptions { target: Target::Cpu { num_threads: NUM_THREADS }, budget_bytes: None };
    let plan = usage(&Device::new(PlanBackend::new(options).unwrap()), &run);
    assert_eq!(plan, cpu, "{what}");
    assert_eq!(cpu.total_live_bytes(), 0, "{what}");
    assert!(cpu.total_peak_bytes() > 0, "{what}");
}

fn zeros(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    device.zeros(shape, dtype, Category::Activations)
}

fn gradient(device: &Device, shape: impl Into<Shape>) -> Result<Tensor> {
    device.zeros(shape, DType::F32, Category::Gradients)
}

fn weight(device: &Device, shape: [usize; 2], dtype: DType) -> Result<Weight> {
    device.prepare_weight(device.zeros(shape, dtype, Category::Weights)?)
}

/// Types of activations and weights.
fn pairs() -> impl Iterator<Item = (DType, DType)> {
    DTYPES.into_iter().flat_map(|dtype| DTYPES.into_iter().map(move |weight| (dtype, weight)))
}

#[test]
fn trained_lengths() {
    for (dtype, weight_dtype) in pairs() {
        same(&format!("dora, {dtype}, {weight_dtype}"), |device| {
            let matrix = weight(device, [40, 70], weight_dtype)?;
            let (a, b) = (zeros(device, [3, 70], DType::F32)?, zeros(device, [40, 3], DType::F32)?);
            let norms = dora::norms(&matrix, &a, &b, 1.0)?;
            let (magnitude, t) = (zeros(device, [40], DType::F32)?, zeros(device, [9, 40], dtype)?);
            let lengths = dora::Lengths { magnitude: &magnitude, norms: &norms };
            let y = dora::forward(&t, lengths, Some(&magnitude))?;
            let mut dmagnitude = gradient(device, [40])?;
            let held = y.clone();
            let dt = dora::backward(y, &t, lengths, Some(&mut dmagnitude))?;
            drop(held);
            dora::backward(dt, &t, lengths, None).map(drop)
        });
    }
}

#[test]
fn in_place_or_not() {
    same("elementwise", |device| {
        let (a, b) = (zeros(device, [1000], DType::BF16)?, zeros(device, [1000], DType::BF16)?);
        let held = a.clone();
        let a = elementwise::mul(elementwise::add(a, &b)?, &b)?;
        drop(held);
        let a = elementwise::scale(elementwise::cast(&a, DType::F32)?, 2.0)?;
        let sums = [reduce::sum(&a)?, reduce::all_finite(&[&a, &b])?, reduce::grad_norm(&[&b])?];
        let mut a = elementwise::scale_by(elementwise::copy(&a)?, &sums[0])?;
        elementwise::accumulate(&mut a, &elementwise::cast(&b, DType::F32)?)?;
        elementwise::fill_zero(&mut a)
    });
    same("adopted memory is read-only", |device| {
        let bytes = std::sync::Arc::new(vec![0u8; 4096]);
        let adopted = device.adopt(bytes, 0..4096, [4096 / 4], DType::F32, Category::Weights)?;
        elementwise::scale(adopted, 2.0).map(drop)
    });
}

#[test]
fn embedding() {
    for (dtype, table) in pairs() {
        same(&format!("{dtype} {table}"), |device| {
            let ids = zeros(device, [70], DType::I32)?;
            let out = embedding::forward(&weight(device, [300, 65], table)?, &ids, dtype)?;
            embedding::backward(&ids, &out, &mut gradient(device, [300, 65])?)
        });
    }
}

#[test]
fn rms_norm() {
    for (dtype, weight_dtype) in pairs() {
        for (rows, with_dweight) in [(3, true), (700, true), (700, false)] {
            same(&format!("{dtype} {weight_dtype} {rows} {with_dweight}"), |device| {
                let x = || zeros(device, [rows, 65], dtype);
                let (weight, residual) = (zeros(device, [65], weight_dtype)?, x()?);
                rms_norm::forward(x()?, None, &weight, 1e-5, 0.0)?;
                let forward = rms_norm::forward(residual.clone(), Some(&residual), &weight, 1e-5, 0.0)?;
                let (dout, sum, rstd) = (forward.out, &forward.sum.unwrap(), &forward.rstd);
                let inputs = rms_norm::Backward { dout, dsum: None, sum, weight: &weight, rstd };
                let mut dweight = gradient(device, [65])?;
                rms_norm::backward(inputs, with_dweight.then_some(&mut dweight), 1e-5, 0.0).map(drop)
            });
        }
    }
}

#[test]
fn layer_norm() {
    use layer_norm::{Affine, Backward, ParameterGradients};
    for (dtype, weight_dtype) in pairs() {
        for (rows, with_weight, with_bias) in
            [(3, true, true), (700, true, true), (700, false, true), (700, false, false)]
        {
            same(&format!("{dtype} {weight_dtype} {rows} {with_weight} {with_bias}"), |device| {
                let x = || zeros(device, [rows, 65], dtype);
                let (weight, residual) = (zeros(device, [65], weight_dtype)?, x()?);
                let affine = Affine { weight: &weight, bias: Some(&weight) };
                layer_norm::forward(x()?, None, Affine { bias: None, ..affine }, 1e-5)?;
                let forward = layer_norm::forward(residual.clone(), Some(&residual), affine, 1e-5)?;
                let (dout, sum) = (forward.out, &forward.sum.unwrap());
                let (mean, rstd) = (&forward.mean, &forward.rstd);
                let inputs = Backward { dout, dsum: None, sum, weight: &weight, mean, rstd };
                let (mut dweight, mut dbias) = (gradient(device, [65])?, gradient(device, [65])?);
                let (dweight, dbias) = (with_weight.then_some(&mut dweight), with_bias.then_some(&mut dbias));
                layer_norm::backward(inputs, ParameterGradients { dweight, dbias }, 1e-5).map(drop)
            });
        }
    }
}

#[test]
fn rope_and_glu() {
    for dtype in DTYPES {
        same(&format!("{dtype}"), |device| {
            let (q, k) = (zeros(device, [70, 4, 16], dtype)?, zeros(device, [70, 2, 16], dtype)?);
            let table = || zeros(device, [70, 8], DType::F32);
            let (cos, sin, positions) = (table()?, table()?, zeros(device, [70], DType::I32)?);
            let angles = rope::Angles { cos: &cos, sin: &sin, positions: &positions };
            let held = k.clone();
            let _rotated = rope::apply(q, k, angles, rope::Layout::Half, rope::Direction::Forward)?;
            drop(held);
            let (gate, up) = (zeros(device, [300, 65], dtype)?, zeros(device, [300, 65], dtype)?);
            let out = glu::forward(&gate, &up, glu::Activation::Silu)?;
            let held = up.clone();
            let gradients = glu::backward(&out, gate, up, glu::Activation::Silu)?;
            drop((held, gradients));
            Ok(())
        });
    }
}

#[test]
fn attention() {
    // A single task; fewer tasks than threads; many blocks, and few queries behind few keys.
    for lengths in [&[5][..], &[1, 1], &[300, 3, 0, 70]] {
        for ((num_heads, num_kv_heads, d), dtype) in [((1, 1, 16), DType::F32), ((6, 2, 20), DType::BF16)] {
            same(&format!("{lengths:?} {num_heads} {dtype}"), |device| {
                let seqs = Sequences::from_lengths(device, lengths)?;
                let heads = |heads| zeros(device, [seqs.num_tokens(), heads, d], dtype);
                let (q, k, v) = (heads(num_heads)?, heads(num_kv_heads)?, heads(num_kv_heads)?);
                let inputs = attention::Inputs { q: &q, k: &k, v: &v, seq_q: &seqs, seq_k: &seqs };
                let options = attention::Options::causal(d);
                let attention::Forward { out, lse } = attention::forward(inputs, options)?;
                let backward = attention::Backward { dout: &out, out: &out, lse: &lse };
                attention::backward(inputs, backward, options).map(drop)
            });
            same(&format!("cached {lengths:?} {num_heads} {dtype}"), |device| {
                let seqs = Sequences::from_lengths(device, lengths)?;
                let cache = || zeros(device, [lengths.len(), 300, num_kv_heads, d], dtype);
                let (mut k, v, lens) = (cache()?, cache()?, Lengths::new(device, lengths)?);
                let q = zeros(device, [seqs.num_tokens(), num_heads, d], dtype)?;
                let rows = zeros(device, [seqs.num_tokens(), num_kv_heads, d], dtype)?;
                attention::kv_append(&mut k, &rows, &seqs, &Lengths::new(device, &vec![0; lengths.len()])?)?;
                let view = KvView { k: &k, v: &v, lens: &lens };
                attention::cached(&q, &seqs, view, attention::Options::causal(d)).map(drop)
            });
        }
    }
}

/// Types of activations and weights; rows, inputs and outputs: fewer and more rows than share a widened block of the weight,
/// fewer and more columns than make one.
fn products() -> impl Iterator<Item = ((DType, DType), [usize; 3])> {
    pairs().flat_map(|pair| [[2, 40, 24], [700, 33, 5000], [515, 5000, 33]].map(|product| (pair, product)))
}

#[test]
fn linear() {
    for ((dtype, weight_dtype), [rows, in_features, out_features]) in products() {
        same(&format!("{dtype} {weight_dtype} {rows} x {in_features} x {out_features}"), |device| {
            let x = zeros(device, [rows, in_features], dtype)?;
            let weight = weight(device, [out_features, in_features], weight_dtype)?;
            let bias = zeros(device, [out_features], weight_dtype)?;
            let y = linear::forward(&x, &weight, Some(&bias))?;
            linear::forward(&x, &weight, None)?;
            linear::input_gradient(&y, &weight)?;
            linear::weight_gradient(&y, &x, &mut gradient(device, [out_features, in_features])?)?;
            linear::bias_gradient(&y, &mut gradient(device, [out_features])?)
        });
    }
}

#[test]
fn lora_linear() {
    const RANK: usize = 8;
    for ((dtype, weight_dtype), [rows, in_features, out_features]) in products() {
        let variants = [(true, DType::F32, None), (false, DType::BF16, None), (true, DType::F32, Some(0.5))];
        for (needs_dx, adapter_dtype, probability) in variants {
            let what = format!("{dtype} {weight_dtype} {rows} x {in_features} x {out_features} {needs_dx}");
            same(&format!("{what} {probability:?}"), |device| {
                let x = zeros(device, [rows, in_features], dtype)?;
                let weight = weight(device, [out_features, in_features], weight_dtype)?;
                let bias = zeros(device, [out_features], weight_dtype)?;
                let lora_a = device.zeros([RANK, in_features], adapter_dtype, Category::Adapters)?;
                let lora_b = device.zeros([out_features, RANK], adapter_dtype, Category::Adapters)?;
                let counters = zeros(device, [rows], DType::I32)?;
                let dropout = probability.map(|probability| {
                    let dropout = lora_linear::Dropout { probability, stream: Philox::new(0, 0), step: 0 };
                    lora_linear::RowDropout { dropout, sequences: &counters, positions: &counters }
                });
                let adapter = lora_linear::Adapter { lora_a: &lora_a, lora_b: &lora_b, scale: 2.0, dropout };
                let lora_linear::Forward { y, h } = lora_linear::forward(&x, &weight, Some(&bias), adapter)?;
                let inputs = lora_linear::Backward { dy: &y, x: &x, h: &h, weight: &weight, adapter, needs_dx };
                let mut dlora_a = gradient(device, [RANK, in_features])?;
                let mut dlora_b = gradient(device, [out_features, RANK])?;
                let gradients = lora_linear::ParameterGradients { dlora_a: Some(&mut dlora_a), dlora_b: None };
                lora_linear::backward(inputs, gradients)?;
                let gradients = lora_linear::ParameterGradients { dlora_a: None, dlora_b: Some(&mut dlora_b) };
                lora_linear::backward(inputs, gradients).map(drop)
            });
        }
    }
}

#[test]
fn cross_entropy() {
    for dtype in DTYPES {
        for (tokens, vocab_size) in [(3, 10), (300, 5000)] {
            same(&format!("{dtype} {tokens}"), |device| {
                let logits = zeros(device, [tokens, vocab_size], dtype)?;
                let targets = zeros(device, [tokens], DType::I32)?;
                let loss = cross_entropy::LossSpec::mean(tokens);
                let forward = cross_entropy::forward(&logits, &targets, loss)?;
                cross_entropy::backward(logits, &targets, &forward.lse, loss).map(drop)
            });
        }
    }
}

#[test]
fn linear_cross_entropy() {
    // All rows in one chunk; the fewest rows that a chunk has; fewer rows with a target than rows.
    for (tokens, num_targets, vocab_size) in [(5, 5, 40), (300, 300, 70_000), (300, 117, 5000)] {
        for ((dtype, weight_dtype), needs_dx) in pairs().zip([true, false].into_iter().cycle()) {
            same(&format!("{dtype} {weight_dtype} {tokens} {needs_dx}"), |device| {
                let (x, head) = (zeros(device, [tokens, 9], dtype)?, weight(device, [vocab_size, 9], weight_dtype)?);
                let mut targets = vec![0; num_targets];
                targets.resize(tokens, cross_entropy::IGNORE_INDEX);
                let targets = device.from_slice(&targets, [tokens], Category::Activations)?;
                let loss = cross_entropy::LossSpec::mean(num_targets);
                let mut dweight = gradient(device, [vocab_size, 9])?;
                let dweight = (!needs_dx).then_some(&mut dweight);
                linear_cross_entropy::forward(&x, &head, &targets, loss, needs_dx, dweight).map(drop)
            });
        }
    }
}

#[test]
fn adamw() {
    same("adamw", |device| {
        let mut state = adamw::StepState::new(device, 0)?;
        let grad = gradient(device, [1000])?;
        let (norm, finite) = (reduce::grad_norm(&[&grad])?, reduce::all_finite(&[&grad])?);
        let control = adamw::ControlSpec { max_grad_norm: Some(1.0), loss_scale: 1.0, sticky: true };
        adamw::control(&control, &norm, &finite, &mut state)?;
        let mut param = device.zeros([1000], DType::BF16, Category::Weights)?;
        let moment = || device.zeros([1000], DType::F32, Category::Optimiser);
        let buffers = adamw::Buffers { param: &mut param, grad: &grad, m: &mut moment()?, v: &mut moment()? };
        let spec = adamw::Spec { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
        adamw::step(&spec, &mut [buffers], &state)
    });
}

#[test]
fn optimisers_without_scratch() {
    same("sgd, lion, adamw8bit", |device| {
        let state = adamw::StepState::new(device, 1)?;
        let grad = gradient(device, [1000])?;
        let mut param = device.zeros([1000], DType::BF16, Category::Weights)?;
        let mut buf = device.zeros([1000], DType::F32, Category::Optimiser)?;
        let spec = sgd::Spec { learning_rate: 1e-3, momentum: 0.9, nesterov: true, weight_decay: 0.01 };
        let buffers = sgd::Buffers { param: &mut param, grad: &grad, buf: Some(&mut buf) };
        sgd::step(&spec, buffers, &state)?;
        let spec = lion::Spec { learning_rate: 1e-3, beta1: 0.9, beta2: 0.99, weight_decay: 0.01 };
        lion::step(&spec, lion::Buffers { param: &mut param, grad: &grad, m: &mut buf }, &state)?;
        let (mut m, mut v) = (adamw8bit::Moment::zeros(device, 1000)?, adamw8bit::Moment::zeros(device, 1000)?);
        let spec = adamw::Spec { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
        let buffers = adamw8bit::Buffers {
            param: &mut param,
            grad: &grad,
            m_codes: &mut m.codes,
            m_absmax: &mut m.absmax,
            v_codes: &mut v.codes,
            v_absmax: &mut v.absmax,
        };
        adamw8bit::step(&spec, buffers, &state)
    });
}

fn adafactor_step(device: &Device, [rows, columns]: [usize; 2]) -> Result<()> {
    let state = adamw::StepState::new(device, 1)?;
    let grad = gradient(device, [rows, columns])?;
    let mut param = device.zeros([rows, columns], DType::F32, Category::Weights)?;
    let average = |length: usize| device.zeros([length], DType::F32, Category::Optimiser);
    let averages = adafactor::Averages::Factored { row: &mut average(rows)?, col: &mut average(columns)? };
    let spec = adafactor::Spec {
        learning_rate: 1e-3,
        decay_rate: -0.8,
        eps: 1e-30,
        clip_threshold: 1.0,
        parameter_scale: Some(1e-3),
        weight_decay: 0.01,
    };
    adafactor::step(&spec, adafactor::Buffers { param: &mut param, grad: &grad, averages }, &state)
}

#[test]
fn averages_of_rows_and_columns() {
    for shape in [[1, 7], [40, 25], [16, 3], [17, 1000]] {
        same(&format!("adafactor, {shape:?}"), |device| adafactor_step(device, shape));
    }
}

#[test]
fn orthogonal_momentum() {
    for shape in [[1, 7], [40, 25], [25, 40], [64, 700]] {
        same(&format!("muon, {shape:?}"), |device| {
            let state = adamw::StepState::new(device, 1)?;
            let grad = gradient(device, shape)?;
            let mut param = device.zeros(shape, DType::BF16, Category::Weights)?;
            let mut buf = device.zeros(shape, DType::F32, Category::Optimiser)?;
            let spec = muon::Spec {
                learning_rate: 1e-3,
                adjustment: 1.0,
                momentum: 0.95,
                nesterov: true,
                eps: 1e-7,
                weight_decay: 0.01,
            };
            muon::step(&spec, muon::Buffers { param: &mut param, grad: &grad, buf: &mut buf }, &state)
        });
    }
}

#[test]
fn rounding_takes_nothing() {
    same("stochastic_rounding", |device| {
        let spec = stochastic_rounding::Spec { stream: Philox::new(0, 0), step: 0, tensor: 0 };
        stochastic_rounding::round(&spec, &zeros(device, [1000], DType::F32)?, &mut zeros(device, [1000], DType::BF16)?)
    });
}

#[test]
fn refuses_beyond_the_budget_and_without_threads() {
    let options = PlanOptions { budget_bytes: Some(1000), ..PlanOptions::default() };
    let device = Device::new(PlanBackend::new(options.clone()).unwrap());
    let error = zeros(&device, [300], DType::F32).unwrap_err().to_string();
    assert!(error.contains("1280 bytes for activations do not fit the budget of 1000 bytes"), "{error}");
    let error =
        PlanBackend::new(PlanOptions { target: Target::Cpu { num_threads: 0 }, ..options }).err().unwrap().to_string();
    assert_eq!(error, "plan: num_threads = 0, must be at least 1");
}
