//! What [`unsloth_core::ops::linear_cross_entropy`] has to show on a device.

use unsloth_core::{
    Category, DType, Device, Error, Tensor,
    ops::{
        cross_entropy::{IGNORE_INDEX, LossSpec},
        linear_cross_entropy as op,
    },
};

use super::{
    cross_entropy::{all_together, bad_specs, loss_magnitudes, specs, targets},
    linear::{dtype_pairs, largest, magnitudes, weight},
};
use crate::{
    arith::{Arith, Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::{
        cross_entropy as row_oracle,
        linear::{self as linear_oracle, Dims},
        linear_cross_entropy as oracle,
    },
    report::{self, Case, Checked},
};

const OP: &str = "linear_cross_entropy";

/// `(tokens, hidden_size, vocab_size)`: none, one, primes, one off a power of two, odd tails, and a hidden size and a
/// vocabulary longer than a block of the matrix that a device may work in.
const SHAPES: [(usize, usize, usize); 8] =
    [(0, 5, 7), (1, 1, 1), (3, 4, 1), (5, 3, 7), (63, 65, 64), (13, 17, 1031), (3, 4099, 5), (7, 3, 4099)];

/// More logits than a device may hold at a time.
const LONG: (usize, usize, usize) = (197, 3, 65_537);

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
    for dtypes in dtype_pairs(device) {
        for shape @ (tokens, _, vocab_size) in SHAPES {
            for targets in targets(tokens, vocab_size) {
                loss(device, Problem::new(shape, dtypes, (all_together(tokens), targets)))?;
            }
        }
    }
    for dtype in device.float_dtypes() {
        let shape @ (tokens, _, vocab_size) = (31, 33, 97);
        for spec in specs(tokens) {
            for targets in targets(tokens, vocab_size) {
                loss(device, Problem::new(shape, (dtype, dtype), (spec, targets)))?;
            }
        }
    }
    let [_, with_ignored, _] = targets(LONG.0, LONG.2);
    loss(device, Problem::new(LONG, (DType::F32, DType::F32), (LossSpec::mean(LONG.0), with_ignored)))?;
    for (name, hazard) in HAZARDS {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

/// Runs the part of the suite that tensor cores may run.
///
/// # Panics
/// If the device fails it.
pub fn run_on_tensor_cores(device: &Device) {
    report::finish(OP, device, check_on_tensor_cores(device));
}

/// The part of the suite that tensor cores may run: bf16 with every type that they multiply it with, in sizes of whole chunks.
///
/// # Errors
/// The first failure.
pub fn check_on_tensor_cores(device: &Device) -> Checked {
    let shape @ (tokens, _, vocab_size) = (72, 64, 136);
    for dtypes in [(DType::BF16, DType::BF16), (DType::BF16, DType::F32), (DType::F32, DType::BF16)] {
        let [_, with_ignored, _] = targets(tokens, vocab_size);
        loss(device, Problem::new(shape, dtypes, (all_together(tokens), with_ignored)))?;
    }
    Ok(())
}

type Hazard = fn(&Device, &Case) -> Checked;

const HAZARDS: [(&str, Hazard); 6] = [
    ("gives_only_what_is_wanted", gives_only_what_is_wanted),
    ("nothing_to_learn", nothing_to_learn),
    ("large_logits", large_logits),
    ("holds_no_matrix_of_logits", holds_no_matrix_of_logits),
    ("rejects_targets_outside_the_vocabulary", rejects_targets),
    ("rejects_operands", rejects_operands),
];

/// Values of one loss, and the types they are stored in.
struct Problem {
    dims: Dims,
    dtype: DType,
    weight_dtype: DType,
    spec: LossSpec,
    targets: Vec<i32>,
    x: Vec<f64>,
    weight: Vec<f64>,
    dweight: Vec<f64>,
}

impl Problem {
    fn new(
        (rows, in_features, out_features): (usize, usize, usize),
        (dtype, weight_dtype): (DType, DType),
        (spec, targets): (LossSpec, Vec<i32>),
    ) -> Self {
        let mut data = Data::new(51);
        let x = data.normal(rows * in_features, 1.0, dtype);
        let weight = data.normal(out_features * in_features, 2.0 / (in_features as f64).sqrt(), weight_dtype);
        let dweight = data.normal(out_features * in_features, 0.1, DType::F32);
        let dims = Dims { rows, in_features, out_features };
        Self { dims, dtype, weight_dtype, spec, targets, x, weight, dweight }
    }

    fn case(&self, device: &Device) -> Case {
        let Dims { rows, in_features, out_features } = self.dims;
        let with_target = self.targets.iter().filter(|&&target| target != IGNORE_INDEX).count();
        let shape = format!("{rows} tokens, {in_features} -> {out_features}, {with_target} targets");
        let detail = format!("{shape}, {}, weight {}, {:?}", self.dtype, self.weight_dtype, self.spec);
        Case::new(device, OP, detail)
    }

    fn reference(&self, a: &impl Arith) -> oracle::Forward {
        oracle::forward(a, (&self.spec, self.dims), (&self.x, &self.weight, &self.targets), &self.dweight)
    }

    fn run(&self, device: &Device, needs_dx: bool, dweight: Option<&mut Tensor>) -> Checked<op::Forward> {
        let Dims { rows, in_features, out_features } = self.dims;
        let x = data::tensor(device, &self.x, [rows, in_features], self.dtype)?;
        let weight = weight(device, &self.weight, [out_features, in_features], self.weight_dtype)?;
        let targets = data::integers(device, &self.targets)?;
        Ok(op::forward(&x, &weight, &targets, self.spec, needs_dx, dweight)?)
    }

    fn accumulator(&self, device: &Device) -> Checked<Tensor> {
        let shape = [self.dims.out_features, self.dims.in_features];
        Ok(data::tensor(device, &self.dweight, shape, DType::F32)?)
    }

    /// Floors of loss, `dx` and `dweight`, from the magnitudes of the terms that they are sums of.
    fn floors(&self) -> [Floor; 3] {
        let (dims, exact) = (self.dims, &Exact);
        let (abs_x, abs_weight) = (magnitudes(&self.x), magnitudes(&self.weight));
        let logits = linear_oracle::forward(exact, dims, &self.x, &self.weight, None);
        let lse = row_oracle::forward(exact, &self.spec, &logits, &self.targets).lse;
        let dlogits = row_oracle::backward(exact, &self.spec, &logits, &self.targets, &lse);
        let largest_logit = largest(&linear_oracle::forward(exact, dims, &abs_x, &abs_weight, None));
        let terms = loss_magnitudes(&self.spec, largest_logit, &lse);
        // Softmax and target may cancel in an element of dlogits: its error is that of the terms, not of the difference.
        let dlogits = magnitudes(&dlogits);
        let dx = largest(&linear_oracle::input_gradient(exact, dims, &dlogits, &abs_weight));
        let dweight = linear_oracle::weight_gradient(exact, dims, &dlogits, &abs_x, &magnitudes(&self.dweight));
        let dx = dx + terms.dlogits * largest(&self.weight);
        let dweight = largest(&dweight) + terms.dlogits * largest(&self.x);
        [
            Floor::Cancelling { dtype: DType::F32, magnitude: terms.loss },
            Floor::Cancelling { dtype: self.dtype, magnitude: dx },
            Floor::Cancelling { dtype: DType::F32, magnitude: dweight },
        ]
    }
}

/// Loss and both gradients: budget, accumulation on top of what was there, repeatability.
fn loss(device: &Device, problem: Problem) -> Checked {
    let case = problem.case(device);
    let check = || -> Checked {
        let Dims { rows, in_features, out_features } = problem.dims;
        let exact = problem.reference(&Exact);
        let naive = problem.reference(&Rounded(problem.dtype));
        let [loss_floor, dx_floor, dweight_floor] = problem.floors();
        let run = || -> Checked<(Tensor, Tensor, Tensor)> {
            let mut dweight = problem.accumulator(device)?;
            let op::Forward { loss, dx } = problem.run(device, true, Some(&mut dweight))?;
            Ok((loss, dx.ok_or_else(|| case.hazard("gives no dx where it is wanted"))?, dweight))
        };
        let (loss, dx, dweight) = run()?;
        expect::form(&case, "loss", &loss, (&[1], DType::F32))?;
        expect::form(&case, "dx", &dx, (&[rows, in_features], problem.dtype))?;
        expect::form(&case, "dweight", &dweight, (&[out_features, in_features], DType::F32))?;
        let (exact_loss, naive_loss) = ([exact.loss], [naive.loss]);
        let expected = Expected { exact: &exact_loss, naive: &naive_loss, floor: loss_floor };
        check_tensor(&case, "loss", &loss, expected)?;
        let expected = Expected { exact: &exact.dx, naive: &naive.dx, floor: dx_floor };
        check_tensor(&case, "dx", &dx, expected)?;
        let expected = Expected { exact: &exact.dweight, naive: &naive.dweight, floor: dweight_floor };
        check_tensor(&case, "dweight", &dweight, expected)?;
        let again = run()?;
        expect::same_bits(&case, "loss", &loss, &again.0)?;
        expect::same_bits(&case, "dx", &dx, &again.1)?;
        expect::same_bits(&case, "dweight", &dweight, &again.2)
    };
    check().map_err(|failure| failure.within(&case))
}

fn small(dtype: DType) -> Problem {
    let [_, targets, _] = targets(13, 31);
    Problem::new((13, 17, 31), (dtype, dtype), (all_together(13), targets))
}

/// Each result is the same whether or not the others are asked for, and `dx` is absent where it is not wanted.
fn gives_only_what_is_wanted(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let problem = small(dtype);
        let mut dweight = problem.accumulator(device)?;
        let all = problem.run(device, true, Some(&mut dweight))?;
        let all_dx = all.dx.ok_or_else(|| case.hazard("gives no dx where it is wanted"))?;
        let frozen = problem.run(device, true, None)?;
        let dx = frozen.dx.ok_or_else(|| case.hazard("gives no dx where it is all that is wanted"))?;
        expect::same_bits(case, "dx alone", &dx, &all_dx)?;
        expect::same_bits(case, "loss with dx", &frozen.loss, &all.loss)?;
        let mut dweight_alone = problem.accumulator(device)?;
        let head_only = problem.run(device, false, Some(&mut dweight_alone))?;
        expect::holds(case, "gives dx with dweight", head_only.dx.is_none())?;
        expect::same_bits(case, "dweight alone", &dweight_alone, &dweight)?;
        let evaluation = problem.run(device, false, None)?;
        expect::holds(case, "gives dx where no gradient is wanted", evaluation.dx.is_none())?;
        expect::same_bits(case, "loss alone", &evaluation.loss, &all.loss)?;
    }
    Ok(())
}

/// Without targets loss and `dx` are 0, and `dweight` keeps its bits.
fn nothing_to_learn(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let problem = Problem { targets: vec![IGNORE_INDEX; 13], ..small(dtype) };
        let mut dweight = problem.accumulator(device)?;
        let op::Forward { loss, dx } = problem.run(device, true, Some(&mut dweight))?;
        let dx = dx.ok_or_else(|| case.hazard("gives no dx where it is wanted"))?;
        let zero = |tensor: &Tensor| -> Checked<bool> { Ok(data::read(tensor)?.iter().all(|&value| value == 0.0)) };
        expect::holds(case, "the loss is 0", zero(&loss)?)?;
        expect::holds(case, "dx is 0", zero(&dx)?)?;
        expect::same_bits(case, "dweight", &dweight, &problem.accumulator(device)?)?;
    }
    Ok(())
}

