//! A two-layer decoder in which every operator takes part, against the same composition of oracles in f64.

use std::{cell::RefCell, rc::Rc};

use unsloth_autograd::{
    GradStore, Matrix, Parameter, Recompute, Result, Tape, Var, Vector, checkpoint, checkpoint_in,
    ops::{self, AttentionSequences, LoraAdapter, NormOptions, RopeAngles},
};
use unsloth_core::{
    DType, Device, Place, Sequences, Tensor, TensorStore,
    ops::{
        attention::Options,
        cross_entropy::{IGNORE_INDEX, LossSpec},
        glu::Activation,
        rope::Layout,
        rope_table::{RopeSpec, Scaling},
    },
};
use unsloth_testkit::{
    arith::Exact,
    data::{self, Data},
    oracle::{self, linear::Dims},
};

use crate::{
    harness::{Leaf, bits, central_differences, close, device, leaf, parameters, tensor},
    reference,
};

const LENS: [usize; 2] = [4, 3];
const TOKENS: usize = LENS[0] + LENS[1];
const HIDDEN: usize = 8;
const HEADS: usize = 2;
const HEAD_DIM: usize = 4;
const INTERMEDIATE: usize = 6;
const VOCAB: usize = 9;
const RANK: usize = 2;
const SCALE: f32 = 1.5;
const NORM: NormOptions = NormOptions { eps: 1e-3, weight_offset: 0.0 };
const IDS: [i32; TOKENS] = [1, 8, 3, 3, 0, 5, 1];
const TARGETS: [i32; TOKENS] = [8, 3, 3, IGNORE_INDEX, 5, 1, IGNORE_INDEX];

/// Trained leaves of the model before those of its layers: the tied table and the last norm.
const OWN: usize = 2;

/// Shapes of the trained leaves of a layer, in the order that [`Layer::new`] and [`reference_layer`] read them.
const TRAINED: [&[usize]; 13] = [
    &[HIDDEN],                   // first norm
    &[RANK, HIDDEN],             // q, A
    &[HEADS * HEAD_DIM, RANK],   // q, B
    &[HEAD_DIM, HIDDEN],         // k
    &[HEAD_DIM],                 // k, bias
    &[RANK, HIDDEN],             // v, A
    &[HEAD_DIM, RANK],           // v, B
    &[HIDDEN, HEADS * HEAD_DIM], // o
    &[HIDDEN],                   // second norm
    &[INTERMEDIATE, HIDDEN],     // gate
    &[RANK, HIDDEN],             // up, A
    &[INTERMEDIATE, RANK],       // up, B
    &[HIDDEN, INTERMEDIATE],     // down
];

/// Shapes of the frozen matrices of a layer: q, v, up.
const FROZEN: [[usize; 2]; 3] = [[HEADS * HEAD_DIM, HIDDEN], [HEAD_DIM, HIDDEN], [INTERMEDIATE, HIDDEN]];

/// Where inputs wait.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stored {
    InHostMemory,
    OnDisk,
}

/// How the layers are run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Policy {
    /// Everything is kept.
    None,
    /// Each layer is recomputed.
    EachLayer,
    /// The same, with the inputs in a store of the device.
    Stored(Stored),
    /// Results of cheap operators are computed again.
    Selective(Recompute),
    /// Both layers are recomputed together.
    Layers,
    /// Both together, and each within.
    Nested,
    /// Layers, last norm and loss are recomputed together.
    All,
}

struct Shared {
    sequences: AttentionSequences,
    angles: RopeAngles,
}

#[derive(Clone)]
struct Layer {
    norms: [Vector; 2],
    q: (Matrix, LoraAdapter),
    k: (Matrix, Vector),
    v: (Matrix, LoraAdapter),
    o: Matrix,
    gate: Matrix,
    up: (Matrix, LoraAdapter),
    down: Matrix,
    shared: Rc<Shared>,
}

