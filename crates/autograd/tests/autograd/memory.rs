//! What the tape holds, and for how long.

use std::{cell::RefCell, rc::Rc};

use unsloth_autograd::{
    GradStore, Matrix, Parameter, Recompute, Tape, Var, Vector,
    ops::{self, LoraAdapter, NormOptions},
};
use unsloth_core::{Category, Device, Tensor, ops::glu::Activation};

use crate::harness::{activations, device, random};

const NORM: NormOptions = NormOptions { eps: 1e-6, weight_offset: 0.0 };

/// Elements of a row, rows: one tensor is `UNIT` bytes.
const SIZE: usize = 64;
const UNIT: u64 = 4 * (SIZE * SIZE) as u64;
/// One f32 per row is a buffer of the ledger's smallest size.
const SMALL: u64 = 256;

fn frozen(device: &Device, seed: u64) -> Matrix {
    Matrix::Frozen(device.prepare_weight(random(device, seed, [SIZE, SIZE])).unwrap())
}

/// Bytes that the tape alone holds after `build`, whose value is dropped.
fn held(device: &Device, build: impl FnOnce(&Tape, Var)) -> u64 {
    let x = random(device, 1, [SIZE, SIZE]);
    let before = activations(device);
    let tape = Tape::new();
    build(&tape, tape.variable(x.clone()));
    activations(device) - before
}

#[test]
fn a_node_holds_what_backward_reads() {
    let device = device();
    let matrix = frozen(&device, 2);
    let weight = Vector::Frozen(random(&device, 3, [SIZE]));
    let adapter = LoraAdapter {
        lora_a: Parameter::new("a", random(&device, 4, [4, SIZE])),
        lora_b: Parameter::new("b", random(&device, 5, [SIZE, 4])),
        scale: 1.0,
        dropout: None,
    };
    let trained = Matrix::Trainable(Parameter::new("w", random(&device, 6, [SIZE, SIZE])));
    // `y` is no variable of the tape, so that what is held is seen.
    let value = |tape: &Tape, x: Var| ops::scale(tape, x, 2.0).unwrap();

    let bytes = held(&device, |tape, x| drop(value(tape, x)));
    assert_eq!(bytes, 0, "scale");
    let bytes = held(&device, |tape, x| drop(ops::linear(tape, &value(tape, x), &matrix, None).unwrap()));
    assert_eq!(bytes, 0, "linear, frozen");
    let bytes = held(&device, |tape, x| drop(ops::linear(tape, &value(tape, x), &trained, None).unwrap()));
    assert_eq!(bytes, UNIT, "linear, trained: x");
    let bytes =
        held(&device, |tape, x| drop(ops::lora_linear(tape, &value(tape, x), &matrix, None, &adapter).unwrap()));
    assert_eq!(bytes, UNIT + 4 * 4 * SIZE as u64, "lora_linear: x and h");
    let bytes = held(&device, |tape, x| drop(ops::rms_norm(tape, &value(tape, x), &weight, NORM).unwrap()));
    assert_eq!(bytes, UNIT + SMALL, "rms_norm: x and rstd");
    let bytes = held(&device, |tape, x| {
        let (y, residual) = (value(tape, x.clone()), value(tape, x));
        drop(ops::add_rms_norm(tape, y, &residual, &weight, NORM).unwrap());
    });
    assert_eq!(bytes, UNIT + SMALL, "add_rms_norm: sum and rstd");
    let bytes = held(&device, |tape, x| {
        let (gate, up) = (value(tape, x.clone()), value(tape, x));
        drop(ops::glu(tape, &gate, &up, Activation::Silu).unwrap());
    });
    assert_eq!(bytes, 2 * UNIT, "glu: gate and up");
    let bytes = held(&device, |tape, x| {
        let (a, b) = (value(tape, x.clone()), value(tape, x));
        drop(ops::add(tape, a, &b).unwrap());
    });
    assert_eq!(bytes, 0, "add");
    let bytes = held(&device, |tape, x| {
        let b = Var::constant(random(&device, 7, [SIZE, SIZE]));
        drop(ops::mul(tape, value(tape, x), &b).unwrap());
    });
    assert_eq!(bytes, UNIT, "mul by a constant: the constant");
    let bytes = held(&device, |tape, x| drop(ops::sum(tape, &value(tape, x)).unwrap()));
    assert_eq!(bytes, 0, "sum");
}