/// Logits whose exponentials are beyond f32 (and, as products, beyond f16): `x = 300`, `W = (300, -300, 0)`, target 1. The
/// loss is 2 * 90000, softmax is (1, 0, 0), `dx = 1 * 300 - 1 * -300`.
fn large_logits(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let size = crate::arith::round(dtype, 300.0);
        let x = data::tensor(device, &[size], [1, 1], dtype)?;
        let weight = weight(device, &[size, -size, 0.0], [3, 1], dtype)?;
        let mut dweight = device.zeros([3, 1], DType::F32, Category::Gradients)?;
        let targets = data::integers(device, &[1])?;
        let results = op::forward(&x, &weight, &targets, LossSpec::mean(1), true, Some(&mut dweight))?;
        let dx = results.dx.ok_or_else(|| case.hazard("gives no dx where it is wanted"))?;
        let exactly = |name: &str, tensor: &Tensor, values: &[f64]| {
            check_tensor(case, name, tensor, Expected { exact: values, naive: values, floor: Floor::Exact })
        };
        exactly("loss", &results.loss, &[2.0 * size * size])?;
        exactly("dx", &dx, &[2.0 * size])?;
        exactly("dweight", &dweight, &[size, -size, 0.0])?;
    }
    Ok(())
}

/// The memory taken for a long batch stays far below one matrix of logits, and the batch is the sum of its parts. Nothing else may
/// allocate on the device meanwhile.
///
/// With a matrix of zeros softmax is 1 in `V` everywhere: the loss is `ln V`, `dx` is 0, and `dweight` of a class is the sum of all `x`
/// divided by `V`, less the `x` of the tokens that have it for a target.
fn holds_no_matrix_of_logits(device: &Device, case: &Case) -> Checked {
    let vocab_size = 65_537;
    // So many that a quarter of their logits is 128 rows more than the longest chunk.
    let tokens = 4 * (chunk_rows(device, vocab_size) + 128);
    let target = |token: usize| 7 * token;
    // Few enough are not 0 for a sum over them to be nearly exact in any order: among them the ends of every chunk.
    let is_counted = |token: usize| token.is_multiple_of(16) || token % 128 == 127;
    let value = |token: usize| if is_counted(token) { (1 + token % 13) as f64 } else { 0.0 };
    let values: Vec<f64> = (0..tokens).map(value).collect();
    let x = data::tensor(device, &values, [tokens, 1], DType::F32)?;
    let weight = device.prepare_weight(device.zeros([vocab_size, 1], DType::F32, Category::Weights)?)?;
    let mut dweight = device.zeros([vocab_size, 1], DType::F32, Category::Gradients)?;
    let targets: Vec<i32> = (0..tokens).map(|token| target(token) as i32).collect();
    let targets = data::integers(device, &targets)?;
    device.backend().reset_peak();
    let before = device.usage().total_live_bytes();
    let results = op::forward(&x, &weight, &targets, LossSpec::mean(tokens), true, Some(&mut dweight))?;
    let taken = device.usage().total_peak_bytes() - before;
    let matrix = (tokens * vocab_size * 4) as u64;
    expect::holds(case, &format!("{taken} bytes taken where all logits are {matrix}"), taken < matrix / 4)?;

    let near = |name: &str, tensor: &Tensor, exact: &[f64], magnitude: f64| {
        let floor = Floor::Cancelling { dtype: DType::F32, magnitude };
        check_tensor(case, name, tensor, Expected { exact, naive: exact, floor })
    };
    near("loss", &results.loss, &[(vocab_size as f64).ln()], (vocab_size as f64).ln())?;
    let dx = results.dx.ok_or_else(|| case.hazard("gives no dx where it is wanted"))?;
    expect::holds(case, "dx is 0", data::read(&dx)?.iter().all(|&value| value == 0.0))?;
    let mut sums = vec![values.iter().sum::<f64>() / vocab_size as f64; vocab_size];
    (0..tokens).for_each(|token| sums[target(token)] -= values[token]);
    let exact: Vec<f64> = sums.iter().map(|sum| sum / tokens as f64).collect();
    near("dweight", &dweight, &exact, largest(&exact))
}

