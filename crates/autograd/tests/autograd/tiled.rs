//! A function of rows in tiles: the same rows, sums over tiles, the memory of one.

use std::{
    cell::{Cell, RefCell},
    ops::Range,
    rc::Rc,
};

use unsloth_autograd::{
    Error, GradStore, Matrix, Parameter, Result, Tape, Var, Vector, checkpoint,
    ops::{self, NormOptions},
    tiled,
};
use unsloth_core::{Category, Tensor, ops::glu::Activation};

use crate::harness::{activations, bits, device, random};

const ROWS: usize = 23;
const NORM: NormOptions = NormOptions { eps: 1e-6, weight_offset: 0.0 };

/// A gated layer of 16 features with a norm, as parameters.
#[derive(Clone)]
struct Gated {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    norm: Vector,
}

impl Gated {
    fn new(width: usize) -> Self {
        let device = device();
        let matrix =
            |name: &str, seed, shape: [usize; 2]| Matrix::Trainable(Parameter::new(name, random(&device, seed, shape)));
        Self {
            gate: matrix("gate", 1, [width, 16]),
            up: matrix("up", 2, [width, 16]),
            down: matrix("down", 3, [16, width]),
            norm: Vector::Trainable(Parameter::new("norm", random(&device, 4, [16]))),
        }
    }

    fn parameters(&self) -> Vec<Parameter> {
        let matrices = [&self.gate, &self.up, &self.down].map(|matrix| matrix.parameter().unwrap().clone());
        matrices.into_iter().chain(self.norm.parameter().cloned()).collect()
    }

    fn forward(&self, tape: &Tape, x: &Var) -> Result<Var> {
        let gate = ops::linear(tape, x, &self.gate, None)?;
        let up = ops::linear(tape, x, &self.up, None)?;
        let out = ops::linear(tape, &ops::glu(tape, &gate, &up, Activation::Silu)?, &self.down, None)?;
        ops::rms_norm(tape, &out, &self.norm, NORM)
    }

    fn tiled(&self, tape: &Tape, x: &Var, tile: usize) -> Result<Var> {
        let layer = self.clone();
        tiled(tape, x, tile, move |tape, rows, _| layer.forward(tape, rows))
    }
}

/// What a pass gives: the result, the gradient of its input, those of the parameters, and the order of the hooks.
#[derive(Debug, PartialEq)]
struct Pass {
    out: Vec<u32>,
    dx: Vec<u32>,
    parameters: Vec<Vec<f32>>,
    ready: Vec<String>,
}

fn pass(layer: &Gated, build: impl Fn(&Tape, &Var) -> Result<Var>) -> Pass {
    let parameters = layer.parameters();
    let device = parameters[0].value().device().clone();
    let mut store = GradStore::new(&parameters).unwrap();
    let ready = Rc::new(RefCell::new(Vec::new()));
    let seen = ready.clone();
    store.on_ready(move |parameter, _| {
        seen.borrow_mut().push(parameter.name().to_owned());
        Ok(())
    });
    let tape = Tape::new();
    let x = tape.variable(random(&device, 5, [ROWS, 16]));
    let y = build(&tape, &x).unwrap();
    let seed = random(&device, 6, [ROWS, 16]);
    let out = bits(y.tensor());
    let mut found = tape.backward_from(vec![(&y, seed)], &mut store).unwrap();
    let gradient = |parameter: &Parameter| store.get(parameter).unwrap().to_vec::<f32>().unwrap();
    Pass {
        out,
        dx: bits(&found.take(&x).unwrap()),
        parameters: parameters.iter().map(gradient).collect(),
        ready: ready.take(),
    }
}

fn worst(actual: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    actual.iter().zip(expected).fold(0.0f32, |worst, (a, e)| worst.max((a - e).abs())) / largest
}

