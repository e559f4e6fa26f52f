//! What [`unsloth_core::ops::lora_linear`] has to show on a device.

use unsloth_core::{
    DType, Device, Tensor, Weight,
    ops::lora_linear::{self, Adapter, Backward, Dropout, ParameterGradients, RowDropout},
};

use super::linear::{check_sums, dtype_pairs, magnitudes, weight};
use crate::{
    arith::{Arith, Exact, Rounded},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::{
        linear::Dims,
        lora_linear::{self as oracle, Layer},
    },
    report::{self, Case, Checked},
};

const OP: &str = "lora_linear";

/// `(rows, in_features, out_features, rank)`: none, one, primes, one off a power of two, a rank above both sides, and each
/// dimension longer than a block that a device may work in.
const SHAPES: [(usize, usize, usize, usize); 10] = [
    (0, 5, 7, 2),
    (1, 1, 1, 1),
    (3, 7, 1, 2),
    (2, 63, 65, 16),
    (65, 64, 63, 8),
    (7, 97, 130, 5),
    (3, 2, 3, 7),
    (1031, 3, 7, 2),
    (2, 5, 4099, 3),
    (2, 4099, 5, 3),
];

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(OP, device, check(device));
}

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    for (dtype, weight_dtype) in dtype_pairs(device) {
        // Adapters are f32 as a rule; the other type is that of the activations.
        let adapter_dtypes = if dtype == DType::F32 { vec![DType::F32] } else { vec![DType::F32, dtype] };
        for (adapter_dtype, (rows, in_features, out_features, rank)) in
            adapter_dtypes.into_iter().flat_map(|dtype| SHAPES.map(|shape| (dtype, shape)))
        {
            let dims = Dims { rows, in_features, out_features };
            let shape = format!("{rows} rows, {in_features} -> {out_features}, rank {rank}");
            let detail = format!("{shape}, {dtype}, weight {weight_dtype}, adapter {adapter_dtype}");
            let case = Case::new(device, OP, detail);
            let problem = Problem::new((dims, rank), dtype, weight_dtype, adapter_dtype);
            layer(device, &case, &problem).map_err(|failure| failure.within(&case))?;
        }
    }
    for (name, hazard) in HAZARDS {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

type Hazard = fn(&Device, &Case) -> Checked;

const HAZARDS: [(&str, Hazard); 4] = [
    ("gives_only_what_is_wanted", gives_only_what_is_wanted),
    ("rounds_once", rounds_once),
    ("zero_b_is_the_base_layer", zero_b_is_the_base_layer),
    ("rejects", rejects),
];

/// Values of one layer and its gradients, and the types they are stored in.
pub(super) struct Problem {
    pub(super) dims: Dims,
    rank: usize,
    scale: f32,
    dtype: DType,
    weight_dtype: DType,
    adapter_dtype: DType,
    x: Vec<f64>,
    dy: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
    lora_a: Vec<f64>,
    lora_b: Vec<f64>,
    dlora_a: Vec<f64>,
    dlora_b: Vec<f64>,
    pub(super) dropout: Option<Zeros>,
}

/// Dropout of a [`Problem`].
#[derive(Clone)]
pub(super) struct Zeros {
    pub(super) dropout: Dropout,
    pub(super) sequences: Vec<i32>,
    pub(super) positions: Vec<i32>,
}

impl Zeros {
    /// `[rows, in_features]`: 0, or the factor of what is kept.
    pub(super) fn keep(&self, in_features: usize) -> Vec<f64> {
        let Dropout { probability, stream, step } = self.dropout;
        let kept = 1.0 / (1.0 - f64::from(probability));
        let element = |(sequence, position): (i32, i32), channel: usize| {
            let uniform = stream.uniform(step, sequence as u32, position as u32, channel as u32);
            if uniform >= probability { kept } else { 0.0 }
        };
        let rows = self.sequences.iter().copied().zip(self.positions.iter().copied());
        rows.flat_map(|row| (0..in_features).map(move |channel| element(row, channel))).collect()
    }
}

/// Results of one call of the reference.
struct Reference {
    forward: oracle::Forward,
    gradients: oracle::Gradients,
}

/// Tensors of a [`Problem`].
pub(super) struct Tensors {
    pub(super) x: Tensor,
    dy: Tensor,
    pub(super) weight: Weight,
    bias: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    dropout: Option<(Dropout, Tensor, Tensor)>,
}

/// What a device computed.
pub(super) struct Results {
    pub(super) y: Tensor,
    pub(super) h: Tensor,
    /// Asked for alone.
    hidden: Tensor,
    pub(super) dx: Tensor,
    pub(super) dlora_a: Tensor,
    pub(super) dlora_b: Tensor,
}

impl Problem {
    pub(super) fn new((dims, rank): (Dims, usize), dtype: DType, weight_dtype: DType, adapter_dtype: DType) -> Self {
        let Dims { rows, in_features, out_features } = dims;
        let mut data = Data::new(31);
        Self {
            dims,
            rank,
            scale: 1.75,
            dtype,
            weight_dtype,
            adapter_dtype,
            x: data.normal(rows * in_features, 1.0, dtype),
            dy: data.normal(rows * out_features, 0.5, dtype),
            weight: data.normal(out_features * in_features, 0.3, weight_dtype),
            bias: data.normal(out_features, 2.0, weight_dtype),
            lora_a: data.normal(rank * in_features, 0.4, adapter_dtype),
            lora_b: data.normal(out_features * rank, 0.6, adapter_dtype),
            dlora_a: data.normal(rank * in_features, 3.0, DType::F32),
            dlora_b: data.normal(out_features * rank, 3.0, DType::F32),
            dropout: None,
        }
    }

    /// Makes `h` the update's input as it is multiplied: `x` of ones, and the identity for `A`, which `rank` has to admit.
    pub(super) fn ones_through_identity(&mut self) {
        let width = self.dims.in_features;
        self.x.fill(1.0);
        for (i, value) in self.lora_a.iter_mut().enumerate() {
            *value = if i / width == i % width { 1.0 } else { 0.0 };
        }
    }

    /// The same problem without signs: its exact results are the sums of the magnitudes of the terms of this one's.
    fn magnitudes(&self) -> Self {
        Self {
            scale: self.scale.abs(),
            x: magnitudes(&self.x),
            dy: magnitudes(&self.dy),
            weight: magnitudes(&self.weight),
            bias: magnitudes(&self.bias),
            lora_a: magnitudes(&self.lora_a),
            lora_b: magnitudes(&self.lora_b),
            dlora_a: magnitudes(&self.dlora_a),
            dlora_b: magnitudes(&self.dlora_b),
            dropout: self.dropout.clone(),
            ..*self
        }
    }

    fn reference(&self, a: &impl Arith) -> Reference {
        let keep = self.dropout.as_ref().map(|zeros| zeros.keep(self.dims.in_features));
        let layer = Layer {
            dims: self.dims,
            weight: &self.weight,
            bias: Some(&self.bias),
            lora_a: &self.lora_a,
            lora_b: &self.lora_b,
            rank: self.rank,
            scale: f64::from(self.scale),
            keep: keep.as_deref(),
        };
        let forward = oracle::forward(a, layer, &self.x);
        let inputs = (&*self.x, &*forward.h, &*self.dy);
        let gradients = oracle::backward(a, layer, inputs, (&self.dlora_a, &self.dlora_b));
        Reference { forward, gradients }
    }

    pub(super) fn tensors(&self, device: &Device) -> Checked<Tensors> {
        let Dims { rows, in_features, out_features } = self.dims;
        let dropout = match &self.dropout {
            None => None,
            Some(Zeros { dropout, sequences, positions }) => {
                Some((*dropout, data::integers(device, sequences)?, data::integers(device, positions)?))
            }
        };
        Ok(Tensors {
            dropout,
            x: data::tensor(device, &self.x, [rows, in_features], self.dtype)?,
            dy: data::tensor(device, &self.dy, [rows, out_features], self.dtype)?,
            weight: weight(device, &self.weight, [out_features, in_features], self.weight_dtype)?,
            bias: data::tensor(device, &self.bias, [out_features], self.weight_dtype)?,
            lora_a: data::tensor(device, &self.lora_a, [self.rank, in_features], self.adapter_dtype)?,
            lora_b: data::tensor(device, &self.lora_b, [out_features, self.rank], self.adapter_dtype)?,
        })
    }

    fn accumulators(&self, device: &Device) -> Checked<(Tensor, Tensor)> {
        let Dims { in_features, out_features, .. } = self.dims;
        let dlora_a = data::tensor(device, &self.dlora_a, [self.rank, in_features], DType::F32)?;
        Ok((dlora_a, data::tensor(device, &self.dlora_b, [out_features, self.rank], DType::F32)?))
    }

    pub(super) fn run(&self, device: &Device) -> Checked<Results> {
        let tensors = self.tensors(device)?;
        let (mut dlora_a, mut dlora_b) = self.accumulators(device)?;
        let adapter = tensors.adapter(self.scale);
        let lora_linear::Forward { y, h } =
            lora_linear::forward(&tensors.x, &tensors.weight, Some(&tensors.bias), adapter)?;
        let hidden = lora_linear::hidden(&tensors.x, &tensors.weight, adapter)?;
        let gradients = ParameterGradients { dlora_a: Some(&mut dlora_a), dlora_b: Some(&mut dlora_b) };
        match lora_linear::backward(tensors.backward(&h, self.scale), gradients)? {
            Some(dx) => Ok(Results { y, h, hidden, dx, dlora_a, dlora_b }),
            None => Err(Case::new(device, OP, "needs_dx").hazard("gives no dx where it is wanted")),
        }
    }
}

impl Tensors {
    pub(super) fn adapter(&self, scale: f32) -> Adapter<'_> {
        let rows = |(dropout, sequences, positions)| RowDropout { dropout, sequences, positions };
        let dropout =
            self.dropout.as_ref().map(|(dropout, sequences, positions)| rows((*dropout, sequences, positions)));
        Adapter { lora_a: &self.lora_a, lora_b: &self.lora_b, scale, dropout }
    }

    fn backward<'a>(&'a self, h: &'a Tensor, scale: f32) -> Backward<'a> {
        let (dy, x, weight, adapter) = (&self.dy, &self.x, &self.weight, self.adapter(scale));
        Backward { dy, x, h, weight, adapter, needs_dx: true }
    }
}

