//! What [`unsloth_core::ops::cross_entropy`] has to show on a device.

use unsloth_core::{
    Category, DType, Device, Error, Tensor,
    ops::{
        cross_entropy::{self, IGNORE_INDEX, LossSpec},
        elementwise,
    },
};

use super::linear::largest;
use crate::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::cross_entropy as oracle,
    report::{self, Case, Checked},
};

const OP: &str = "cross_entropy";

/// `(tokens, vocab_size)`: none, one, primes, one off a power of two, odd tails.
const SHAPES: [(usize, usize); 7] = [(0, 7), (1, 1), (5, 1), (3, 7), (63, 65), (13, 1031), (2, 4099)];

/// More logits than a device may work on at a time.
const LONG: (usize, usize) = (1031, 1031);

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
    for dtype in device.float_dtypes() {
        for (tokens, vocab_size) in SHAPES {
            for spec in specs(tokens) {
                for targets in targets(tokens, vocab_size) {
                    losses(device, Problem::new((tokens, vocab_size), dtype, (spec, targets), 3.0))?;
                }
            }
        }
        let [_, with_ignored, _] = targets(LONG.0, LONG.1);
        losses(device, Problem::new(LONG, dtype, (LossSpec::mean(LONG.0), with_ignored), 3.0))?;
        // Exponentials beyond f32, scores near the end of f16, one class with all of the probability.
        for size in [80.0, 15_000.0] {
            let [all, ..] = targets(7, 65);
            losses(device, Problem::new((7, 65), dtype, (LossSpec::mean(7), all), size))?;
        }
    }
    for (name, hazard) in HAZARDS {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

type Hazard = fn(&Device, &Case) -> Checked;

const HAZARDS: [(&str, Hazard); 6] = [
    ("large_bf16_inputs", large_bf16_inputs),
    ("logits_far_below_zero", far_below_zero),
    ("nan_reaches_the_loss", nan_reaches_the_loss),
    ("ignored_rows_are_not_read", ignored_rows_are_not_read),
    ("rejects_targets_outside_the_vocabulary", rejects_targets),
    ("rejects_operands", rejects_operands),
];

/// Each part of the loss alone, and all of them together.
pub(super) fn specs(tokens: usize) -> [LossSpec; 8] {
    let plain = LossSpec::mean(tokens.max(1));
    [
        plain,
        LossSpec { num_targets: 10 * tokens + 3, ..plain },
        LossSpec { loss_scale: 1024.0, ..plain },
        LossSpec { logit_scale: 0.0625, ..plain },
        LossSpec { softcap: Some(5.0), ..plain },
        LossSpec { label_smoothing: 0.1, ..plain },
        LossSpec { z_loss: 0.01, ..plain },
        all_together(tokens),
    ]
}

/// Every part of the loss at once.
pub(super) fn all_together(tokens: usize) -> LossSpec {
    LossSpec {
        num_targets: tokens + 5,
        loss_scale: 128.0,
        logit_scale: 1.5,
        softcap: Some(7.0),
        label_smoothing: 0.1,
        z_loss: 0.001,
    }
}

/// A target for each row, for two of three rows, and for none.
pub(super) fn targets(tokens: usize, vocab_size: usize) -> [Vec<i32>; 3] {
    let all = Data::new(41).integers(tokens, vocab_size);
    let some = all.iter().enumerate().map(|(i, &target)| if i % 3 == 1 { IGNORE_INDEX } else { target }).collect();
    [all, some, vec![IGNORE_INDEX; tokens]]
}

struct Problem {
    tokens: usize,
    vocab_size: usize,
    dtype: DType,
    spec: LossSpec,
    targets: Vec<i32>,
    logits: Vec<f64>,
    size: f64,
}

impl Problem {
    /// `size` is the standard deviation of the logits.
    fn new(
        (tokens, vocab_size): (usize, usize),
        dtype: DType,
        (spec, targets): (LossSpec, Vec<i32>),
        size: f64,
    ) -> Self {
        let logits = Data::new(42).normal(tokens * vocab_size, size, dtype);
        Self { tokens, vocab_size, dtype, spec, targets, logits, size }
    }

    fn case(&self, device: &Device) -> Case {
        let Self { tokens, vocab_size, dtype, size, .. } = self;
        let with_target = self.targets.iter().filter(|&&target| target != IGNORE_INDEX).count();
        let detail =
            format!("[{tokens}, {vocab_size}] {dtype}, {with_target} targets, logits of {size}, {:?}", self.spec);
        Case::new(device, OP, detail)
    }
}

/// What the rounding errors of a loss are measured against.
pub(super) struct Magnitudes {
    /// Largest `z`.
    pub(super) z: f64,
    /// Terms of the loss.
    pub(super) loss: f64,
    /// Terms of an element of `dlogits`, of which softmax and the wanted distribution cancel. An error of the largest score
    /// is a relative error of its exponential.
    pub(super) dlogits: f64,
}

/// `largest_logit` is the magnitude of a logit before scale and softcap.
pub(super) fn loss_magnitudes(spec: &LossSpec, largest_logit: f64, lse: &[f64]) -> Magnitudes {
    let z = f64::from(spec.logit_scale) * largest_logit;
    let (z_loss, largest_lse) = (f64::from(spec.z_loss), largest(lse));
    let row = |lse: &f64| if *lse == 0.0 { 0.0 } else { lse.abs() + 2.0 * z + z_loss * lse * lse };
    let loss = lse.iter().map(row).sum::<f64>() / spec.num_targets as f64;
    let per_target = f64::from(spec.loss_scale) / spec.num_targets as f64;
    let of_exp = (1.0 + z / Floor::F32_STEPS) * (1.0 + 2.0 * z_loss * largest_lse);
    Magnitudes { z, loss, dlogits: per_target * f64::from(spec.logit_scale) * (1.0 + of_exp) }
}

/// Loss, LSE and gradient: budget, repeatability, the same bits in place.
fn losses(device: &Device, problem: Problem) -> Checked {
    let case = problem.case(device);
    let check = || -> Checked {
        let logits = data::tensor(device, &problem.logits, [problem.tokens, problem.vocab_size], problem.dtype)?;
        let forward = budget(device, &case, &problem, &logits)?;
        in_place(device, &case, &problem, (logits, &forward))
    };
    check().map_err(|failure| failure.within(&case))
}

fn budget(device: &Device, case: &Case, problem: &Problem, logits: &Tensor) -> Checked<cross_entropy::Forward> {
    let Problem { dtype, spec, .. } = *problem;
    let targets = data::integers(device, &problem.targets)?;
    let naive = Rounded(dtype);
    let exact = oracle::forward(&Exact, &spec, &problem.logits, &problem.targets);
    let rounded = oracle::forward(&naive, &spec, &problem.logits, &problem.targets);
    let terms = loss_magnitudes(&spec, largest(&problem.logits), &exact.lse);
    let forward = cross_entropy::forward(logits, &targets, spec)?;
    expect::form(case, "loss", &forward.loss, (&[1], DType::F32))?;
    expect::form(case, "lse", &forward.lse, (&[problem.tokens], DType::F32))?;
    let floor = |dtype, magnitude| Floor::Cancelling { dtype, magnitude };
    let (exact_loss, naive_loss) = ([exact.loss], [rounded.loss]);
    let expected = Expected { exact: &exact_loss, naive: &naive_loss, floor: floor(DType::F32, terms.loss) };
    check_tensor(case, "loss", &forward.loss, expected)?;
    let lse_floor = floor(DType::F32, largest(&exact.lse) + terms.z);
    let expected = Expected { exact: &exact.lse, naive: &rounded.lse, floor: lse_floor };
    check_tensor(case, "lse", &forward.lse, expected)?;

    let dlogits = cross_entropy::backward(logits.clone(), &targets, &forward.lse, spec)?;
    expect::form(case, "dlogits", &dlogits, (logits.shape(), dtype))?;
    let exact = oracle::backward(&Exact, &spec, &problem.logits, &problem.targets, &exact.lse);
    let rounded = oracle::backward(&naive, &spec, &problem.logits, &problem.targets, &rounded.lse);
    let expected = Expected { exact: &exact, naive: &rounded, floor: floor(dtype, terms.dlogits) };
    check_tensor(case, "dlogits", &dlogits, expected)?;
    let values = data::read(&dlogits)?;
    let mut rows = values.chunks(problem.vocab_size).zip(&problem.targets);
    let untouched = rows.all(|(row, &target)| target != IGNORE_INDEX || row.iter().all(|&value| value == 0.0));
    expect::holds(case, "a row without a target has a gradient that is not 0", untouched)?;

    let again = cross_entropy::forward(logits, &targets, spec)?;
    expect::same_bits(case, "loss", &forward.loss, &again.loss)?;
    expect::same_bits(case, "lse", &forward.lse, &again.lse)?;
    Ok(forward)
}

/// The gradient has the same bits whether or not the logits' buffer can be reused; logits that others hold are left alone.
fn in_place(
    device: &Device,
    case: &Case,
    problem: &Problem,
    (logits, forward): (Tensor, &cross_entropy::Forward),
) -> Checked {
    let targets = data::integers(device, &problem.targets)?;
    let before = elementwise::copy(&logits)?;
    let shared = cross_entropy::backward(logits.clone(), &targets, &forward.lse, problem.spec)?;
    expect::same_bits(case, "shared logits", &logits, &before)?;
    let unique = cross_entropy::backward(logits, &targets, &forward.lse, problem.spec)?;
    expect::same_bits(case, "dlogits in place", &unique, &shared)
}

/// Logits beyond the range of f16, and sums that a bf16 accumulator would lose.
fn large_bf16_inputs(device: &Device, case: &Case) -> Checked {
    let dtype = super::wide_dtype(device);
    let huge = [1e30, -1e30, 0.0];
    let targets = data::integers(device, &[1])?;
    let logits = data::tensor(device, &huge, [1, 3], dtype)?;
    let forward = cross_entropy::forward(&logits, &targets, LossSpec::mean(1))?;
    let top = crate::arith::round(dtype, 1e30);
    let floor = Floor::Stored(DType::F32);
    check_tensor(case, "loss", &forward.loss, Expected { exact: &[2.0 * top], naive: &[2.0 * top], floor })?;
    // softmax is (1, 0, 0), the target is class 1.
    let dlogits = cross_entropy::backward(logits, &targets, &forward.lse, LossSpec::mean(1))?;
    let exact = [1.0, -1.0, 0.0];
    check_tensor(case, "dlogits", &dlogits, Expected { exact: &exact, naive: &exact, floor: Floor::Exact })?;

    // 1031 equal logits: lse = ln 1031; 1031 rows of two equal logits: the sum of losses is 1031 ln 2.
    let equal = data::tensor(device, &[0.0; 1031], [1, 1031], dtype)?;
    let lse = cross_entropy::forward(&equal, &targets, LossSpec::mean(1))?.lse;
    let exact = [1031f64.ln()];
    check_tensor(case, "lse of equal logits", &lse, Expected { exact: &exact, naive: &exact, floor })?;
    let pairs = data::tensor(device, &[0.0; 2062], [1031, 2], dtype)?;
    let targets = data::integers(device, &[1; 1031])?;
    let loss = cross_entropy::forward(&pairs, &targets, LossSpec::mean(1))?.loss;
    let exact = [1031.0 * 2f64.ln()];
    check_tensor(case, "sum of losses", &loss, Expected { exact: &exact, naive: &exact, floor })
}

/// Exponentials of what stands between a maximum and zero, or the first maximum of a long row and its last, overflow.
fn far_below_zero(device: &Device, case: &Case) -> Checked {
    let targets = data::integers(device, &[1030])?;
    for dtype in device.float_dtypes() {
        for (first, last) in [(-200.0, -200.0), (-1000.0, 0.0), (0.0, -1000.0), (f64::NEG_INFINITY, -200.0)] {
            let row: Vec<f64> = (0..1031).map(|i| if i < 1024 { first } else { last }).collect();
            let logits = data::tensor(device, &row, [1, 1031], dtype)?;
            let forward = cross_entropy::forward(&logits, &targets, LossSpec::mean(1))?;
            let top = first.max(last);
            let lse = [top + row.iter().map(|logit| (logit - top).exp()).sum::<f64>().ln()];
            let (loss, floor) = ([lse[0] - last], Floor::Cancelling { dtype: DType::F32, magnitude: 1000.0 });
            check_tensor(case, "lse", &forward.lse, Expected { exact: &lse, naive: &lse, floor })?;
            check_tensor(case, "loss", &forward.loss, Expected { exact: &loss, naive: &loss, floor })?;
        }
    }
    Ok(())
}

/// A model that has broken down shows in its loss: a maximum or an exponential may drop a NaN.
fn nan_reaches_the_loss(device: &Device, case: &Case) -> Checked {
    let targets = data::integers(device, &[3, 7])?;
    for dtype in device.float_dtypes() {
        // In the first vector of a row, in its tail, and at the target.
        for place in [0, 64, 65 + 64, 3] {
            let mut values = Data::new(44).normal(2 * 65, 3.0, dtype);
            values[place] = f64::NAN;
            let logits = data::tensor(device, &values, [2, 65], dtype)?;
            let loss = data::read(&cross_entropy::forward(&logits, &targets, LossSpec::mean(2))?.loss)?[0];
            expect::holds(case, &format!("a NaN at {place} gives a loss of {loss}, {dtype}"), loss.is_nan())?;
        }
    }
    Ok(())
}

/// Rows without a target may hold anything, NaN included.
fn ignored_rows_are_not_read(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let (tokens, vocab_size) = (7, 65);
        let [_, targets, _] = targets(tokens, vocab_size);
        let mut values = Data::new(43).normal(tokens * vocab_size, 3.0, dtype);
        let results = |values: &[f64]| -> Checked<[Tensor; 3]> {
            let logits = data::tensor(device, values, [tokens, vocab_size], dtype)?;
            let (targets, spec) = (data::integers(device, &targets)?, all_together(tokens));
            let cross_entropy::Forward { loss, lse } = cross_entropy::forward(&logits, &targets, spec)?;
            let dlogits = cross_entropy::backward(logits, &targets, &lse, spec)?;
            Ok([loss, lse, dlogits])
        };
        let clean = results(&values)?;
        for (row, _) in values.chunks_mut(vocab_size).zip(&targets).filter(|(_, target)| **target == IGNORE_INDEX) {
            row.fill(f64::NAN);
        }
        for (name, (clean, filled)) in ["loss", "lse", "dlogits"].iter().zip(clean.iter().zip(&results(&values)?)) {
            expect::same_bits(case, &format!("{name}, {dtype}"), clean, filled)?;
        }
    }
    Ok(())
}

