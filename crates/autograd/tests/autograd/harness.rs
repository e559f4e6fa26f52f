//! What the tests share: a strict device, leaves, and gradients held to central differences of the f64 oracles.

use unsloth_autograd::{GradStore, Parameter, Result, Tape, Var};
use unsloth_core::{Category, DType, Device, Shape, Tensor};
use unsloth_cpu::{CpuBackend, CpuOptions};
use unsloth_testkit::data::{self, Data};

/// Unwritten elements are NaN, so a gradient that nobody computed cannot pass for a number. One thread, so that what a test
/// counts is its own.
pub(crate) fn device() -> Device {
    let options = CpuOptions { num_threads: Some(1), fill_arbitrary_with_nan: true, ..CpuOptions::default() };
    Device::new(CpuBackend::new(options).unwrap())
}

/// A differentiable input: f32 numbers, kept in f64.
#[derive(Clone)]
pub(crate) struct Leaf {
    pub(crate) shape: Shape,
    pub(crate) values: Vec<f64>,
}

pub(crate) fn leaf(data: &mut Data, shape: impl Into<Shape>, scale: f64) -> Leaf {
    let shape = shape.into();
    Leaf { shape, values: data.normal(shape.num_elements(), scale, DType::F32) }
}

pub(crate) fn tensor(device: &Device, leaf: &Leaf) -> Tensor {
    data::tensor(device, &leaf.values, leaf.shape, DType::F32).unwrap()
}

pub(crate) fn parameter(device: &Device, name: &str, leaf: &Leaf) -> Parameter {
    let value = tensor(device, leaf);
    value.retag(Category::Weights);
    Parameter::new(name, value)
}

pub(crate) fn parameters(device: &Device, leaves: &[Leaf]) -> Vec<Parameter> {
    leaves.iter().enumerate().map(|(i, leaf)| parameter(device, &format!("parameter {i}"), leaf)).collect()
}

pub(crate) fn random(device: &Device, seed: u64, shape: impl Into<Shape>) -> Tensor {
    tensor(device, &leaf(&mut Data::new(seed), shape, 1.0))
}

/// The bit pattern of an f32 tensor.
pub(crate) fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Bytes of activations held now.
pub(crate) fn activations(device: &Device) -> u64 {
    device.usage().live_bytes[Category::Activations.index()]
}

/// A function in two forms.
pub(crate) struct Case<'a> {
    pub(crate) name: &'a str,
    pub(crate) variables: Vec<Leaf>,
    pub(crate) parameters: Vec<Leaf>,
}

/// What the tape gives for one choice of seeds.
struct Gradients {
    variables: Vec<Option<Vec<f64>>>,
    parameters: Vec<Vec<f64>>,
}