/// Budget of every result, accumulation on top of what was there, repeatability.
pub(super) fn layer(device: &Device, case: &Case, problem: &Problem) -> Checked {
    let Dims { rows, in_features, out_features } = problem.dims;
    let (dtype, rank) = (problem.dtype, problem.rank);
    let exact = problem.reference(&Exact);
    let naive = problem.reference(&Rounded(dtype));
    let terms = problem.magnitudes().reference(&Exact);
    let results = problem.run(device)?;
    let of = |pick: fn(&Reference) -> &Vec<f64>| [&exact, &naive, &terms].map(|reference| pick(reference).clone());
    check_sums(case, ("y", &results.y), (&[rows, out_features], dtype), of(|r| &r.forward.y))?;
    check_sums(case, ("h", &results.h), (&[rows, rank], DType::F32), of(|r| &r.forward.h))?;
    check_sums(case, ("dx", &results.dx), (&[rows, in_features], dtype), of(|r| &r.gradients.dx))?;
    let (a, b) = (&[rank, in_features], &[out_features, rank]);
    check_sums(case, ("dlora_a", &results.dlora_a), (a, DType::F32), of(|r| &r.gradients.dlora_a))?;
    check_sums(case, ("dlora_b", &results.dlora_b), (b, DType::F32), of(|r| &r.gradients.dlora_b))?;
    expect::same_bits(case, "h alone", &results.h, &results.hidden)?;
    let again = problem.run(device)?;
    expect::same_bits(case, "y", &results.y, &again.y)?;
    expect::same_bits(case, "h", &results.h, &again.h)?;
    expect::same_bits(case, "dx", &results.dx, &again.dx)?;
    expect::same_bits(case, "dlora_a", &results.dlora_a, &again.dlora_a)?;
    expect::same_bits(case, "dlora_b", &results.dlora_b, &again.dlora_b)
}