#[test]
fn results_of_named_operators_are_not_held() {
    let device = device();
    let weight = Vector::Frozen(random(&device, 3, [SIZE]));
    let trained = Matrix::Trainable(Parameter::new("w", random(&device, 6, [SIZE, SIZE])));
    for (recompute, of_norm, of_gate) in [
        (Recompute::default(), UNIT, UNIT),
        (Recompute { norms: true, gates: false }, 0, UNIT),
        (Recompute { norms: false, gates: true }, UNIT, 0),
    ] {
        let read_by_three = |tape: &Tape, y: &Var| {
            (0..3).for_each(|_| drop(ops::linear(tape, y, &trained, None).unwrap()));
        };
        let bytes = held(&device, |tape, x| {
            tape.set_recompute(recompute);
            let x = ops::scale(tape, x, 2.0).unwrap();
            read_by_three(tape, &ops::rms_norm(tape, &x, &weight, NORM).unwrap());
        });
        assert_eq!(bytes, UNIT + SMALL + of_norm, "norm, {recompute:?}");
        let bytes = held(&device, |tape, x| {
            tape.set_recompute(recompute);
            let (x, residual) = (ops::scale(tape, x.clone(), 2.0).unwrap(), x);
            read_by_three(tape, &ops::add_rms_norm(tape, x, &residual, &weight, NORM).unwrap().0);
        });
        assert_eq!(bytes, UNIT + SMALL + of_norm, "norm of a sum, {recompute:?}");
        let bytes = held(&device, |tape, x| {
            tape.set_recompute(recompute);
            let (gate, up) = (ops::scale(tape, x.clone(), 2.0).unwrap(), ops::scale(tape, x, 3.0).unwrap());
            read_by_three(tape, &ops::glu(tape, &gate, &up, Activation::Silu).unwrap());
        });
        assert_eq!(bytes, 2 * UNIT + of_gate, "gate, {recompute:?}");
    }
}

/// Three readers of one norm: its result is made once in the backward pass and is gone before the norm's own gradient is made.
#[test]
fn a_result_is_made_again_once() {
    let device = device();
    let weight = Parameter::new("norm", random(&device, 3, [SIZE]));
    let matrices: Vec<Parameter> = (0..3).map(|i| Parameter::new("w", random(&device, i, [SIZE, SIZE]))).collect();
    let run = |norms| {
        let parameters: Vec<Parameter> = matrices.iter().chain([&weight]).cloned().collect();
        let mut store = GradStore::new(&parameters).unwrap();
        let tape = Tape::new();
        tape.set_recompute(Recompute { norms, gates: false });
        let x = tape.variable(random(&device, 7, [SIZE, SIZE]));
        let normed = ops::rms_norm(&tape, &x, &Vector::Trainable(weight.clone()), NORM).unwrap();
        let parts: Vec<Var> = matrices
            .iter()
            .map(|w| ops::linear(&tape, &normed, &Matrix::Trainable(w.clone()), None).unwrap())
            .collect();
        drop(normed);
        let [a, b, c] = parts.try_into().unwrap();
        let loss = ops::sum(&tape, &ops::add(&tape, ops::add(&tape, a, &b).unwrap(), &c).unwrap()).unwrap();
        drop((b, c));
        let levels = Rc::new(RefCell::new(Vec::new()));
        let (log, watched) = (levels.clone(), device.clone());
        store.on_ready(move |_, _| {
            log.borrow_mut().push(activations(&watched));
            Ok(())
        });
        tape.backward(&loss, &mut store).unwrap();
        let bits: Vec<_> = parameters.iter().map(|p| crate::harness::bits(store.get(p).unwrap())).collect();
        (bits, levels.take())
    };
    let (kept, made) = (run(false), run(true));
    assert_eq!(kept.0, made.0);
    // Behind the first reader the result is there in both; from the last reader on it is in neither.
    assert_eq!(kept.1, made.1);
}

#[test]
fn saved_tensors_are_freed_as_they_are_used() {
    let device = device();
    let weights: Vec<Parameter> = (0..6).map(|i| Parameter::new("norm", random(&device, i, [SIZE]))).collect();
    let mut store = GradStore::new(&weights).unwrap();
    let levels = Rc::new(RefCell::new(Vec::new()));
    let (log, watched) = (levels.clone(), device.clone());
    store.on_ready(move |_, _| {
        log.borrow_mut().push(activations(&watched));
        Ok(())
    });
    let before = activations(&device);
    let tape = Tape::new();
    let mut x = tape.variable(random(&device, 7, [SIZE, SIZE]));
    for weight in &weights {
        x = ops::rms_norm(&tape, &x, &Vector::Trainable(weight.clone()), NORM).unwrap();
    }
    let loss = ops::sum(&tape, &x).unwrap();
    drop(x);
    let full = activations(&device) - before;
    assert_eq!(full, 6 * (UNIT + SMALL) + SMALL, "each norm's input and rstd, and the loss");
    tape.backward(&loss, &mut store).unwrap();
    drop(loss);
    let levels = levels.take();
    assert_eq!(levels.len(), weights.len());
    for pair in levels.windows(2) {
        assert_eq!(pair[0] - pair[1], UNIT + SMALL, "one norm's input and rstd");
    }
    assert_eq!(activations(&device), before);
}