#[test]
fn rows_have_the_same_bits_and_sums_the_same_terms() {
    let layer = Gated::new(40);
    let whole = pass(&layer, |tape, x| layer.forward(tape, x));
    assert!(whole.ready.len() == 4 && whole.parameters.iter().flatten().all(|value| value.is_finite()));
    for tile in [ROWS, ROWS + 1, usize::MAX] {
        assert_eq!(pass(&layer, |tape, x| layer.tiled(tape, x, tile)), whole, "one tile of {tile}");
    }
    for tile in [1, 2, 5, 11, 22] {
        let found = pass(&layer, |tape, x| layer.tiled(tape, x, tile));
        // A product's row is a sum over its own row; how many others are computed with it may choose another path on the host.
        let floats = |bits: &[u32]| bits.iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>();
        for (name, actual, expected) in [("out", &found.out, &whole.out), ("dx", &found.dx, &whole.dx)] {
            let error = worst(&floats(actual), &floats(expected));
            assert!(error <= 1e-6, "{name}, tiles of {tile}: {error}");
        }
        for (actual, expected) in found.parameters.iter().zip(&whole.parameters) {
            let error = worst(actual, expected);
            assert!(error <= 2e-6, "tiles of {tile}: {error}");
        }
        assert_eq!(found.ready, whole.ready, "each hook once, in the same order");
        // The same tiles give the same bits, within a function that is itself computed again too.
        let layer = &layer;
        let again = pass(layer, |tape, x| {
            let layer = layer.clone();
            let inside = move |tape: &Tape, x: &[Var]| Ok(vec![layer.tiled(tape, &x[0], tile)?]);
            Ok(checkpoint(tape, &[x], inside)?.swap_remove(0))
        });
        assert_eq!(again, found, "tiles of {tile}");
    }
}

#[test]
fn every_row_comes_once_with_its_place() {
    let device = device();
    let places = Rc::new(RefCell::new(Vec::new()));
    let x = random(&device, 1, [10, 3]);
    let seen = places.clone();
    let tape = Tape::inference();
    let y = tiled(&tape, &Var::constant(x.clone()), 4, move |_, rows, range: Range<usize>| {
        seen.borrow_mut().push(range);
        Ok(rows.clone())
    });
    assert_eq!(bits(y.unwrap().tensor()), bits(&x));
    assert_eq!(places.take(), [0..4, 4..8, 8..10]);
}

#[test]
fn the_inside_is_held_for_one_tile() {
    let layer = Gated::new(4096);
    let device = layer.parameters()[0].value().device().clone();
    let x = |tape: &Tape| tape.variable(random(&device, 7, [256, 16]));
    let peak = |tile: usize| {
        let mut store = GradStore::new(&[]).unwrap();
        let tape = Tape::new();
        let x = x(&tape);
        device.backend().reset_peak();
        let before = activations(&device);
        let y = layer.tiled(&tape, &x, tile).unwrap();
        let seed = random(&device, 8, [256, 16]);
        tape.backward_from(vec![(&y, seed)], &mut store).unwrap();
        device.usage().at_peak(Category::Activations) - before
    };
    let (whole, parts) = (peak(256), peak(32));
    // Gate, up and their product, and on the way back one gradient more at most, of an eighth of the rows.
    assert!(parts * 6 < whole, "{parts} bytes in tiles of an eighth, {whole} at once");
}

#[test]
fn what_needs_no_gradient_is_not_recorded() {
    let (device, calls) = (device(), Rc::new(Cell::new(0)));
    let frozen = Matrix::Frozen(device.prepare_weight(random(&device, 1, [4, 16])).unwrap());
    let seen = calls.clone();
    let tape = Tape::new();
    let x = Var::constant(random(&device, 2, [6, 16]));
    let y = tiled(&tape, &x, 2, move |tape, rows, _| {
        seen.set(seen.get() + 1);
        ops::linear(tape, rows, &frozen, None)
    });
    assert!(!y.unwrap().requires_grad());
    assert_eq!(calls.get(), 3);
}

#[test]
fn refusals() {
    let device = device();
    let tape = Tape::new();
    let x = tape.variable(random(&device, 1, [6, 4]));
    let message = |result: Result<Var>| result.unwrap_err().to_string();
    let same = |_: &Tape, rows: &Var, _| Ok(rows.clone());
    assert_eq!(message(tiled(&tape, &x, 0, same)), "tiled: tile_rows = 0, must be 1 or more");
    let flat = tape.variable(random(&device, 1, [6]));
    assert!(message(tiled(&tape, &flat, 2, same)).starts_with("tiled: `x` has shape [6]"));
    let fewer = |_: &Tape, rows: &Var, _: Range<usize>| {
        let tensor: Tensor = random(rows.tensor().device(), 1, [1, 4]);
        Ok(Var::constant(tensor))
    };
    assert!(message(tiled(&tape, &x, 2, fewer)).starts_with("tiled: `tile` has shape [1, 4]"));
    let outside = x.clone();
    let captured = tiled(&tape, &x, 2, move |tape, rows, _| {
        let _ = rows;
        ops::mul(tape, outside.clone(), &outside)
    });
    assert!(matches!(captured.unwrap_err(), Error::InvalidSpec { .. }));
    let variable = tiled(&tape, &x, 2, |tape, rows, _| Ok(tape.variable(rows.tensor().clone())));
    assert!(message(variable).contains("a variable made inside the function"));
}