/// Each result is the same whether or not the others are asked for, and `dx` is absent where it is not wanted.
fn gives_only_what_is_wanted(device: &Device, case: &Case) -> Checked {
    let dims = Dims { rows: 13, in_features: 17, out_features: 11 };
    let problem = Problem::new((dims, 3), DType::F32, DType::F32, DType::F32);
    let all = problem.run(device)?;
    let tensors = problem.tensors(device)?;
    let inputs = tensors.backward(&all.h, problem.scale);

    let dx = lora_linear::backward(inputs, ParameterGradients::default())?;
    let dx = dx.ok_or_else(|| case.hazard("gives no dx where it is all that is wanted"))?;
    expect::same_bits(case, "dx alone", &dx, &all.dx)?;
    let without_dx = Backward { needs_dx: false, ..inputs };
    let (mut dlora_a, mut dlora_b) = problem.accumulators(device)?;
    let gradients = ParameterGradients { dlora_a: Some(&mut dlora_a), dlora_b: None };
    expect::holds(case, "gives dx with dlora_a", lora_linear::backward(without_dx, gradients)?.is_none())?;
    expect::same_bits(case, "dlora_a alone", &dlora_a, &all.dlora_a)?;
    let gradients = ParameterGradients { dlora_a: None, dlora_b: Some(&mut dlora_b) };
    expect::holds(case, "gives dx with dlora_b", lora_linear::backward(without_dx, gradients)?.is_none())?;
    expect::same_bits(case, "dlora_b alone", &dlora_b, &all.dlora_b)?;
    let nothing = lora_linear::backward(without_dx, ParameterGradients::default())?;
    expect::holds(case, "gives dx where nothing is wanted", nothing.is_none())
}