impl Layer {
    fn new(p: &[Parameter], frozen: &[Matrix], shared: Rc<Shared>) -> Self {
        let adapter =
            |i: usize| LoraAdapter { lora_a: p[i].clone(), lora_b: p[i + 1].clone(), scale: SCALE, dropout: None };
        let matrix = |i: usize| Matrix::Trainable(p[i].clone());
        let vector = |i: usize| Vector::Trainable(p[i].clone());
        Self {
            norms: [vector(0), vector(8)],
            q: (frozen[0].clone(), adapter(1)),
            k: (matrix(3), vector(4)),
            v: (frozen[1].clone(), adapter(5)),
            o: matrix(7),
            gate: matrix(9),
            up: (frozen[2].clone(), adapter(10)),
            down: matrix(12),
            shared,
        }
    }

    /// Takes and gives the residual stream and, after the first layer, the branch that is yet to be added to it.
    fn forward(&self, tape: &Tape, state: &[Var]) -> Result<Vec<Var>> {
        let (x, stream) = match state {
            [stream, branch] => ops::add_rms_norm(tape, branch.clone(), stream, &self.norms[0], NORM)?,
            _ => (ops::rms_norm(tape, &state[0], &self.norms[0], NORM)?, state[0].clone()),
        };
        let heads = |x: Var, n| ops::reshape(tape, &x, [TOKENS, n, HEAD_DIM]);
        let q = heads(ops::lora_linear(tape, &x, &self.q.0, None, &self.q.1)?, HEADS)?;
        let k = heads(ops::linear(tape, &x, &self.k.0, Some(&self.k.1))?, 1)?;
        let v = heads(ops::lora_linear(tape, &x, &self.v.0, None, &self.v.1)?, 1)?;
        drop(x);
        let (q, k) = ops::rope(tape, q, k, &self.shared.angles, Layout::Half)?;
        let out = ops::attention(tape, &q, &k, &v, &self.shared.sequences, Options::causal(HEAD_DIM))?;
        let out = ops::reshape(tape, &out, [TOKENS, HEADS * HEAD_DIM])?;
        let branch = ops::linear(tape, &out, &self.o, None)?;
        let (x, stream) = ops::add_rms_norm(tape, branch, &stream, &self.norms[1], NORM)?;
        let gate = ops::linear(tape, &x, &self.gate, None)?;
        let up = ops::lora_linear(tape, &x, &self.up.0, None, &self.up.1)?;
        let branch = ops::linear(tape, &ops::glu(tape, &gate, &up, Activation::Silu)?, &self.down, None)?;
        Ok(vec![stream, branch])
    }
}

pub(crate) struct Model {
    leaves: Vec<Leaf>,
    frozen: Vec<Leaf>,
    angles: reference::Angles,
    pub(crate) parameters: Vec<Parameter>,
    layers: Vec<Layer>,
    ids: Tensor,
    targets: Tensor,
}

/// What a step gives, bit for bit.
#[derive(Debug, PartialEq)]
pub(crate) struct Step {
    pub(crate) loss: Vec<u32>,
    pub(crate) gradients: Vec<Vec<u32>>,
    /// Parameters in the order in which their gradients were complete.
    pub(crate) ready: Vec<String>,
}

