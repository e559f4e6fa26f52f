//! What a checkpointed function's second run does not compute.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use unsloth_autograd::{
    Deferred, GradStore, Matrix, Parameter, Result, Tape, Var, checkpoint,
    ops::{self, LoraAdapter, LoraDropout},
    tiled,
};
use unsloth_core::{
    Category, Device, Tensor,
    observe::{Call, Observer, observed},
    ops::lora_linear::Dropout,
    rng::Philox,
};

use crate::harness::{bits, device, random};

const ROWS: usize = 12;
const WIDTH: usize = 8;

/// Counts forward calls of products with a weight, and of sums.
#[derive(Default)]
struct Calls {
    products: AtomicUsize,
    sums: AtomicUsize,
}

impl Calls {
    fn take(&self) -> (usize, usize) {
        (self.products.swap(0, Ordering::Relaxed), self.sums.swap(0, Ordering::Relaxed))
    }
}

impl Observer for Calls {
    fn is_on(&self) -> bool {
        true
    }

    fn before(&self, _: &Device) -> Result<()> {
        Ok(())
    }

    fn after(&self, _: &Device, call: &Call<'_>, _: &[&Tensor]) -> Result<()> {
        match call.name {
            "linear forward" | "lora_linear forward" => self.products.fetch_add(1, Ordering::Relaxed),
            "add" => self.sums.fetch_add(1, Ordering::Relaxed),
            _ => 0,
        };
        Ok(())
    }
}

/// `x + lora_linear(linear(x))`, with dropout.
#[derive(Clone)]
struct Block {
    inner: Matrix,
    outer: Matrix,
    adapter: LoraAdapter,
}

impl Block {
    fn new(device: &Device) -> (Self, Vec<Parameter>) {
        let weight = |seed| {
            let weight = random(device, seed, [WIDTH, WIDTH]);
            weight.retag(Category::Weights);
            weight
        };
        let trained = Parameter::new("inner", weight(1));
        let lora_a = Parameter::new("a", random(device, 2, [3, WIDTH]));
        let lora_b = Parameter::new("b", random(device, 3, [WIDTH, 3]));
        let numbers: Vec<i32> = (0..ROWS as i32).collect();
        let places = device.from_slice(&numbers, [ROWS], Category::Activations).unwrap();
        let dropout = Dropout { probability: 0.25, stream: Philox::new(7, 1), step: 4 };
        let dropout = LoraDropout { dropout, sequences: places.clone(), positions: places };
        let adapter =
            LoraAdapter { lora_a: lora_a.clone(), lora_b: lora_b.clone(), scale: 0.5, dropout: Some(dropout) };
        let outer = Matrix::Frozen(device.prepare_weight(weight(4)).unwrap());
        (Self { inner: Matrix::Trainable(trained.clone()), outer, adapter }, vec![trained, lora_a, lora_b])
    }

    fn deferred(&self, tape: &Tape, x: &Var) -> Result<Deferred> {
        let inner = ops::linear(tape, x, &self.inner, None)?;
        ops::deferred_lora_linear(tape, &inner, &self.outer, None, &self.adapter)?.add(tape, x)
    }

    fn forward(&self, tape: &Tape, x: &Var) -> Result<Var> {
        let inner = ops::linear(tape, x, &self.inner, None)?;
        ops::add(tape, ops::lora_linear(tape, &inner, &self.outer, None, &self.adapter)?, x)
    }
}