/// An adapter starts with `B = 0`: the layer is then the base layer, and its first gradient of `A` is zero to the last bit.
fn zero_b_is_the_base_layer(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let dims = Dims { rows: 9, in_features: 65, out_features: 33 };
        let mut problem = Problem::new((dims, 4), dtype, dtype, DType::F32);
        problem.lora_b.fill(0.0);
        layer(device, case, &problem)?;
        let (dlora_a, _) = problem.accumulators(device)?;
        expect::same_bits(case, &format!("dlora_a, {dtype}"), &problem.run(device)?.dlora_a, &dlora_a)?;
    }
    Ok(())
}

/// With small integers every sum is exact in f32, so that `y` and `dx` are the exact results rounded to their type: a base layer or
/// an update that is rounded before the other is added to it shows in the last place.
fn rounds_once(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let (dims, rank) = (Dims { rows: 9, in_features: 65, out_features: 33 }, 4);
        let mut problem = Problem::new((dims, rank), dtype, dtype, DType::F32);
        problem.scale = 1.0;
        let mut data = Data::new(32);
        let mut integers = |values: &mut Vec<f64>, bound: usize| {
            let drawn = data.integers(values.len(), 2 * bound + 1);
            *values = drawn.into_iter().map(|i| f64::from(i) - bound as f64).collect();
        };
        // Base and update of thousands, which neither half type holds to the last digit.
        integers(&mut problem.x, 31);
        integers(&mut problem.dy, 31);
        integers(&mut problem.weight, 31);
        integers(&mut problem.bias, 31);
        integers(&mut problem.lora_a, 7);
        integers(&mut problem.lora_b, 3);
        let Reference { forward, gradients } = problem.reference(&Exact);
        let results = problem.run(device)?;
        let y = data::tensor(device, &forward.y, [dims.rows, dims.out_features], dtype)?;
        expect::same_bits(case, &format!("y, {dtype}"), &results.y, &y)?;
        let dx = data::tensor(device, &gradients.dx, [dims.rows, dims.in_features], dtype)?;
        expect::same_bits(case, &format!("dx, {dtype}"), &results.dx, &dx)?;
    }
    Ok(())
}

