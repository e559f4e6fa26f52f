//! Recomputation: the same bits, less memory.

use std::{cell::Cell, cell::RefCell, rc::Rc};

use unsloth_autograd::{
    Error, GradStore, Matrix, Parameter, Recompute, Result, Tape, Var, Vector, checkpoint,
    ops::{self, NormOptions},
};
use unsloth_core::{Category, ops::glu::Activation};

use crate::{
    harness::{activations, bits, device, random},
    model::{Model, Policy, Stored},
};

const NORM: NormOptions = NormOptions { eps: 1e-6, weight_offset: 0.0 };

#[test]
fn a_decoder_has_the_same_bits_under_every_policy() {
    let device = device();
    for tied_layers in [false, true] {
        let model = Model::new(&device, tied_layers);
        let plain = model.step(Policy::None);
        assert!(plain.gradients.iter().all(|g| g.iter().any(|&bits| f32::from_bits(bits) != 0.0)));
        let policies = [
            Policy::EachLayer,
            Policy::Stored(Stored::InHostMemory),
            Policy::Stored(Stored::OnDisk),
            Policy::Selective(Recompute { norms: true, gates: false }),
            Policy::Selective(Recompute { norms: false, gates: true }),
            Policy::Selective(Recompute { norms: true, gates: true }),
            Policy::Layers,
            Policy::Nested,
            Policy::All,
        ];
        for policy in policies {
            assert_eq!(model.step(policy), plain, "{policy:?}, tied layers: {tied_layers}");
        }
    }
}

/// Runs a part of a graph, with or without recomputation.
fn part(
    tape: &Tape,
    checkpointed: bool,
    inputs: &[&Var],
    f: impl Fn(&Tape, &[Var]) -> Result<Vec<Var>> + 'static,
) -> Vec<Var> {
    if checkpointed {
        return checkpoint(tape, inputs, f).unwrap();
    }
    f(tape, &inputs.iter().map(|&input| input.clone()).collect::<Vec<_>>()).unwrap()
}

/// Bits of the gradients of two variables and two norm weights, and the order of the hooks.
fn gradients(build: impl Fn(&Tape, &[Var], &[Vector]) -> Vec<Var>) -> (Vec<Option<Vec<u32>>>, Vec<String>) {
    let device = device();
    let weights: Vec<Parameter> =
        (0..2).map(|i| Parameter::new(format!("weight {i}"), random(&device, 10 + i, [64]))).collect();
    let vectors: Vec<Vector> = weights.iter().cloned().map(Vector::Trainable).collect();
    let mut store = GradStore::new(&weights).unwrap();
    let ready = Rc::new(RefCell::new(Vec::new()));
    let seen = ready.clone();
    store.on_ready(move |parameter, _| {
        seen.borrow_mut().push(parameter.name().to_owned());
        Ok(())
    });
    let tape = Tape::new();
    let x: Vec<Var> = (0..2).map(|i| tape.variable(random(&device, 20 + i, [16, 64]))).collect();
    let outputs = build(&tape, &x, &vectors);
    let seeds: Vec<_> =
        outputs.iter().zip(30..).map(|(output, seed)| (output, random(&device, seed, *output.shape()))).collect();
    let mut found = tape.backward_from(seeds, &mut store).unwrap();
    let mut all: Vec<Option<Vec<u32>>> = x.iter().map(|x| found.take(x).as_ref().map(bits)).collect();
    all.extend(weights.iter().map(|weight| store.get(weight).map(bits)));
    (all, ready.take())
}

#[test]
fn an_input_used_within_and_after() {
    let run = |checkpointed| {
        gradients(move |tape, x, w| {
            let before = ops::rms_norm(tape, &x[0], &w[0], NORM).unwrap();
            let vectors = w.to_vec();
            let inside = part(tape, checkpointed, &[&before, &x[1]], move |tape, x| {
                let a = ops::rms_norm(tape, &x[0], &vectors[1], NORM)?;
                let b = ops::mul(tape, a, &x[0])?;
                let c = ops::rms_norm(tape, &b, &vectors[0], NORM)?;
                let d = ops::mul(tape, ops::mul(tape, c, &x[1])?, &x[1])?;
                Ok(vec![ops::add(tape, d, &x[0])?])
            });
            let after = ops::mul(tape, inside[0].clone(), &before).unwrap();
            let after = ops::rms_norm(tape, &after, &w[1], NORM).unwrap();
            vec![ops::add(tape, after, &before).unwrap(), inside[0].clone()]
        })
    };
    let plain = run(false);
    assert!(plain.0.iter().all(Option::is_some));
    assert_eq!(run(true), plain);
}