/// Rows that a device may work on at a time: the CPU 256 of a vocabulary of this size, another so many times 128 as take 64 MiB or, of much
/// memory, a part in 128 up to 512 MiB.
fn chunk_rows(device: &Device, vocab_size: usize) -> usize {
    if device.name() == "cpu" {
        return 256;
    }
    let (least, most) = (64 << 20, 512 << 20);
    let bytes = device.memory_bytes().map_or(least, |bytes| (bytes / 128).clamp(least, most));
    bytes as usize / (4 * vocab_size) / 128 * 128
}

/// Where the host can see the targets the call is refused; elsewhere a wrong target is never used as an index.
fn rejects_targets(device: &Device, case: &Case) -> Checked {
    let weight = weight(device, &[0.5; 15], [5, 3], DType::F32)?;
    let x = data::tensor(device, &[1.0; 6], [2, 3], DType::F32)?;
    for bad in [-1, 5, -99, -101, i32::MAX, i32::MIN] {
        let targets = data::integers(device, &[2, bad])?;
        match op::forward(&x, &weight, &targets, LossSpec::mean(2), true, None) {
            Err(error) => {
                let typed = matches!(error, Error::InvalidSpec { field: "targets", .. });
                expect::holds(case, &format!("{bad} is refused as a field `targets`, got \"{error}\""), typed)?;
            }
            Ok(results) => {
                let finite = data::read(&results.loss)?[0].is_finite();
                expect::holds(case, &format!("{bad} was used"), device.name() != "cpu" && finite)?;
            }
        }
    }
    Ok(())
}