fn rejects(device: &Device, case: &Case) -> Checked {
    let dims = Dims { rows: 2, in_features: 3, out_features: 4 };
    let problem = Problem::new((dims, 5), DType::F32, DType::F32, DType::F32);
    let tensors = problem.tensors(device)?;
    let adapter = tensors.adapter(1.0);
    let f32 = |shape: [usize; 2]| data::tensor(device, &vec![1.0; shape[0] * shape[1]], shape, DType::F32);
    let vector = |length: usize| data::tensor(device, &vec![1.0; length], [length], DType::F32);
    let integers = device.from_slice(&[0i32; 6], [2, 3], unsloth_core::Category::Activations)?;
    let wrong = f32([7, 7])?;

    let forward = |x: &Tensor, bias: Option<&Tensor>, adapter| lora_linear::forward(x, &tensors.weight, bias, adapter);
    expect::rejects(case, Rejects::Shape("x"), forward(&wrong, None, adapter))?;
    expect::rejects(case, Rejects::DType("x"), forward(&integers, None, adapter))?;
    expect::rejects(case, Rejects::Shape("bias"), forward(&tensors.x, Some(&vector(3)?), adapter))?;
    expect::rejects(case, Rejects::Shape("lora_a"), forward(&tensors.x, None, Adapter { lora_a: &wrong, ..adapter }))?;
    expect::rejects(case, Rejects::Shape("lora_b"), forward(&tensors.x, None, Adapter { lora_b: &wrong, ..adapter }))?;
    expect::rejects(case, Rejects::DType("lora_a"), {
        forward(&tensors.x, None, Adapter { lora_a: &integers, ..adapter })
    })?;
    let (lora_a, lora_b) = (&f32([0, 3])?, &f32([4, 0])?);
    expect::rejects(case, Rejects::Spec("rank"), forward(&tensors.x, None, Adapter { lora_a, lora_b, ..adapter }))?;
    if let Some(&dtype) = device.float_dtypes().iter().find(|&&dtype| dtype != DType::F32) {
        let lora_b = &data::tensor(device, &[1.0; 20], [4, 5], dtype)?;
        expect::rejects(case, Rejects::DType("lora_b"), forward(&tensors.x, None, Adapter { lora_b, ..adapter }))?;
    }

    let h = lora_linear::forward(&tensors.x, &tensors.weight, None, adapter)?.h;
    let inputs = tensors.backward(&h, 1.0);
    let backward = |inputs| lora_linear::backward(inputs, ParameterGradients::default());
    expect::rejects(case, Rejects::Shape("dy"), backward(Backward { dy: &wrong, ..inputs }))?;
    expect::rejects(case, Rejects::Shape("h"), backward(Backward { h: &wrong, ..inputs }))?;
    let into = |mut dlora_a: Option<Tensor>, mut dlora_b: Option<Tensor>| {
        let gradients = ParameterGradients { dlora_a: dlora_a.as_mut(), dlora_b: dlora_b.as_mut() };
        lora_linear::backward(inputs, gradients)
    };
    expect::rejects(case, Rejects::Shape("dlora_a"), into(Some(f32([3, 5])?), None))?;
    expect::rejects(case, Rejects::Shape("dlora_b"), into(None, Some(f32([5, 4])?)))?;
    let (shared_a, shared_b) = problem.accumulators(device)?;
    expect::rejects(case, Rejects::Shared("dlora_a"), into(Some(shared_a.clone()), None))?;
    expect::rejects(case, Rejects::Shared("dlora_b"), into(None, Some(shared_b.clone())))
}
