//! The gradient of each operator through the tape.

use unsloth_autograd::{
    GradStore, Matrix, Parameter, Tape, Var, Vector,
    ops::{self, AttentionSequences, LoraAdapter, LoraDropout, NormOptions, RopeAngles},
};
use unsloth_core::{
    DType, Sequences, Tensor,
    ops::{
        attention::{Options, Window},
        cross_entropy::{IGNORE_INDEX, LossSpec},
        glu::Activation,
        lora_linear::Dropout,
        rope::Layout,
        rope_table::{RopeSpec, Scaling},
    },
    rng::Philox,
};
use unsloth_testkit::{
    arith::Exact,
    data::{self, Data},
    oracle::{self, linear::Dims},
};

use crate::{
    harness::{Case, Leaf, device, leaf, random, tensor},
    reference,
};

const NORM: NormOptions = NormOptions { eps: 1e-3, weight_offset: 1.0 };

fn case<'a>(name: &'a str, variables: &[Leaf], parameters: &[Leaf]) -> Case<'a> {
    Case { name, variables: variables.to_vec(), parameters: parameters.to_vec() }
}

fn frozen(tensor: Tensor) -> Matrix {
    Matrix::Frozen(tensor.device().clone().prepare_weight(tensor).unwrap())
}

#[test]
fn elementwise() {
    let (device, mut data) = (device(), Data::new(1));
    let (a, b) = (leaf(&mut data, [3, 5], 1.0), leaf(&mut data, [3, 5], 1.0));
    case("add", &[a.clone(), b.clone()], &[]).check(
        &device,
        |tape, v, _| Ok(vec![ops::add(tape, v[0].clone(), &v[1])?]),
        |l| vec![oracle::elementwise::add(&Exact, &l[0], &l[1])],
    );
    case("add to itself", std::slice::from_ref(&a), &[]).check(
        &device,
        |tape, v, _| Ok(vec![ops::add(tape, v[0].clone(), &v[0])?]),
        |l| vec![oracle::elementwise::add(&Exact, &l[0], &l[0])],
    );
    case("mul", &[a.clone(), b], &[]).check(
        &device,
        |tape, v, _| Ok(vec![ops::mul(tape, v[0].clone(), &v[1])?]),
        |l| vec![oracle::elementwise::mul(&Exact, &l[0], &l[1])],
    );
    case("square", std::slice::from_ref(&a), &[]).check(
        &device,
        |tape, v, _| Ok(vec![ops::mul(tape, v[0].clone(), &v[0])?]),
        |l| vec![oracle::elementwise::mul(&Exact, &l[0], &l[0])],
    );
    case("scale, reshape", std::slice::from_ref(&a), &[]).check(
        &device,
        |tape, v, _| Ok(vec![ops::reshape(tape, &ops::scale(tape, v[0].clone(), -0.5)?, [5, 3])?]),
        |l| vec![oracle::elementwise::scale(&Exact, &l[0], -0.5)],
    );
    case("sum", &[a], &[]).check(
        &device,
        |tape, v, _| Ok(vec![ops::sum(tape, &v[0])?]),
        |l| vec![vec![oracle::reduce::sum(&Exact, &l[0])]],
    );
}

#[test]
fn a_factor_without_gradient_is_not_needed() {
    let (device, mut data) = (device(), Data::new(2));
    let (a, b) = (leaf(&mut data, [2, 3], 1.0), leaf(&mut data, [2, 3], 1.0));
    let constant = Var::constant(tensor(&device, &b));
    case("mul by a constant", std::slice::from_ref(&a), &[]).check(
        &device,
        |tape, v, _| Ok(vec![ops::mul(tape, v[0].clone(), &constant)?, ops::mul(tape, constant.clone(), &v[0])?]),
        |l| vec![oracle::elementwise::mul(&Exact, &l[0], &b.values); 2],
    );
}

#[test]
fn cast_gives_the_gradient_its_own_type() {
    let device = device();
    let tape = Tape::new();
    let mut store = GradStore::new(&[]).unwrap();
    let x = tape.variable(random(&device, 3, [4, 4]));
    let loss = ops::sum(&tape, &ops::cast(&tape, &x, DType::BF16).unwrap()).unwrap();
    let dx = tape.backward(&loss, &mut store).unwrap().take(&x).unwrap();
    assert_eq!(dx.to_vec::<f32>().unwrap(), vec![1.0; 16]);
}