/// Where the host can see the targets the call is refused; elsewhere a wrong target is never used as an index.
fn rejects_targets(device: &Device, case: &Case) -> Checked {
    let refused = |what: &str, result: unsloth_core::Result<Tensor>| match result {
        Err(error) => {
            let typed = matches!(error, Error::InvalidSpec { field: "targets", .. });
            expect::holds(case, &format!("{what} is refused as a field `targets`, got \"{error}\""), typed)
        }
        Ok(tensor) => {
            let finite = data::read(&tensor)?.iter().all(|value| value.is_finite());
            expect::holds(case, &format!("{what} was used"), device.name() != "cpu" && finite)
        }
    };
    for bad in [-1, 5, -99, -101, i32::MAX, i32::MIN] {
        let targets = data::integers(device, &[2, bad])?;
        let logits = device.zeros([2, 5], DType::F32, Category::Activations)?;
        let lse = device.zeros([2], DType::F32, Category::Activations)?;
        let spec = LossSpec::mean(2);
        let loss = cross_entropy::forward(&logits, &targets, spec).map(|forward| forward.loss);
        refused(&format!("target {bad} of forward"), loss)?;
        refused(&format!("target {bad} of backward"), cross_entropy::backward(logits, &targets, &lse, spec))?;
    }
    Ok(())
}