#[test]
fn sums_of_gradients_reuse_a_buffer() {
    let device = device();
    let x = random(&device, 1, [SIZE, SIZE]);
    let matrix = frozen(&device, 2);
    let peak = |uses: usize| {
        let tape = Tape::new();
        let x = tape.variable(x.clone());
        let losses: Vec<Var> =
            (0..uses).map(|_| ops::sum(&tape, &ops::linear(&tape, &x, &matrix, None).unwrap()).unwrap()).collect();
        let seed = || device.from_slice(&[1.0f32], [1], Category::Activations).unwrap();
        let seeds = losses.iter().map(|loss| (loss, seed())).collect();
        device.backend().reset_peak();
        tape.backward_from(seeds, &mut GradStore::new(&[]).unwrap()).unwrap();
        device.usage().peak_bytes[Category::Activations.index()] - 2 * uses as u64 * SMALL
    };
    assert_eq!(peak(2), peak(5), "a gradient sent twice or five times takes the same memory");
}

/// Work of a backward pass, counted in tensors that it asks for.
fn tensors_in_backward(device: &Device, registered: &[Parameter], build: impl FnOnce(&Tape, &Var) -> Var) -> u64 {
    // Large enough to be counted.
    let x = random(device, 1, [SIZE, 4 * SIZE]);
    let mut store = GradStore::new(registered).unwrap();
    let tape = Tape::new();
    let x = tape.variable(x);
    let loss = build(&tape, &x);
    let count = || {
        let counts = device.backend().allocation_counts();
        counts.fresh_large + counts.reused
    };
    let before = count();
    tape.backward(&loss, &mut store).unwrap();
    count() - before
}

#[test]
fn what_needs_no_gradient_costs_nothing() {
    let device = device();
    let side: Tensor = random(&device, 8, [SIZE, 4 * SIZE]);
    let square: Vec<Tensor> = (2..4).map(|i| random(&device, i, [4 * SIZE, 4 * SIZE])).collect();
    let frozen: Vec<Matrix> =
        square.iter().map(|t| Matrix::Frozen(device.prepare_weight(t.clone()).unwrap())).collect();
    let parameters: Vec<Parameter> = square.iter().map(|t| Parameter::new("w", t.clone())).collect();
    let trained: Vec<Matrix> = parameters.iter().cloned().map(Matrix::Trainable).collect();
    // A branch over the variable, and one that only parameters could want a gradient of.
    let graph = |weights: &[Matrix]| {
        let (weights, side) = (weights.to_vec(), Var::constant(side.clone()));
        move |tape: &Tape, x: &Var| {
            let a = ops::linear(tape, x, &weights[0], None).unwrap();
            let mut b = side;
            for _ in 0..3 {
                b = ops::linear(tape, &b, &weights[1], None).unwrap();
                b = ops::glu(tape, &b, &b, Activation::Silu).unwrap();
            }
            ops::sum(tape, &ops::add(tape, a, &b).unwrap()).unwrap()
        }
    };
    // Warm the pool, so that every later buffer is counted as reused.
    for _ in 0..2 {
        tensors_in_backward(&device, &parameters, graph(&trained));
    }
    let with_gradients = tensors_in_backward(&device, &parameters, graph(&trained));
    let without = tensors_in_backward(&device, &[], graph(&frozen));
    let unregistered = tensors_in_backward(&device, &[], graph(&trained));
    assert!(with_gradients > without, "{with_gradients} tensors with and {without} without the branch");
    assert_eq!(unregistered, without);
    let first_only = tensors_in_backward(&device, &parameters[..1], graph(&trained));
    assert!(first_only < with_gradients, "{first_only} tensors for one of two weights, {with_gradients} for both");
}

#[test]
fn a_frozen_branch_is_not_recorded() {
    let device = device();
    let matrix = frozen(&device, 2);
    let x = Var::constant(random(&device, 1, [SIZE, SIZE]));
    let before = device.usage().live_bytes;
    let tape = Tape::new();
    let y = ops::linear(&tape, &x, &matrix, None).unwrap();
    let z = ops::glu(&tape, &y, &y, Activation::Silu).unwrap();
    assert!(!y.requires_grad() && !z.requires_grad());
    drop((y, z));
    assert_eq!(device.usage().live_bytes, before);
    assert_eq!(format!("{tape:?}"), "Tape(0 nodes)");
}

#[test]
fn a_head_that_is_not_trained_takes_no_gradient_memory() {
    let device = device();
    let targets = device.from_slice(&[3i32; SIZE], [SIZE], Category::Activations).unwrap();
    let loss = unsloth_core::ops::cross_entropy::LossSpec::mean(SIZE);
    let head = Parameter::new("head", random(&device, 2, [SIZE, SIZE]));
    let gradients = |tape: &Tape, head: &Matrix| {
        let x = tape.variable(random(&device, 1, [SIZE, SIZE]));
        let before = device.usage().live_bytes[Category::Gradients.index()];
        let out = ops::linear_cross_entropy(tape, &x, head, &targets, loss).unwrap();
        let held = device.usage().live_bytes[Category::Gradients.index()] - before;
        drop(out);
        held
    };
    let frozen = frozen(&device, 2);
    assert_eq!(gradients(&Tape::new(), &Matrix::Trainable(head.clone())), UNIT);
    assert_eq!(gradients(&Tape::new(), &frozen), 0);
    assert_eq!(gradients(&Tape::inference(), &Matrix::Trainable(head)), 0);
}