impl Model {
    /// With `tied_layers` both layers have the same parameters.
    pub(crate) fn new(device: &Device, tied_layers: bool) -> Self {
        let mut data = Data::new(42);
        let mut leaves = vec![leaf(&mut data, [VOCAB, HIDDEN], 1.0), leaf(&mut data, [HIDDEN], 1.0)];
        for shape in TRAINED.iter().cycle().take(TRAINED.len() * if tied_layers { 1 } else { 2 }) {
            leaves.push(leaf(&mut data, unsloth_core::Shape::try_from(*shape).unwrap(), 0.5));
        }
        let frozen: Vec<Leaf> = FROZEN.iter().cycle().take(6).map(|&shape| leaf(&mut data, shape, 0.5)).collect();
        let matrices: Vec<Matrix> =
            frozen.iter().map(|leaf| Matrix::Frozen(device.prepare_weight(tensor(device, leaf)).unwrap())).collect();
        let sequences = Sequences::from_lengths(device, &LENS).unwrap();
        let positions = sequences.positions();
        let spec = RopeSpec { head_dim: HEAD_DIM, theta: 50.0, scaling: Scaling::Default };
        let (cos, sin) = spec.tables(device, 4).unwrap();
        let angles = reference::Angles {
            cos: data::read(&cos).unwrap(),
            sin: data::read(&sin).unwrap(),
            positions: positions.clone(),
            head_dim: HEAD_DIM,
        };
        let positions = data::integers(device, &positions).unwrap();
        let angles_on_device = RopeAngles { cos, sin, positions };
        let shared = Rc::new(Shared { sequences: sequences.into(), angles: angles_on_device });
        let parameters = parameters(device, &leaves);
        let layer = |i: usize| {
            let first = OWN + if tied_layers { 0 } else { i * TRAINED.len() };
            Layer::new(&parameters[first..first + TRAINED.len()], &matrices[3 * i..3 * i + 3], shared.clone())
        };
        let layers = vec![layer(0), layer(1)];
        let ids = data::integers(device, &IDS).unwrap();
        let targets = data::integers(device, &TARGETS).unwrap();
        Self { leaves, frozen, angles, parameters, layers, ids, targets }
    }

    pub(crate) fn loss(&self, tape: &Tape, policy: Policy) -> Result<Var> {
        let table = Matrix::Trainable(self.parameters[0].clone());
        let embedded = ops::embedding(tape, &table, &self.ids, DType::F32)?;
        let (layers, targets) = (self.layers.clone(), self.targets.clone());
        let norm = Vector::Trainable(self.parameters[1].clone());
        let all = move |tape: &Tape, state: &[Var]| layers[1].forward(tape, &layers[0].forward(tape, state)?);
        let head = move |tape: &Tape, state: &[Var]| {
            let (x, _) = ops::add_rms_norm(tape, state[1].clone(), &state[0], &norm, NORM)?;
            ops::linear_cross_entropy(tape, &x, &table, &targets, LossSpec::mean(5))
        };
        let state = match policy {
            Policy::None => all(tape, &[embedded])?,
            Policy::EachLayer => each_layer(tape, None, &[embedded], &self.layers)?,
            Policy::Stored(stored) => {
                let place = match stored {
                    Stored::InHostMemory => Place::Host,
                    Stored::OnDisk => Place::Disk { folder: std::env::temp_dir() },
                };
                let store = self.ids.device().store(&place)?;
                let state = each_layer(tape, Some(&*store), &[embedded], &self.layers)?;
                // One input of the first layer and two of the second.
                assert_eq!((store.usage().put.num, store.usage().taken.num), (3, 0));
                state
            }
            Policy::Selective(recompute) => {
                tape.set_recompute(recompute);
                all(tape, &[embedded])?
            }
            Policy::Layers => checkpoint(tape, &[&embedded], all)?,
            Policy::Nested => {
                let layers = self.layers.clone();
                checkpoint(tape, &[&embedded], move |tape, state| each_layer(tape, None, state, &layers))?
            }
            Policy::All => {
                let loss = move |tape: &Tape, state: &[Var]| Ok(vec![head(tape, &all(tape, state)?)?]);
                return Ok(checkpoint(tape, &[&embedded], loss)?.remove(0));
            }
        };
        head(tape, &state)
    }

    pub(crate) fn step(&self, policy: Policy) -> Step {
        let mut store = GradStore::new(&self.parameters).unwrap();
        let ready = Rc::new(RefCell::new(Vec::new()));
        let seen = ready.clone();
        store.on_ready(move |parameter, _| {
            seen.borrow_mut().push(parameter.name().to_owned());
            Ok(())
        });
        let tape = Tape::new();
        let loss = self.loss(&tape, policy).unwrap();
        tape.backward(&loss, &mut store).unwrap();
        let gradients = self.parameters.iter().map(|p| bits(store.get(p).unwrap())).collect();
        Step { loss: bits(loss.tensor()), gradients, ready: ready.take() }
    }

