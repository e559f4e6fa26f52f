//! What the tape records, prunes and refuses.

use unsloth_autograd::{
    Error, GradStore, Matrix, Parameter, Tape, Var, Vector, checkpoint,
    ops::{self, LoraAdapter, NormOptions},
};
use unsloth_core::{Category, DType, ops::elementwise};

use crate::harness::{bits, device, random};

const NORM: NormOptions = NormOptions { eps: 1e-6, weight_offset: 0.0 };

/// On a stack that a recursion over the nodes would overflow many times.
fn on_a_small_stack(work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(256 * 1024).spawn(work).unwrap().join().unwrap();
}

const DEEP: usize = 100_000;

fn deep_chain(tape: &Tape, mut x: Var) -> unsloth_autograd::Result<Var> {
    for _ in 0..DEEP {
        x = ops::scale(tape, x, -1.0)?;
    }
    Ok(x)
}

#[test]
fn a_deep_tape_runs_backward_without_recursion() {
    on_a_small_stack(|| {
        let device = device();
        let mut store = GradStore::new(&[]).unwrap();
        for checkpointed in [false, true] {
            let tape = Tape::new();
            let x = tape.variable(device.from_slice(&[2.0f32], [1], Category::Activations).unwrap());
            let loss = if checkpointed {
                checkpoint(&tape, &[&x], |tape, x| Ok(vec![deep_chain(tape, x[0].clone())?])).unwrap().remove(0)
            } else {
                deep_chain(&tape, x.clone()).unwrap()
            };
            let dx = tape.backward(&loss, &mut store).unwrap().take(&x).unwrap();
            assert_eq!(dx.to_vec::<f32>().unwrap(), [1.0]);
        }
    });
}

#[test]
fn a_deep_tape_is_dropped_without_recursion() {
    on_a_small_stack(|| {
        let device = device();
        let tape = Tape::new();
        let x = tape.variable(random(&device, 1, [1, 8]));
        let weight = Vector::Frozen(random(&device, 2, [8]));
        let mut y = x;
        for _ in 0..DEEP {
            y = ops::rms_norm(&tape, &y, &weight, NORM).unwrap();
        }
        drop((y, tape, weight));
        assert_eq!(device.usage().total_live_bytes(), 0);
    });
}

#[test]
fn inference_records_nothing() {
    let device = device();
    let weight = Parameter::new("weight", random(&device, 1, [16, 16]));
    let tape = Tape::inference();
    let x = tape.variable(random(&device, 2, [16, 16]));
    let before = device.usage().live_bytes;
    let y = ops::linear(&tape, &x, &Matrix::Trainable(weight.clone()), None).unwrap();
    let z = ops::glu(&tape, &y, &y, unsloth_core::ops::glu::Activation::Silu).unwrap();
    let out = checkpoint(&tape, &[&z], |tape, z| Ok(vec![ops::mul(tape, z[0].clone(), &z[0])?])).unwrap();
    assert!(!x.requires_grad() && !z.requires_grad() && !out[0].requires_grad());
    drop((y, z, out));
    assert_eq!(device.usage().live_bytes, before, "the tape is alive and holds nothing");
    let loss = ops::sum(&tape, &x).unwrap();
    let refused = tape.backward(&loss, &mut GradStore::new(&[weight]).unwrap());
    assert!(matches!(refused, Err(Error::InvalidSpec { op: "backward", field: "loss", .. })));
}

#[test]
fn a_parameter_used_twice_gets_both_contributions() {
    let device = device();
    let weight = Parameter::new("weight", random(&device, 1, [8]));
    let (x, y) = (Var::constant(random(&device, 2, [4, 8])), Var::constant(random(&device, 3, [4, 8])));
    let gradient = |inputs: &[&Var]| {
        let mut store = GradStore::new(std::slice::from_ref(&weight)).unwrap();
        let tape = Tape::new();
        let vector = Vector::Trainable(weight.clone());
        let mut losses = inputs.iter().map(|x| {
            let out = ops::rms_norm(&tape, x, &vector, NORM).unwrap();
            ops::sum(&tape, &out).unwrap()
        });
        let first = losses.next().unwrap();
        let loss = losses.fold(first, |sum, loss| ops::add(&tape, sum, &loss).unwrap());
        tape.backward(&loss, &mut store).unwrap();
        store.get(&weight).unwrap().to_vec::<f32>().unwrap()
    };
    let (both, alone) = (gradient(&[&x, &y]), [gradient(&[&x]), gradient(&[&y])]);
    for (i, both) in both.into_iter().enumerate() {
        let sum = alone[0][i] + alone[1][i];
        assert!((both - sum).abs() <= 1e-5 * sum.abs().max(1.0), "{i}: {both}, expected {sum}");
    }
}