impl Case<'_> {
    /// Holds the outputs of `on_tape` to those of `reference`, and every gradient to central differences of `reference`, for
    /// every choice of outputs that have a gradient; then holds gradients of fewer parameters to those of all, bit for bit.
    ///
    /// `reference` maps the leaves, variables first, to the outputs.
    pub(crate) fn check(
        &self,
        device: &Device,
        on_tape: impl Fn(&Tape, &[Var], &[Parameter]) -> Result<Vec<Var>>,
        reference: impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>,
    ) {
        let leaves: Vec<Vec<f64>> =
            self.variables.iter().chain(&self.parameters).map(|leaf| leaf.values.clone()).collect();
        let expected = reference(&leaves);
        let mut data = Data::new(77);
        let seeds: Vec<Vec<f64>> = expected.iter().map(|out| data.normal(out.len(), 1.0, DType::F32)).collect();
        let tensors: Vec<Tensor> = self.variables.iter().map(|leaf| tensor(device, leaf)).collect();
        let trained = parameters(device, &self.parameters);

        let run = |seeded: usize, registered: &[Parameter]| {
            let mut store = GradStore::new(registered).unwrap();
            let tape = Tape::new();
            let variables: Vec<Var> = tensors.iter().map(|tensor| tape.variable(tensor.clone())).collect();
            let outputs = on_tape(&tape, &variables, &trained).unwrap();
            for (i, (output, expected)) in outputs.iter().zip(&expected).enumerate() {
                close(&format!("{} output {i}", self.name), &data::read(output.tensor()).unwrap(), expected);
            }
            let seeds = outputs.iter().zip(&seeds).enumerate().filter(|(i, _)| seeded >> i & 1 == 1);
            let seeds = seeds
                .map(|(_, (out, seed))| (out, data::tensor(device, seed, *out.shape(), DType::F32).unwrap()))
                .collect();
            let mut found = tape.backward_from(seeds, &mut store).unwrap();
            let variables = variables.iter().map(|v| found.take(v).map(|g| data::read(&g).unwrap())).collect();
            let parameters = registered.iter().map(|p| data::read(store.get(p).unwrap()).unwrap()).collect();
            Gradients { variables, parameters }
        };

        for seeded in 1..1usize << expected.len() {
            let loss = |leaves: &[Vec<f64>]| {
                let outputs = reference(leaves);
                let seeded = (0..seeds.len()).filter(|i| seeded >> i & 1 == 1);
                seeded.map(|i| outputs[i].iter().zip(&seeds[i]).map(|(a, b)| a * b).sum::<f64>()).sum::<f64>()
            };
            let found = run(seeded, &trained);
            for (i, leaf) in (0..leaves.len()).zip(self.variables.iter().chain(&self.parameters)) {
                let numeric = central_differences(&leaves, i, &loss);
                let zeros = || vec![0.0; leaf.values.len()];
                let actual = match i.checked_sub(self.variables.len()) {
                    None => found.variables[i].clone().unwrap_or_else(zeros),
                    Some(i) => found.parameters[i].clone(),
                };
                close(&format!("{} leaf {i}, outputs {seeded:b}", self.name), &actual, &numeric);
            }
        }

        let all = (1 << expected.len()) - 1;
        let full = run(all, &trained);
        assert_eq!(run(all, &[]).variables, full.variables, "{}: without parameters", self.name);
        for (i, parameter) in trained.iter().enumerate() {
            let alone = run(all, std::slice::from_ref(parameter));
            assert_eq!(alone.parameters[0], full.parameters[i], "{}: parameter {i} alone", self.name);
            assert_eq!(alone.variables, full.variables, "{}: variables beside parameter {i}", self.name);
        }
    }
}

/// Gradient of `f` with respect to leaf `which`.
pub(crate) fn central_differences(leaves: &[Vec<f64>], which: usize, f: &impl Fn(&[Vec<f64>]) -> f64) -> Vec<f64> {
    let mut point = leaves.to_vec();
    let mut gradient = Vec::new();
    for i in 0..leaves[which].len() {
        // The cube root of the f64 epsilon balances truncation and cancellation at about 1e-10 each.
        let (x, step) = (leaves[which][i], 6.1e-6 * leaves[which][i].abs().max(1.0));
        let mut at = |value| {
            point[which][i] = value;
            f(&point)
        };
        gradient.push((at(x + step) - at(x - step)) / ((x + step) - (x - step)));
        point[which][i] = x;
    }
    gradient
}

/// Values computed in f32 against the truth. The functions tested sum at most a few hundred terms of order 1, each rounded
/// at 2^-24: 1e-5 of the largest value (and 1e-6 where terms cancel) is above rounding and far below a wrong formula.
pub(crate) fn close(what: &str, actual: &[f64], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{what}: number of elements");
    let limit = 1e-6 + 1e-5 * expected.iter().fold(0.0f64, |most, e| most.max(e.abs()));
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(e.is_finite(), "{what}[{i}]: the reference is {e}");
        assert!((a - e).abs() <= limit, "{what}[{i}]: {a:e}, expected {e:e}");
    }
}