/// Bits of the result and of all gradients of a function of [`Block`], and its calls, forward and backward.
fn pass(calls: &Arc<Calls>, f: impl Fn(&Tape, &Var, Block) -> Result<Var>) -> (Vec<Vec<u32>>, [(usize, usize); 2]) {
    let device = observed(&device(), calls.clone());
    let (block, parameters) = Block::new(&device);
    let mut store = GradStore::new(&parameters).unwrap();
    let tape = Tape::new();
    let x = tape.variable(random(&device, 9, [ROWS, WIDTH]));
    let y = f(&tape, &x, block).unwrap();
    let forward = calls.take();
    let mut all = vec![bits(y.tensor())];
    let mut found = tape.backward_from(vec![(&y, random(&device, 10, [ROWS, WIDTH]))], &mut store).unwrap();
    all.push(bits(&found.take(&x).unwrap()));
    all.extend(parameters.iter().map(|parameter| bits(store.get(parameter).unwrap())));
    assert!(all.iter().all(|values| values.iter().any(|&bits| f32::from_bits(bits) != 0.0)));
    (all, [forward, calls.take()])
}

#[test]
fn outputs_are_not_computed_again() {
    let calls = Arc::new(Calls::default());
    let (plain, [forward, backward]) = pass(&calls, |tape, x, block| block.forward(tape, x));
    assert_eq!(forward, (2, 1));
    let sums_of_gradients = backward.1;
    assert_eq!(backward.0, 0);

    let again = |tape: &Tape, x: &Var, block: Block| {
        Ok(checkpoint(tape, &[x], move |tape, x| Ok(vec![block.forward(tape, &x[0])?]))?.remove(0))
    };
    assert_eq!(pass(&calls, again), (plain.clone(), [(2, 1), (2, sums_of_gradients + 1)]));
    let deferred = |tape: &Tape, x: &Var, block: Block| {
        Ok(checkpoint(tape, &[x], move |tape, x| Ok(vec![block.deferred(tape, &x[0])?]))?.remove(0))
    };
    assert_eq!(pass(&calls, deferred), (plain.clone(), [(2, 1), (1, sums_of_gradients)]));
    let computed = |tape: &Tape, x: &Var, block: Block| block.deferred(tape, x)?.compute();
    assert_eq!(pass(&calls, computed), (plain, [forward, backward]));
}

#[test]
fn outputs_that_are_read_further_on_are_computed() {
    let calls = Arc::new(Calls::default());
    let twice = |tape: &Tape, x: &Var, block: &Block| block.deferred(tape, &block.deferred(tape, x)?.compute()?);
    let (plain, _) = pass(&calls, |tape, x, block| twice(tape, x, &block)?.compute());
    let (found, [forward, backward]) = pass(&calls, |tape, x, block| {
        Ok(checkpoint(tape, &[x], move |tape, x| Ok(vec![twice(tape, &x[0], &block)?]))?.remove(0))
    });
    assert_eq!((found, forward), (plain, (4, 2)));
    assert_eq!(backward.0, 3);
}

#[test]
fn tiles_are_not_computed_again_either() {
    let calls = Arc::new(Calls::default());
    // Without dropout: a tile's rows are elsewhere among the rows of a call.
    let without = |block: Block| Block { adapter: LoraAdapter { dropout: None, ..block.adapter }, ..block };
    let tile = ROWS / 3;
    let (plain, [_, all]) = pass(&calls, |tape, x, block| {
        let block = without(block);
        tiled(tape, x, tile, move |tape, rows, _| block.forward(tape, rows))
    });
    let (found, [_, some]) = pass(&calls, |tape, x, block| {
        let block = without(block);
        tiled(tape, x, tile, move |tape, rows, _| block.deferred(tape, rows))
    });
    assert_eq!(found, plain);
    assert_eq!((all.0, some.0), (6, 3));
}

#[test]
fn an_error_of_a_deferred_value_is_given_where_it_is_computed() {
    let device = device();
    let tape = Tape::new();
    let x = tape.variable(random(&device, 1, [2, 4]));
    let other = Var::constant(random(&device, 2, [3, 4]));
    let sum = Deferred::from(x).add(&tape, &other).unwrap();
    assert!(sum.compute().unwrap_err().to_string().starts_with("add: "));
    let foreign = Tape::new().variable(random(&device, 3, [2, 4]));
    assert!(Deferred::from(foreign.clone()).add(&tape, &foreign).is_err());
}