#[test]
fn embedding() {
    let (device, mut data) = (device(), Data::new(4));
    let ids = [4, 0, 4, 2, 4];
    let on_device = data::integers(&device, &ids).unwrap();
    case("embedding", &[], &[leaf(&mut data, [6, 3], 1.0)]).check(
        &device,
        |tape, _, p| Ok(vec![ops::embedding(tape, &Matrix::Trainable(p[0].clone()), &on_device, DType::F32)?]),
        |l| vec![oracle::embedding::forward(&Exact, &l[0], &ids, 3)],
    );
}

#[test]
fn linear() {
    let (device, mut data) = (device(), Data::new(5));
    let dims = Dims { rows: 4, in_features: 3, out_features: 5 };
    let (x, w, b) = (leaf(&mut data, [4, 3], 1.0), leaf(&mut data, [5, 3], 1.0), leaf(&mut data, [5], 1.0));
    let matrix = frozen(tensor(&device, &w));
    case("frozen", std::slice::from_ref(&x), &[]).check(
        &device,
        |tape, v, _| Ok(vec![ops::linear(tape, &v[0], &matrix, Some(&Vector::Frozen(tensor(&device, &b))))?]),
        |l| vec![oracle::linear::forward(&Exact, dims, &l[0], &w.values, Some(&b.values))],
    );
    case("trained", &[x], &[w.clone(), b.clone()]).check(
        &device,
        |tape, v, p| {
            let (matrix, bias) = (Matrix::Trainable(p[0].clone()), Vector::Trainable(p[1].clone()));
            Ok(vec![ops::linear(tape, &v[0], &matrix, Some(&bias))?])
        },
        |l| vec![oracle::linear::forward(&Exact, dims, &l[0], &l[1], Some(&l[2]))],
    );
}

#[test]
fn lora_linear() {
    let (device, mut data) = (device(), Data::new(6));
    let dims = Dims { rows: 4, in_features: 3, out_features: 5 };
    let (x, w, bias) = (leaf(&mut data, [4, 3], 1.0), leaf(&mut data, [5, 3], 1.0), leaf(&mut data, [5], 1.0));
    let (a, b) = (leaf(&mut data, [2, 3], 1.0), leaf(&mut data, [5, 2], 1.0));
    let forward = |x: &[f64], (weight, bias): (&[f64], &[f64]), (lora_a, lora_b): (&[f64], &[f64])| {
        let (bias, rank, scale) = (Some(bias), 2, 0.75);
        let layer = oracle::lora_linear::Layer { dims, weight, bias, lora_a, lora_b, rank, scale, keep: None };
        vec![oracle::lora_linear::forward(&Exact, layer, x).y]
    };
    let matrix = frozen(tensor(&device, &w));
    case("frozen base", std::slice::from_ref(&x), &[a.clone(), b.clone()]).check(
        &device,
        |tape, v, p| {
            let adapter = LoraAdapter { lora_a: p[0].clone(), lora_b: p[1].clone(), scale: 0.75, dropout: None };
            let bias = Vector::Frozen(tensor(&device, &bias));
            Ok(vec![ops::lora_linear(tape, &v[0], &matrix, Some(&bias), &adapter)?])
        },
        |l| forward(&l[0], (&w.values, &bias.values), (&l[1], &l[2])),
    );
    case("trained base", std::slice::from_ref(&x), &[a.clone(), b.clone(), w.clone(), bias.clone()]).check(
        &device,
        |tape, v, p| {
            let adapter = LoraAdapter { lora_a: p[0].clone(), lora_b: p[1].clone(), scale: 0.75, dropout: None };
            let (matrix, bias) = (Matrix::Trainable(p[2].clone()), Vector::Trainable(p[3].clone()));
            Ok(vec![ops::lora_linear(tape, &v[0], &matrix, Some(&bias), &adapter)?])
        },
        |l| forward(&l[0], (&l[3], &l[4]), (&l[1], &l[2])),
    );
    let (stream, counters) = (Philox::new(3, 4), [5, 6, 7, 8]);
    let dropout = Dropout { probability: 0.4, stream, step: 9 };
    let element = |row: usize, channel: usize| {
        let uniform = stream.uniform(9, counters[row] as u32, counters[3 - row] as u32, channel as u32);
        if uniform >= 0.4 { 1.0 / 0.6 } else { 0.0 }
    };
    let keep: Vec<f64> = (0..12).map(|i| element(i / 3, i % 3)).collect();
    assert!(keep.contains(&0.0) && keep.iter().any(|&keep| keep > 0.0));
    let integers = |values: [i32; 4]| device.from_slice(&values, [4], unsloth_core::Category::Activations).unwrap();
    let (sequences, positions) = (integers(counters), integers([8, 7, 6, 5]));
    case("dropout", &[x], &[a, b]).check(
        &device,
        |tape, v, p| {
            let dropout = LoraDropout { dropout, sequences: sequences.clone(), positions: positions.clone() };
            let dropout = Some(dropout);
            let adapter = LoraAdapter { lora_a: p[0].clone(), lora_b: p[1].clone(), scale: 0.75, dropout };
            let bias = Vector::Frozen(tensor(&device, &bias));
            Ok(vec![ops::lora_linear(tape, &v[0], &matrix, Some(&bias), &adapter)?])
        },
        |l| {
            let (weight, bias, lora_a, lora_b) = (&w.values, Some(&*bias.values), &l[1], &l[2]);
            let (rank, scale, keep) = (2, 0.75, Some(&*keep));
            let layer = oracle::lora_linear::Layer { dims, weight, bias, lora_a, lora_b, rank, scale, keep };
            vec![oracle::lora_linear::forward(&Exact, layer, &l[0]).y]
        },
    );
}