    fn reference(&self, leaves: &[Vec<f64>]) -> f64 {
        let mut stream = oracle::embedding::forward(&Exact, &leaves[0], &IDS, HIDDEN);
        for i in 0..self.layers.len() {
            let first = OWN + i * TRAINED.len();
            stream = self.reference_layer(stream, &leaves[first..first + TRAINED.len()], &self.frozen[3 * i..]);
        }
        let x = reference::rms_norm(&stream, &leaves[1], NORM);
        let logits = linear(&x, &leaves[0], None, VOCAB);
        oracle::cross_entropy::forward(&Exact, &LossSpec::mean(5), &logits, &TARGETS).loss
    }

    fn reference_layer(&self, stream: Vec<f64>, p: &[Vec<f64>], frozen: &[Leaf]) -> Vec<f64> {
        let x = reference::rms_norm(&stream, &p[0], NORM);
        let q = self.angles.rotate(&lora(&x, &frozen[0], &p[1], &p[2]), Layout::Half);
        let k = self.angles.rotate(&linear(&x, &p[3], Some(&p[4]), HEAD_DIM), Layout::Half);
        let v = lora(&x, &frozen[1], &p[5], &p[6]);
        let problem = oracle::attention::Problem {
            num_heads: HEADS,
            num_kv_heads: 1,
            head_dim: HEAD_DIM,
            options: Options::causal(HEAD_DIM),
            lens_q: LENS.to_vec(),
            lens_k: LENS.to_vec(),
        };
        let inputs = oracle::attention::Inputs { q: &q, k: &k, v: &v };
        let out = oracle::attention::forward(&Exact, &problem, inputs).out;
        let stream = oracle::elementwise::add(&Exact, &stream, &linear(&out, &p[7], None, HIDDEN));
        let x = reference::rms_norm(&stream, &p[8], NORM);
        let (gate, up) = (linear(&x, &p[9], None, INTERMEDIATE), lora(&x, &frozen[2], &p[10], &p[11]));
        let product = reference::glu(&gate, &up, Activation::Silu);
        oracle::elementwise::add(&Exact, &stream, &linear(&product, &p[12], None, HIDDEN))
    }
}

fn each_layer(tape: &Tape, store: Option<&dyn TensorStore>, state: &[Var], layers: &[Layer]) -> Result<Vec<Var>> {
    let mut state = state.to_vec();
    for layer in layers {
        let (layer, inputs) = (layer.clone(), state.iter().collect::<Vec<_>>());
        state = checkpoint_in(store, tape, &inputs, move |tape, state| layer.forward(tape, state))?;
    }
    Ok(state)
}

fn linear(x: &[f64], weight: &[f64], bias: Option<&[f64]>, out_features: usize) -> Vec<f64> {
    let dims = Dims { rows: TOKENS, in_features: x.len() / TOKENS, out_features };
    oracle::linear::forward(&Exact, dims, x, weight, bias)
}

fn lora(x: &[f64], base: &Leaf, lora_a: &[f64], lora_b: &[f64]) -> Vec<f64> {
    let dims = Dims { rows: TOKENS, in_features: base.shape[1], out_features: base.shape[0] };
    let (weight, bias, scale) = (&base.values[..], None, f64::from(SCALE));
    let layer = oracle::lora_linear::Layer { dims, weight, bias, lora_a, lora_b, rank: RANK, scale, keep: None };
    oracle::lora_linear::forward(&Exact, layer, x).y
}

#[test]
fn every_gradient_of_a_decoder() {
    let device = device();
    let model = Model::new(&device, false);
    let step = model.step(Policy::None);
    let leaves: Vec<Vec<f64>> = model.leaves.iter().map(|leaf| leaf.values.clone()).collect();
    let values = |bits: &[u32]| bits.iter().map(|&b| f64::from(f32::from_bits(b))).collect::<Vec<_>>();
    close("loss", &values(&step.loss), &[model.reference(&leaves)]);
    for (i, gradient) in step.gradients.iter().enumerate() {
        let numeric = central_differences(&leaves, i, &|leaves: &[Vec<f64>]| model.reference(leaves));
        assert!(numeric.iter().any(|g| g.abs() > 1e-4), "leaf {i} takes no part in the loss");
        close(&format!("leaf {i}"), &values(gradient), &numeric);
    }
}