/// Fields of the loss out of their range.
pub(super) fn bad_specs() -> Vec<(&'static str, LossSpec)> {
    let good = LossSpec::mean(2);
    let mut all = vec![("num_targets", LossSpec { num_targets: 0, ..good })];
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        all.push(("loss_scale", LossSpec { loss_scale: bad, ..good }));
        all.push(("logit_scale", LossSpec { logit_scale: bad, ..good }));
        all.push(("softcap", LossSpec { softcap: Some(bad), ..good }));
    }
    for bad in [-0.1, 1.0, f32::NAN] {
        all.push(("label_smoothing", LossSpec { label_smoothing: bad, ..good }));
    }
    for bad in [-0.1, f32::INFINITY, f32::NAN] {
        all.push(("z_loss", LossSpec { z_loss: bad, ..good }));
    }
    all
}

fn rejects_operands(device: &Device, case: &Case) -> Checked {
    let f32 = |shape: [usize; 2]| device.zeros(shape, DType::F32, Category::Activations);
    let vector = |length: usize| device.zeros([length], DType::F32, Category::Activations);
    let (logits, lse, spec) = (f32([2, 5])?, vector(2)?, LossSpec::mean(2));
    let (targets, three) = (data::integers(device, &[0, 1])?, data::integers(device, &[0, 1, 2])?);
    for (field, bad) in bad_specs() {
        expect::rejects(case, Rejects::Spec(field), cross_entropy::forward(&logits, &targets, bad))?;
        let backward = cross_entropy::backward(logits.clone(), &targets, &lse, bad);
        expect::rejects(case, Rejects::Spec(field), backward)?;
    }
    let forward = |logits: &Tensor, targets: &Tensor| cross_entropy::forward(logits, targets, spec);
    expect::rejects(case, Rejects::Shape("logits"), forward(&vector(5)?, &targets))?;
    expect::rejects(case, Rejects::DType("logits"), forward(&targets, &targets))?;
    expect::rejects(case, Rejects::Spec("vocab_size"), forward(&f32([2, 0])?, &targets))?;
    expect::rejects(case, Rejects::Shape("targets"), forward(&logits, &three))?;
    expect::rejects(case, Rejects::DType("targets"), forward(&logits, &lse))?;
    let backward = |lse: &Tensor| cross_entropy::backward(logits.clone(), &targets, lse, spec);
    expect::rejects(case, Rejects::Shape("lse"), backward(&vector(3)?))?;
    expect::rejects(case, Rejects::DType("lse"), backward(&targets))
}