#[test]
fn gradients_accumulate_until_they_are_zeroed() {
    let device = device();
    let weight = Parameter::new("weight", random(&device, 1, [8, 8]));
    let mut store = GradStore::new(std::slice::from_ref(&weight)).unwrap();
    let x = Var::constant(random(&device, 2, [4, 8]));
    let backward = |store: &mut GradStore| {
        let tape = Tape::new();
        let y = ops::linear(&tape, &x, &Matrix::Trainable(weight.clone()), None).unwrap();
        let loss = ops::sum(&tape, &y).unwrap();
        tape.backward(&loss, store).unwrap();
        store.get(&weight).unwrap().to_vec::<f32>().unwrap()
    };
    let once = backward(&mut store);
    let twice = backward(&mut store);
    assert!(once.iter().any(|g| *g != 0.0));
    assert_eq!(twice, once.iter().map(|g| 2.0 * g).collect::<Vec<_>>());
    store.zero().unwrap();
    assert_eq!(backward(&mut store), once);
}

#[test]
fn input_gradients_are_taken_once() {
    let device = device();
    let mut store = GradStore::new(&[]).unwrap();
    let (tape, other) = (Tape::new(), Tape::new());
    let used = tape.variable(random(&device, 1, [3]));
    let unused = tape.variable(random(&device, 2, [3]));
    let foreign = other.variable(random(&device, 3, [3]));
    let loss = ops::sum(&tape, &used).unwrap();
    let mut found = tape.backward(&loss, &mut store).unwrap();
    assert!(found.take(&unused).is_none());
    assert!(found.take(&foreign).is_none());
    assert!(found.take(&Var::constant(random(&device, 1, [3]))).is_none());
    assert_eq!(found.take(&used).unwrap().to_vec::<f32>().unwrap(), [1.0; 3]);
    assert!(found.take(&used).is_none());
}

#[test]
fn a_variable_may_be_the_loss() {
    let device = device();
    let tape = Tape::new();
    let x = tape.variable(device.from_slice(&[5.0f32], [1], Category::Activations).unwrap());
    let mut found = tape.backward(&x, &mut GradStore::new(&[]).unwrap()).unwrap();
    assert_eq!(found.take(&x).unwrap().to_vec::<f32>().unwrap(), [1.0]);
}

#[test]
fn rejects_a_loss_without_gradient() {
    let device = device();
    let mut store = GradStore::new(&[]).unwrap();
    let scalar = |value: f32| device.from_slice(&[value], [1], Category::Activations).unwrap();
    let refused = Tape::new().backward(&Var::constant(scalar(1.0)), &mut store);
    assert!(matches!(refused, Err(Error::InvalidSpec { field: "loss", .. })));
    let tape = Tape::new();
    let foreign = tape.variable(scalar(1.0));
    let refused = Tape::new().backward(&foreign, &mut store);
    assert!(matches!(refused, Err(Error::InvalidSpec { field: "input", .. })));
    let wide = tape.variable(random(&device, 1, [2]));
    assert!(matches!(tape.backward(&wide, &mut store), Err(Error::Shape { arg: "loss", .. })));
    let tape = Tape::new();
    let half = ops::cast(&tape, &tape.variable(scalar(1.0)), unsloth_core::DType::BF16).unwrap();
    assert!(matches!(tape.backward(&half, &mut store), Err(Error::DType { arg: "loss", .. })));
}

#[test]
fn rejects_seeds_that_do_not_match() {
    let device = device();
    let mut store = GradStore::new(&[]).unwrap();
    let tape = Tape::new();
    let x = tape.variable(random(&device, 1, [2, 3]));
    let refused = tape.backward_from(vec![(&x, random(&device, 2, [3, 2]))], &mut store);
    assert!(matches!(refused, Err(Error::Shape { arg: "gradient", .. })));
    let tape = Tape::new();
    let x = tape.variable(random(&device, 1, [2, 3]));
    let seed = elementwise::cast(&random(&device, 2, [2, 3]), unsloth_core::DType::F16).unwrap();
    let refused = tape.backward_from(vec![(&x, seed)], &mut store);
    assert!(matches!(refused, Err(Error::DType { arg: "gradient", .. })));
}

#[test]
fn rejects_a_value_of_another_tape() {
    let device = device();
    let (tape, other) = (Tape::new(), Tape::new());
    let (x, foreign) = (tape.variable(random(&device, 1, [3])), other.variable(random(&device, 2, [3])));
    let refused = ops::add(&tape, x, &foreign);
    assert!(matches!(refused, Err(Error::InvalidSpec { op: "add", field: "input", .. })));
}

