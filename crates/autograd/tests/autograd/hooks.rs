//! When a gradient is said to be complete.

use std::{cell::RefCell, rc::Rc};

use unsloth_autograd::{
    Error, GradStore, Matrix, Parameter, Tape, Var, Vector, checkpoint,
    ops::{self, LoraAdapter, NormOptions},
};
use unsloth_core::{Device, ops::elementwise};

use crate::harness::{bits, device, random};

const NORM: NormOptions = NormOptions { eps: 1e-6, weight_offset: 0.0 };

fn norms(device: &Device, count: u64) -> Vec<Parameter> {
    (0..count).map(|i| Parameter::new(format!("norm {i}"), random(device, i, [8]))).collect()
}

fn norm(tape: &Tape, x: &Var, weight: &Parameter) -> Var {
    ops::rms_norm(tape, x, &Vector::Trainable(weight.clone()), NORM).unwrap()
}

/// What a hook sees: name and bits of the gradient.
type Seen = Rc<RefCell<Vec<(String, Vec<u32>)>>>;

fn watch(store: &mut GradStore) -> Seen {
    let seen = Seen::default();
    let log = seen.clone();
    store.on_ready(move |parameter, gradient| {
        log.borrow_mut().push((parameter.name().to_owned(), bits(gradient)));
        Ok(())
    });
    seen
}

fn names(seen: &Seen) -> Vec<String> {
    seen.borrow().iter().map(|(name, _)| name.clone()).collect()
}

#[test]
fn once_each_in_reverse_order_of_first_use_and_complete() {
    let device = device();
    let weights = norms(&device, 3);
    let mut store = GradStore::new(&weights).unwrap();
    let seen = watch(&mut store);
    for _ in 0..2 {
        let tape = Tape::new();
        let mut x = Var::constant(random(&device, 9, [4, 8]));
        for i in [1, 0, 1, 2, 0] {
            x = norm(&tape, &x, &weights[i]);
        }
        let loss = ops::sum(&tape, &x).unwrap();
        drop(x);
        tape.backward(&loss, &mut store).unwrap();
        assert_eq!(names(&seen), ["norm 2", "norm 0", "norm 1"]);
        for (name, gradient) in seen.take() {
            let parameter = weights.iter().find(|weight| weight.name() == name).unwrap();
            assert_eq!(gradient, bits(store.get(parameter).unwrap()), "{name} changed after its hook");
        }
    }
}

#[test]
fn checkpointing_keeps_the_order() {
    let device = device();
    let weights = norms(&device, 4);
    let order = |checkpointed: bool, used: bool| {
        let mut store = GradStore::new(&weights).unwrap();
        let seen = watch(&mut store);
        let tape = Tape::new();
        let x = norm(&tape, &Var::constant(random(&device, 9, [4, 8])), &weights[2]);
        let inner = weights.clone();
        let f = move |tape: &Tape, x: &[Var]| {
            let y = norm(tape, &norm(tape, &x[0], &inner[3]), &inner[1]);
            Ok(vec![norm(tape, &norm(tape, &y, &inner[3]), &inner[0])])
        };
        let y = if checkpointed { checkpoint(&tape, &[&x], f) } else { f(&tape, std::slice::from_ref(&x)) };
        let y = y.unwrap().remove(0);
        let loss = ops::sum(&tape, if used { &y } else { &x }).unwrap();
        tape.backward(&loss, &mut store).unwrap();
        names(&seen)
    };
    let expected = ["norm 0", "norm 1", "norm 3", "norm 2"];
    for used in [true, false] {
        assert_eq!(order(false, used), expected, "used: {used}");
        assert_eq!(order(true, used), expected, "checkpointed, used: {used}");
    }
}

#[test]
fn only_registered_parameters_that_are_on_the_tape() {
    let device = device();
    let weights = norms(&device, 3);
    let mut store = GradStore::new(&weights[..2]).unwrap();
    let seen = watch(&mut store);
    let tape = Tape::new();
    let x = norm(&tape, &Var::constant(random(&device, 9, [4, 8])), &weights[0]);
    let loss = ops::sum(&tape, &norm(&tape, &x, &weights[2])).unwrap();
    tape.backward(&loss, &mut store).unwrap();
    assert_eq!(names(&seen), ["norm 0"]);
}

#[test]
fn hooks_run_in_the_order_they_were_added() {
    let device = device();
    let weights = norms(&device, 1);
    let mut store = GradStore::new(&weights).unwrap();
    store.on_ready(|_, gradient| elementwise::fill_zero(gradient));
    let seen = watch(&mut store);
    let tape = Tape::new();
    let loss = ops::sum(&tape, &norm(&tape, &Var::constant(random(&device, 9, [4, 8])), &weights[0])).unwrap();
    tape.backward(&loss, &mut store).unwrap();
    assert_eq!(seen.take(), [("norm 0".to_owned(), vec![0; 8])]);
}

/// An optimiser fused into the backward pass writes a parameter whose last use is over, while the rest of the pass runs.
#[test]
fn a_hook_may_update_its_parameter_in_place() {
    let device = device();
    let weights = norms(&device, 2);
    let a = Parameter::new("a", random(&device, 3, [2, 8]));
    let b = Parameter::new("b", random(&device, 4, [8, 2]));
    let base = Parameter::new("base", random(&device, 5, [8, 8]));
    let all = [weights.clone(), vec![a.clone(), b.clone(), base.clone()]].concat();
    for checkpointed in [false, true] {
        let mut store = GradStore::new(&all).unwrap();
        store.on_ready(|parameter, _| parameter.update(elementwise::fill_zero));
        let tape = Tape::new();
        let x = norm(&tape, &Var::constant(random(&device, 9, [4, 8])), &weights[0]);
        let (last, adapter) =
            (weights[1].clone(), LoraAdapter { lora_a: a.clone(), lora_b: b.clone(), scale: 1.0, dropout: None });
        let matrix = Matrix::Trainable(base.clone());
        let f = move |tape: &Tape, x: &[Var]| {
            let y = ops::lora_linear(tape, &x[0], &matrix, None, &adapter)?;
            Ok(vec![ops::sum(tape, &norm(tape, &y, &last))?])
        };
        let loss = if checkpointed { checkpoint(&tape, &[&x], f) } else { f(&tape, &[x]) };
        tape.backward(&loss.unwrap()[0], &mut store).unwrap();
        for parameter in &all {
            let value = parameter.value().to_vec::<f32>().unwrap();
            assert!(value.iter().all(|v| *v == 0.0), "{} was not updated", parameter.name());
            parameter.update(|value| value.write(&vec![0.5f32; value.num_elements()])).unwrap();
        }
    }
}

#[test]
fn an_error_of_a_hook_ends_the_pass() {
    let device = device();
    let weights = norms(&device, 2);
    let mut store = GradStore::new(&weights).unwrap();
    store.on_ready(|_, _| Err(Error::Shared { op: "hook", arg: "parameter" }));
    let seen = watch(&mut store);
    let tape = Tape::new();
    let x = norm(&tape, &Var::constant(random(&device, 9, [4, 8])), &weights[0]);
    let loss = ops::sum(&tape, &norm(&tape, &x, &weights[1])).unwrap();
    assert!(matches!(tape.backward(&loss, &mut store), Err(Error::Shared { op: "hook", .. })));
    assert!(seen.borrow().is_empty());
}