#[test]
fn rms_norm() {
    let (device, mut data) = (device(), Data::new(7));
    let (x, residual, w) = (leaf(&mut data, [3, 6], 1.0), leaf(&mut data, [3, 6], 1.0), leaf(&mut data, [6], 1.0));
    case("rms_norm", std::slice::from_ref(&x), std::slice::from_ref(&w)).check(
        &device,
        |tape, v, p| Ok(vec![ops::rms_norm(tape, &v[0], &Vector::Trainable(p[0].clone()), NORM)?]),
        |l| vec![reference::rms_norm(&l[0], &l[1], NORM)],
    );
    // Each of the two outputs alone and both: the harness seeds every choice.
    case("add_rms_norm", &[x, residual], &[w]).check(
        &device,
        |tape, v, p| {
            let weight = Vector::Trainable(p[0].clone());
            let (out, sum) = ops::add_rms_norm(tape, v[0].clone(), &v[1], &weight, NORM)?;
            Ok(vec![out, sum])
        },
        |l| {
            let sum = oracle::elementwise::add(&Exact, &l[0], &l[1]);
            vec![reference::rms_norm(&sum, &l[2], NORM), sum]
        },
    );
}

#[test]
fn layer_norm() {
    let (device, mut data) = (device(), Data::new(17));
    let (x, residual) = (leaf(&mut data, [3, 6], 1.0), leaf(&mut data, [3, 6], 1.0));
    let (w, b) = (leaf(&mut data, [6], 1.0), leaf(&mut data, [6], 1.0));
    let norm = |p: &[Parameter]| ops::LayerNorm {
        weight: Vector::Trainable(p[0].clone()),
        bias: p.get(1).cloned().map(Vector::Trainable),
        eps: 0.1,
    };
    case("layer_norm", std::slice::from_ref(&x), &[w.clone(), b.clone()]).check(
        &device,
        |tape, v, p| Ok(vec![ops::layer_norm(tape, &v[0], &norm(p))?]),
        |l| vec![reference::layer_norm(&l[0], (&l[1], Some(&l[2])), 0.1)],
    );
    case("layer_norm without a bias", std::slice::from_ref(&x), std::slice::from_ref(&w)).check(
        &device,
        |tape, v, p| Ok(vec![ops::layer_norm(tape, &v[0], &norm(p))?]),
        |l| vec![reference::layer_norm(&l[0], (&l[1], None), 0.1)],
    );
    // Each of the two outputs alone and both: the harness seeds every choice.
    case("add_layer_norm", &[x, residual], &[w, b]).check(
        &device,
        |tape, v, p| {
            let (out, sum) = ops::add_layer_norm(tape, v[0].clone(), &v[1], &norm(p))?;
            Ok(vec![out, sum])
        },
        |l| {
            let sum = oracle::elementwise::add(&Exact, &l[0], &l[1]);
            vec![reference::layer_norm(&sum, (&l[2], Some(&l[3])), 0.1), sum]
        },
    );
}

#[test]
fn rope() {
    let (device, mut data) = (device(), Data::new(8));
    let (q, k) = (leaf(&mut data, [3, 2, 4], 1.0), leaf(&mut data, [3, 1, 4], 1.0));
    let spec = RopeSpec { head_dim: 4, theta: 100.0, scaling: Scaling::Default };
    let (cos, sin) = spec.tables(&device, 8).unwrap();
    let positions = vec![0, 5, 7];
    let on_device = data::integers(&device, &positions).unwrap();
    let (cos_values, sin_values) = (data::read(&cos).unwrap(), data::read(&sin).unwrap());
    let reference = reference::Angles { cos: cos_values, sin: sin_values, positions, head_dim: 4 };
    let angles = RopeAngles { cos, sin, positions: on_device };
    for layout in [Layout::Half, Layout::Interleaved] {
        case("rope", &[q.clone(), k.clone()], &[]).check(
            &device,
            |tape, v, _| {
                let (q, k) = ops::rope(tape, v[0].clone(), v[1].clone(), &angles, layout)?;
                Ok(vec![q, k])
            },
            |l| vec![reference.rotate(&l[0], layout), reference.rotate(&l[1], layout)],
        );
    }
}