#[test]
fn rejects_one_parameter_as_both_halves_of_an_adapter() {
    let device = device();
    let square = Parameter::new("square", random(&device, 1, [4, 4]));
    let weight = Matrix::Frozen(device.prepare_weight(random(&device, 2, [4, 4])).unwrap());
    let adapter = LoraAdapter { lora_a: square.clone(), lora_b: square, scale: 1.0, dropout: None };
    let x = Var::constant(random(&device, 3, [2, 4]));
    let refused = ops::lora_linear(&Tape::new(), &x, &weight, None, &adapter);
    assert!(matches!(refused, Err(Error::InvalidSpec { op: "lora_linear", field: "lora_b", .. })));
}

#[test]
fn rejects_a_vector_as_matrix() {
    let device = device();
    let vector = Matrix::Trainable(Parameter::new("vector", random(&device, 1, [4])));
    let x = Var::constant(random(&device, 2, [2, 4]));
    assert!(matches!(ops::linear(&Tape::new(), &x, &vector, None), Err(Error::Shape { .. })));
}

#[test]
fn a_registered_parameter_that_is_not_used_keeps_its_gradient() {
    let device = device();
    let unused = Parameter::new("unused", random(&device, 1, [4]));
    let mut store = GradStore::new(std::slice::from_ref(&unused)).unwrap();
    let tape = Tape::new();
    let loss = ops::sum(&tape, &tape.variable(random(&device, 2, [4]))).unwrap();
    tape.backward(&loss, &mut store).unwrap();
    assert_eq!(bits(store.get(&unused).unwrap()), [0; 4]);
}

#[test]
fn the_store_keeps_one_gradient_per_parameter_in_order_of_creation() {
    let device = device();
    let first = Parameter::new("first", random(&device, 1, [4]));
    let second = Parameter::new("second", random(&device, 2, [2, 3]));
    let third = Parameter::new("third", random(&device, 3, [1]));
    let store = GradStore::new(&[second.clone(), first.clone(), second.clone()]).unwrap();
    let names: Vec<&str> = store.parameters().map(Parameter::name).collect();
    assert_eq!(names, ["first", "second"]);
    assert_eq!(store.tensors().len(), 2);
    assert_eq!(**store.get(&second).unwrap().shape(), [2, 3]);
    assert!(store.get(&third).is_none());
    let held = device.usage().live_bytes[Category::Gradients.index()];
    assert_eq!(held, 2 * 256, "two gradients below the ledger's unit");
}

/// Operators read a trained matrix rounded to its storage type; the copy is made once and follows every update of the master.
#[test]
fn a_master_copy_is_read_in_its_storage_type() {
    let device = device();
    let live = || device.usage().live_bytes[Category::Weights.index()];
    let values: Vec<f32> = (0..4096).map(|i| 1.0 + i as f32 / 65_536.0).collect();
    let value = device.from_slice(&values, [64, 64], Category::Weights).unwrap();
    let parameter = Parameter::stored_as("w", value, DType::BF16);
    let matrix = Matrix::Trainable(parameter.clone());
    assert_eq!((matrix.dtype(), parameter.value().dtype()), (DType::BF16, DType::F32));
    assert_eq!(live(), 4 * 4096);
    let read = || matrix.weight().unwrap().to_dense().unwrap().to_f32_vec().unwrap();
    let rounded = |values: &[f32]| -> Vec<f32> {
        let master = device.from_slice(values, [values.len()], Category::Workspace).unwrap();
        elementwise::cast(&master, DType::BF16).unwrap().to_f32_vec().unwrap()
    };
    for _ in 0..2 {
        assert_eq!(read(), rounded(&values));
        assert_eq!(live(), (4 + 2) * 4096, "one copy, kept");
    }
    let halves: Vec<f32> = values.iter().map(|v| v / 3.0).collect();
    parameter.update(|value| value.write(&halves)).unwrap();
    assert_eq!(live(), 4 * 4096, "an update drops the copy");
    assert_eq!(read(), rounded(&halves));
    assert_eq!(parameter.value().to_vec::<f32>().unwrap(), halves, "the master is not rounded");
    Parameter::update_all([&parameter], |mut all| all[0].write(&values)).unwrap();
    assert_eq!(live(), 4 * 4096, "an update of several drops the copy");
    assert_eq!(read(), rounded(&values));
    // Without another storage type there is no copy.
    let plain = Parameter::new("v", device.from_slice(&values, [64, 64], Category::Weights).unwrap());
    plain.stored().unwrap();
    assert_eq!(live(), (4 + 2 + 4) * 4096);
}