#[test]
fn outputs_handed_through_given_twice_and_constant() {
    let run = |checkpointed| {
        gradients(move |tape, x, w| {
            let (vector, constant) = (w[0].clone(), random(x[0].tensor().device(), 40, [16, 64]));
            let out = part(tape, checkpointed, &[&x[0], &x[1]], move |tape, x| {
                let y = ops::rms_norm(tape, &x[0], &vector, NORM)?;
                let z = ops::mul(tape, y.clone(), &x[1])?;
                Ok(vec![y.clone(), z, y, x[0].clone(), Var::constant(constant.clone())])
            });
            assert!(!out[4].requires_grad());
            let sum = ops::mul(tape, out[0].clone(), &out[1]).unwrap();
            let sum = ops::add(tape, sum, &out[3]).unwrap();
            let sum = ops::mul(tape, sum, &out[4]).unwrap();
            let sum = ops::rms_norm(tape, &sum, &w[1], NORM).unwrap();
            let sum = ops::mul(tape, sum, &out[2]).unwrap();
            vec![ops::add(tape, sum, &out[3]).unwrap(), out[1].clone()]
        })
    };
    let plain = run(false);
    assert!(plain.0.iter().all(Option::is_some));
    assert_eq!(run(true), plain);
}

#[test]
fn an_input_given_twice() {
    let run = |checkpointed| {
        gradients(move |tape, x, w| {
            let vectors = w.to_vec();
            part(tape, checkpointed, &[&x[0], &x[1], &x[0]], move |tape, x| {
                let a = ops::rms_norm(tape, &x[0], &vectors[0], NORM)?;
                let b = ops::rms_norm(tape, &x[2], &vectors[1], NORM)?;
                let c = ops::mul(tape, ops::mul(tape, a, &b)?, &x[1])?;
                Ok(vec![ops::add(tape, ops::mul(tape, c, &x[0])?, &x[2])?])
            })
        })
    };
    let plain = run(false);
    assert!(plain.0.iter().all(Option::is_some));
    assert_eq!(run(true), plain);
}

#[test]
fn one_of_two_outputs_takes_part() {
    let run = |checkpointed| {
        gradients(move |tape, x, w| {
            let vectors = w.to_vec();
            let mut out = part(tape, checkpointed, &[&x[0], &x[1]], move |tape, x| {
                let used = ops::rms_norm(tape, &x[0], &vectors[0], NORM)?;
                Ok(vec![ops::rms_norm(tape, &x[1], &vectors[1], NORM)?, used])
            });
            vec![out.remove(1)]
        })
    };
    let plain = run(false);
    assert!(plain.0[1].is_none(), "the second variable does not reach the loss");
    assert_eq!(run(true), plain);
}

#[test]
fn runs_twice_or_once() {
    let device = device();
    let runs = Rc::new(Cell::new(0));
    let weight = Parameter::new("weight", random(&device, 1, [8]));
    let normalise = |tape: &Tape, x: &Var| {
        let (runs, vector) = (runs.clone(), Vector::Trainable(weight.clone()));
        let f = move |tape: &Tape, x: &[Var]| {
            runs.set(runs.get() + 1);
            Ok(vec![ops::rms_norm(tape, &x[0], &vector, NORM)?])
        };
        checkpoint(tape, &[x], f).unwrap().remove(0)
    };
    let x = random(&device, 2, [4, 8]);
    let mut registered = GradStore::new(std::slice::from_ref(&weight)).unwrap();

    let tape = Tape::new();
    let loss = ops::sum(&tape, &normalise(&tape, &Var::constant(x.clone()))).unwrap();
    tape.backward(&loss, &mut registered).unwrap();
    assert_eq!(runs.replace(0), 2, "forward and backward");

    let tape = Tape::new();
    let unused = normalise(&tape, &Var::constant(x.clone()));
    let loss = ops::sum(&tape, &tape.variable(x.clone())).unwrap();
    tape.backward(&loss, &mut registered).unwrap();
    assert!(unused.requires_grad());
    assert_eq!(runs.replace(0), 1, "no gradient arrived");

    let tape = Tape::new();
    let sum = ops::sum(&tape, &normalise(&tape, &Var::constant(x.clone()))).unwrap();
    let loss = ops::add(&tape, sum, &ops::sum(&tape, &tape.variable(x.clone())).unwrap()).unwrap();
    tape.backward(&loss, &mut GradStore::new(&[]).unwrap()).unwrap();
    assert_eq!(runs.replace(0), 1, "nobody wants the gradient");

    normalise(&Tape::inference(), &Var::constant(x));
    assert_eq!(runs.get(), 1, "inference");
}