fn rejects_operands(device: &Device, case: &Case) -> Checked {
    let f32 = |shape: [usize; 2]| device.zeros(shape, DType::F32, Category::Activations);
    let (x, matrix) = (f32([2, 3])?, device.prepare_weight(f32([5, 3])?)?);
    let (targets, three) = (data::integers(device, &[0, 1])?, data::integers(device, &[0, 1, 2])?);
    let spec = LossSpec::mean(2);
    for (field, bad) in bad_specs() {
        expect::rejects(case, Rejects::Spec(field), op::forward(&x, &matrix, &targets, bad, true, None))?;
    }
    let forward = |x: &Tensor, targets: &Tensor| op::forward(x, &matrix, targets, spec, true, None);
    expect::rejects(case, Rejects::Shape("x"), forward(&f32([2, 4])?, &targets))?;
    expect::rejects(case, Rejects::DType("x"), forward(&targets, &targets))?;
    expect::rejects(case, Rejects::Shape("targets"), forward(&x, &three))?;
    expect::rejects(case, Rejects::DType("targets"), forward(&x, &data::tensor(device, &[0.0; 2], [2], DType::F32)?))?;
    let empty = device.prepare_weight(f32([0, 3])?)?;
    expect::rejects(case, Rejects::Spec("vocab_size"), op::forward(&x, &empty, &targets, spec, true, None))?;
    let into = |mut dweight: Tensor| op::forward(&x, &matrix, &targets, spec, false, Some(&mut dweight));
    expect::rejects(case, Rejects::Shape("dweight"), into(f32([3, 5])?))?;
    let shared = f32([5, 3])?;
    expect::rejects(case, Rejects::Shared("dweight"), into(shared.clone()))?;
    if let Some(&dtype) = device.float_dtypes().iter().find(|&&dtype| dtype != DType::F32) {
        let half = device.zeros([5, 3], dtype, Category::Gradients)?;
        expect::rejects(case, Rejects::DType("dweight"), into(half))?;
    }
    Ok(())
}