#[test]
fn glu() {
    let (device, mut data) = (device(), Data::new(9));
    let (gate, up) = (leaf(&mut data, [3, 5], 1.5), leaf(&mut data, [3, 5], 1.0));
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
        case("glu", &[gate.clone(), up.clone()], &[]).check(
            &device,
            |tape, v, _| Ok(vec![ops::glu(tape, &v[0], &v[1], activation)?]),
            |l| vec![reference::glu(&l[0], &l[1], activation)],
        );
    }
}

#[test]
fn attention() {
    let (device, mut data) = (device(), Data::new(10));
    let (lens_q, lens_k) = (vec![3, 0, 4], vec![5, 2, 4]);
    let (q, k, v) =
        (leaf(&mut data, [7, 4, 3], 1.0), leaf(&mut data, [11, 2, 3], 1.0), leaf(&mut data, [11, 2, 3], 1.0));
    let sequences = AttentionSequences {
        q: Sequences::from_lengths(&device, &lens_q).unwrap(),
        k: Sequences::from_lengths(&device, &lens_k).unwrap(),
    };
    let options = Options { softcap: Some(3.0), window: Window::Sliding { left: 2 }, ..Options::causal(3) };
    for options in [Options::causal(3), options] {
        let problem = oracle::attention::Problem {
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 3,
            options,
            lens_q: lens_q.clone(),
            lens_k: lens_k.clone(),
        };
        case("attention", &[q.clone(), k.clone(), v.clone()], &[]).check(
            &device,
            |tape, v, _| Ok(vec![ops::attention(tape, &v[0], &v[1], &v[2], &sequences, options)?]),
            |l| {
                let inputs = oracle::attention::Inputs { q: &l[0], k: &l[1], v: &l[2] };
                vec![oracle::attention::forward(&Exact, &problem, inputs).out]
            },
        );
    }
}

#[test]
fn losses() {
    let (device, mut data) = (device(), Data::new(11));
    let targets = [3, IGNORE_INDEX, 0, 6];
    let on_device = data::integers(&device, &targets).unwrap();
    let spec =
        LossSpec { label_smoothing: 0.1, z_loss: 0.01, softcap: Some(4.0), logit_scale: 0.5, ..LossSpec::mean(3) };
    case("cross_entropy", &[leaf(&mut data, [4, 7], 2.0)], &[]).check(
        &device,
        |tape, v, _| Ok(vec![ops::cross_entropy(tape, v[0].clone(), &on_device, spec)?]),
        |l| vec![vec![oracle::cross_entropy::forward(&Exact, &spec, &l[0], &targets).loss]],
    );
    let dims = Dims { rows: 4, in_features: 5, out_features: 7 };
    let loss = |x: &[f64], weight: &[f64]| {
        let logits = oracle::linear::forward(&Exact, dims, x, weight, None);
        vec![vec![oracle::cross_entropy::forward(&Exact, &spec, &logits, &targets).loss]]
    };
    let (x, head) = (leaf(&mut data, [4, 5], 1.0), leaf(&mut data, [7, 5], 1.0));
    let matrix = frozen(tensor(&device, &head));
    case("linear_cross_entropy, frozen head", std::slice::from_ref(&x), &[]).check(
        &device,
        |tape, v, _| Ok(vec![ops::linear_cross_entropy(tape, &v[0], &matrix, &on_device, spec)?]),
        |l| loss(&l[0], &head.values),
    );
    case("linear_cross_entropy, trained head", std::slice::from_ref(&x), std::slice::from_ref(&head)).check(
        &device,
        |tape, v, p| {
            let head = Matrix::Trainable(p[0].clone());
            Ok(vec![ops::linear_cross_entropy(tape, &v[0], &head, &on_device, spec)?])
        },
        |l| loss(&l[0], &l[1]),
    );
    let constant = Var::constant(tensor(&device, &x));
    case("linear_cross_entropy, trained head alone", &[], &[head]).check(
        &device,
        |tape, _, p| {
            let head = Matrix::Trainable(p[0].clone());
            Ok(vec![ops::linear_cross_entropy(tape, &constant, &head, &on_device, spec)?])
        },
        |l| loss(&x.values, &l[0]),
    );
}