#[test]
fn records_nothing_without_need() {
    let device = device();
    let x = Var::constant(random(&device, 1, [16, 64]));
    let weight = Vector::Frozen(random(&device, 2, [64]));
    let before = device.usage().live_bytes;
    let tape = Tape::new();
    let f = move |tape: &Tape, x: &[Var]| Ok(vec![ops::rms_norm(tape, &x[0], &weight, NORM)?, x[0].clone()]);
    let out = checkpoint(&tape, &[&x], f).unwrap();
    assert!(out.iter().all(|out| !out.requires_grad()));
    drop(out);
    // The function, and the weight that it held, are gone as well.
    let mut after = before;
    after[Category::Activations.index()] -= 256;
    assert_eq!(device.usage().live_bytes, after);
    assert_eq!(format!("{tape:?}"), "Tape(0 nodes)");
}

#[test]
fn keeps_only_the_inputs() {
    let device = device();
    let x = random(&device, 1, [64, 64]);
    let matrix = Matrix::Frozen(device.prepare_weight(random(&device, 2, [64, 64])).unwrap());
    let held = |checkpointed: bool| {
        let before = activations(&device);
        let tape = Tape::new();
        let mut y = tape.variable(x.clone());
        let matrix = matrix.clone();
        let f = move |tape: &Tape, x: &[Var]| {
            let gate = ops::linear(tape, &x[0], &matrix, None)?;
            let up = ops::linear(tape, &x[0], &matrix, None)?;
            Ok(vec![ops::glu(tape, &gate, &up, Activation::Silu)?])
        };
        for _ in 0..4 {
            y = part(&tape, checkpointed, &[&y], f.clone()).remove(0);
        }
        drop(y);
        (activations(&device) - before) / (64 * 64 * 4)
    };
    assert_eq!(held(false), 8, "gate and up of each of four parts");
    assert_eq!(held(true), 3, "the input of each part; that of the first is the variable, which is held anyway");
}

#[test]
fn rejects_a_captured_value() {
    let device = device();
    let tape = Tape::new();
    let (x, captured) = (tape.variable(random(&device, 1, [4])), tape.variable(random(&device, 2, [4])));
    let kept = captured.clone();
    let refused = checkpoint(&tape, &[&x], move |tape, x| Ok(vec![ops::add(tape, x[0].clone(), &kept)?]));
    assert!(matches!(refused, Err(Error::InvalidSpec { op: "add", field: "input", .. })));
    let refused = checkpoint(&tape, &[&x], move |_, _| Ok(vec![captured.clone()]));
    assert!(matches!(refused, Err(Error::InvalidSpec { op: "checkpoint", field: "input", .. })));
}

#[test]
fn rejects_an_input_of_another_tape() {
    let device = device();
    let foreign = Tape::new().variable(random(&device, 1, [4]));
    let refused = checkpoint(&Tape::new(), &[&foreign], |_, x| Ok(x.to_vec()));
    assert!(matches!(refused, Err(Error::InvalidSpec { op: "checkpoint", field: "input", .. })));
}

#[test]
fn rejects_a_variable_made_inside() {
    let device = device();
    let tape = Tape::new();
    let x = tape.variable(random(&device, 1, [4]));
    let refused = checkpoint(&tape, &[&x], |tape, x| {
        let made = tape.variable(x[0].tensor().clone());
        Ok(vec![ops::add(tape, x[0].clone(), &made)?])
    });
    assert!(matches!(refused, Err(Error::Unsupported { op: "checkpoint", .. })));
}

#[test]
fn rejects_a_function_that_changes_its_mind() {
    let device = device();
    let tape = Tape::new();
    let x = tape.variable(random(&device, 1, [1]));
    let runs = Cell::new(0);
    let out = checkpoint(&tape, &[&x], move |tape, x| {
        runs.set(runs.get() + 1);
        (0..runs.get()).map(|_| ops::scale(tape, x[0].clone(), 2.0)).collect()
    });
    let refused = tape.backward(&out.unwrap()[0], &mut GradStore::new(&[]).unwrap());
    assert!(matches!(refused, Err(Error::InvalidSpec { op: "checkpoint", field: "outputs", .. })));
}

#[test]
fn an_error_of_the_function_is_passed_on() {
    let device = device();
    let tape = Tape::new();
    let x = tape.variable(random(&device, 1, [4]));
    let refused = checkpoint(&tape, &[&x], |tape, x| Ok(vec![ops::reshape(tape, &x[0], [3])?]));
    assert!(matches!(refused, Err(Error::Shape { op: "reshape", .. })));
}
