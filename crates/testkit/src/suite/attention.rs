//! What [`unsloth_core::ops::attention`] has to show on a device.

mod cached;
mod rejects;

use unsloth_core::{
    Category, DType, Device, Sequences, Tensor,
    ops::attention::{self as op, Options, Window},
};

use crate::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect,
    oracle::attention::{self as oracle, Problem},
    report::{self, Case, Checked},
};

const OP: &str = "attention";

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(OP, device, check(device));
}

/// Runs the part of the suite that goes over shapes, masks and scales, in one storage type.
///
/// # Panics
/// If the device fails it.
pub fn run_shapes(device: &Device, dtype: DType) {
    report::finish(OP, device, check_shapes(device, dtype));
}

/// Runs the suite but for what [`run_shapes`] runs in each type.
///
/// # Panics
/// If the device fails it.
pub fn run_without_shapes(device: &Device) {
    report::finish(OP, device, check_without_shapes(device));
}

/// Runs the part of the suite that tensor cores may run.
///
/// # Panics
/// If the device fails it.
pub fn run_on_tensor_cores(device: &Device) {
    report::finish(OP, device, check_on_tensor_cores(device));
}

/// The part of the suite that tensor cores may run: half-precision types, and heads of a multiple of 32 channels, also where many
/// rows make several blocks.
///
/// # Errors
/// The first failure.
pub fn check_on_tensor_cores(device: &Device) -> Checked {
    for dtype in device.float_dtypes().into_iter().filter(|&dtype| dtype != DType::F32) {
        for problem in problems() {
            let head_dim = problem.head_dim.next_multiple_of(64).min(128);
            attend(device, Values::new(Problem { head_dim, ..problem }, dtype, 1.0))?;
        }
        for head_dim in [32, 96, 128] {
            attend(device, Values::new(problem((4, 2, head_dim), (&[150, 3], &[200, 70])), dtype, 1.0))?;
        }
        attend(device, Values::new(problem((2, 1, 64), (&[65], &[65])), dtype, 9.0))?;
    }
    cached::on_tensor_cores(device)
}

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    for dtype in device.float_dtypes() {
        check_shapes(device, dtype)?;
    }
    check_without_shapes(device)
}

fn check_shapes(device: &Device, dtype: DType) -> Checked {
    for problem in problems() {
        attend(device, Values::new(problem, dtype, 1.0))?;
    }
    // Scores far beyond 88, where exp leaves f32.
    attend(device, Values::new(problem((2, 1, 16), (&[65], &[65])), dtype, 9.0))
}

fn check_without_shapes(device: &Device) -> Checked {
    attend(device, Values::new(problem((2, 1, 64), (&[300], &[300])), DType::F32, 1.0))?;
    cached::check(device)?;
    for (name, hazard) in HAZARDS {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

type Hazard = fn(&Device, &Case) -> Checked;

const HAZARDS: [(&str, Hazard); 9] = [
    ("large_values", large_values),
    ("masked_rows_are_exact", masked_rows_are_exact),
    ("sequences_do_not_leak", sequences_do_not_leak),
    ("cached_does_not_read_beyond_lens", cached::does_not_read_beyond_lens),
    ("kv_append_writes_its_rows", cached::append_writes_its_rows),
    ("holds_no_matrix_of_scores", holds_no_matrix_of_scores),
    ("rejects_inputs", rejects::inputs),
    ("rejects_gradients", rejects::gradients),
    ("rejects_caches", rejects::caches),
];

/// Causal attention of `(num_heads, num_kv_heads, head_dim)` over sequences of these lengths.
fn problem((num_heads, num_kv_heads, head_dim): (usize, usize, usize), lens: (&[usize], &[usize])) -> Problem {
    let (lens_q, lens_k) = (lens.0.to_vec(), lens.1.to_vec());
    Problem { num_heads, num_kv_heads, head_dim, options: Options::causal(head_dim), lens_q, lens_k }
}

/// Shapes by head size, grouping and lengths, then masks and softcap, then combinations.
fn problems() -> Vec<Problem> {
    let same = |heads, lens: &[usize]| problem(heads, (lens, lens));
    let with =
        |problem: Problem, change: fn(Options) -> Options| Problem { options: change(problem.options), ..problem };
    let all_keys = |o| Options { causal: false, ..o };
    let mut all = vec![
        same((1, 1, 1), &[1]),
        same((2, 1, 8), &[0]),
        same((2, 2, 8), &[]),
        same((3, 3, 1), &[7]),
        same((4, 4, 16), &[63, 1, 64, 65]),
        problem((3, 1, 40), (&[7], &[13])),
        problem((6, 2, 64), (&[13], &[7])),
        same((8, 1, 80), &[5, 3]),
        same((2, 2, 128), &[33]),
        same((2, 1, 256), &[9]),
        same((3, 1, 24), &[131]),
        // More than two tiles of any backend in either direction.
        same((2, 1, 16), &[127, 1, 128, 257]),
        // Empty queries, empty keys, both.
        problem((2, 1, 16), (&[3, 0, 4, 0, 2], &[3, 5, 0, 0, 2])),
        with(same((4, 2, 24), &[17, 0, 5]), all_keys),
        with(problem((2, 1, 8), (&[70], &[67])), all_keys),
        with(problem((2, 1, 8), (&[3], &[131])), all_keys),
        with(same((2, 1, 16), &[20, 9]), |o| Options { scale: 0.0, ..o }),
        with(same((2, 1, 16), &[20, 9]), |o| Options { scale: -0.3, ..o }),
        with(same((2, 1, 16), &[33]), |o| Options { softcap: Some(2.0), ..o }),
    ];
    let lefts = [0, 1, 16, 1000, usize::MAX].map(|left| Window::Sliding { left });
    for causal in [true, false] {
        let windowed =
            |problem: Problem, window| Problem { options: Options { window, causal, ..problem.options }, ..problem };
        all.extend(lefts.map(|window| windowed(same((2, 1, 8), &[70, 5]), window)));
        // Queries beyond the window of all keys; keys before it.
        all.push(windowed(problem((2, 1, 8), (&[20], &[5])), Window::Sliding { left: 3 }));
        all.push(windowed(problem((2, 1, 8), (&[5], &[140])), Window::Sliding { left: 16 }));
        let combined = problem((6, 2, 40), (&[33, 0, 9, 1, 66], &[65, 4, 3, 0, 66]));
        let softcap = Problem { options: Options { softcap: Some(3.0), ..combined.options }, ..combined };
        all.push(windowed(softcap, Window::Sliding { left: 16 }));
    }
    all
}

/// Values of one attention, and the type they are stored in.
struct Values {
    problem: Problem,
    dtype: DType,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    dout: Vec<f64>,
}

/// Tensors of [`Values`].
struct Tensors {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    seq_q: Sequences,
    seq_k: Sequences,
}

/// What a device computed.
struct Results {
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
}

impl Values {
    /// `size` is the standard deviation of `q` and `k`.
    fn new(problem: Problem, dtype: DType, size: f64) -> Self {
        let mut data = Data::new(61);
        let elements_q = problem.tokens_q() * problem.num_heads * problem.head_dim;
        let elements_k = problem.tokens_k() * problem.num_kv_heads * problem.head_dim;
        Self {
            q: data.normal(elements_q, size, dtype),
            k: data.normal(elements_k, size, dtype),
            v: data.normal(elements_k, 1.0, dtype),
            dout: data.normal(elements_q, 0.5, dtype),
            problem,
            dtype,
        }
    }

    fn case(&self, device: &Device) -> Case {
        Case::new(device, OP, format!("{}, {:?}", self.dtype, self.problem))
    }

    fn inputs(&self) -> oracle::Inputs<'_> {
        oracle::Inputs { q: &self.q, k: &self.k, v: &self.v }
    }

    fn shape_q(&self) -> [usize; 3] {
        [self.problem.tokens_q(), self.problem.num_heads, self.problem.head_dim]
    }

    fn shape_k(&self) -> [usize; 3] {
        [self.problem.tokens_k(), self.problem.num_kv_heads, self.problem.head_dim]
    }

    fn tensors(&self, device: &Device) -> Checked<Tensors> {
        Ok(Tensors {
            q: data::tensor(device, &self.q, self.shape_q(), self.dtype)?,
            k: data::tensor(device, &self.k, self.shape_k(), self.dtype)?,
            v: data::tensor(device, &self.v, self.shape_k(), self.dtype)?,
            dout: data::tensor(device, &self.dout, self.shape_q(), self.dtype)?,
            seq_q: Sequences::from_lengths(device, &self.problem.lens_q)?,
            seq_k: Sequences::from_lengths(device, &self.problem.lens_k)?,
        })
    }

    fn run(&self, device: &Device) -> Checked<Results> {
        self.tensors(device)?.run(self.problem.options)
    }
}

impl Tensors {
    fn inputs(&self) -> op::Inputs<'_> {
        op::Inputs { q: &self.q, k: &self.k, v: &self.v, seq_q: &self.seq_q, seq_k: &self.seq_k }
    }

    fn run(&self, options: Options) -> Checked<Results> {
        let op::Forward { out, lse } = op::forward(self.inputs(), options)?;
        let backward = op::Backward { dout: &self.dout, out: &out, lse: &lse };
        let op::Gradients { dq, dk, dv } = op::backward(self.inputs(), backward, options)?;
        Ok(Results { out, lse, dq, dk, dv })
    }
}

/// Forward and backward: budget and repeatability.
fn attend(device: &Device, values: Values) -> Checked {
    let case = values.case(device);
    let check = || -> Checked {
        let results = values.run(device)?;
        budget(&case, &values, &results)?;
        let again = values.run(device)?;
        expect::same_bits(&case, "out", &results.out, &again.out)?;
        expect::same_bits(&case, "lse", &results.lse, &again.lse)?;
        expect::same_bits(&case, "dq", &results.dq, &again.dq)?;
        expect::same_bits(&case, "dk", &results.dk, &again.dk)?;
        expect::same_bits(&case, "dv", &results.dv, &again.dv)
    };
    check().map_err(|failure| failure.within(&case))
}

fn budget(case: &Case, values: &Values, results: &Results) -> Checked {
    let Values { problem, dtype, .. } = values;
    let naive = Rounded(*dtype);
    let (x, dout) = (values.inputs(), &*values.dout);
    let (exact, rounded) = (oracle::forward(&Exact, problem, x), oracle::forward(&naive, problem, x));
    let terms = oracle::magnitudes(problem, x, dout, &exact);
    // An error of the largest score is a relative error of its exponential.
    let of_exp = 1.0 + terms.score / Floor::F32_STEPS;
    let check = |name: &str, tensor: &Tensor, (exact, naive): (&[f64], &[f64]), floor| {
        check_tensor(case, name, tensor, Expected { exact, naive, floor })
    };
    let floor = |magnitude: f64| Floor::Cancelling { dtype: *dtype, magnitude: magnitude * of_exp };
    expect::form(case, "out", &results.out, (&values.shape_q(), *dtype))?;
    expect::form(case, "lse", &results.lse, (&[problem.num_heads, problem.tokens_q()], DType::F32))?;
    check("out", &results.out, (&exact.out, &rounded.out), floor(terms.out))?;
    // ln of a sum of up to `tokens_k` exponentials, on top of the largest score.
    let magnitude = terms.score + (1.0 + problem.tokens_k() as f64).ln();
    let lse_floor = Floor::Cancelling { dtype: DType::F32, magnitude };
    check("lse", &results.lse, (&exact.lse, &rounded.lse), lse_floor)?;

    let exact = oracle::backward(&Exact, problem, x, dout, &exact);
    let rounded = oracle::backward(&naive, problem, x, dout, &rounded);
    expect::form(case, "dq", &results.dq, (&values.shape_q(), *dtype))?;
    expect::form(case, "dk", &results.dk, (&values.shape_k(), *dtype))?;
    expect::form(case, "dv", &results.dv, (&values.shape_k(), *dtype))?;
    check("dq", &results.dq, (&exact.dq, &rounded.dq), floor(terms.dq))?;
    check("dk", &results.dk, (&exact.dk, &rounded.dk), floor(terms.dk))?;
    check("dv", &results.dv, (&exact.dv, &rounded.dv), floor(terms.dv))
}

/// Values of 10000 stay within f16 where a sum of them would not.
fn large_values(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let mut values = Values::new(problem((2, 1, 16), (&[40], &[40])), dtype, 1.0);
        let mut data = Data::new(63);
        values.v = data.normal(values.v.len(), 1e4, dtype);
        values.dout = data.normal(values.dout.len(), 1e-3, dtype);
        budget(case, &values, &values.run(device)?)?;
    }
    Ok(())
}

/// A fully masked row has `out` 0, `lse` -inf and gradients 0, not merely something close.
fn masked_rows_are_exact(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        // The first two of five queries stand before the three keys; the second sequence has no keys.
        let values = Values::new(problem((2, 1, 8), (&[5, 2], &[3, 0])), dtype, 1.0);
        let results = values.run(device)?;
        let (out, dq, lse) = (data::read(&results.out)?, data::read(&results.dq)?, data::read(&results.lse)?);
        for token in [0, 1, 5, 6] {
            let row = token * 16..(token + 1) * 16;
            let zero = out[row.clone()].iter().chain(&dq[row]).all(|&value| value == 0.0);
            expect::holds(case, &format!("out and dq of masked token {token} are 0, {dtype}"), zero)?;
            let empty = [0, 1].iter().all(|head| lse[head * 7 + token] == f64::NEG_INFINITY);
            expect::holds(case, &format!("lse of masked token {token} is -inf, {dtype}"), empty)?;
        }
        // Keys that nobody sees: all queries stand before them.
        let window = Options { window: Window::Sliding { left: 0 }, ..Options::causal(8) };
        let unseen = Problem { options: window, ..problem((2, 1, 8), (&[1], &[4])) };
        let results = Values::new(unseen, dtype, 1.0).run(device)?;
        for (name, gradient) in [("dk", &results.dk), ("dv", &results.dv)] {
            let zero = data::read(gradient)?[..24].iter().all(|&value| value == 0.0);
            expect::holds(case, &format!("{name} of unseen keys is 0, {dtype}"), zero)?;
        }
    }
    Ok(())
}

/// The results of a sequence keep their bits whatever its neighbours in the pack hold.
fn sequences_do_not_leak(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let (lens, row_q, row_k) = ([33, 20, 9], 4 * 16, 2 * 16);
        let values = Values::new(problem((4, 2, 16), (&lens, &lens)), dtype, 1.0);
        let mut changed = Values::new(problem((4, 2, 16), (&lens, &lens)), dtype, 1.0);
        changed.q[33 * row_q..53 * row_q].fill(30.0);
        changed.dout[33 * row_q..53 * row_q].fill(-30.0);
        changed.k[33 * row_k..53 * row_k].fill(30.0);
        changed.v[33 * row_k..53 * row_k].fill(-900.0);
        let (a, b) = (values.run(device)?, changed.run(device)?);
        let others = |tensor: &Tensor, row: usize| -> Checked<Tensor> {
            let mut all = data::read(tensor)?;
            all.drain(33 * row..53 * row);
            let length = all.len();
            Ok(data::tensor(device, &all, [length], dtype)?)
        };
        let pairs = [
            ("out", &a.out, &b.out, row_q),
            ("dq", &a.dq, &b.dq, row_q),
            ("dk", &a.dk, &b.dk, row_k),
            ("dv", &a.dv, &b.dv, row_k),
        ];
        for (name, a, b, row) in pairs {
            expect::same_bits(case, &format!("{name}, {dtype}"), &others(a, row)?, &others(b, row)?)?;
        }
    }
    Ok(())
}

/// The memory taken for a long sequence stays far below one matrix of scores. Nothing else may allocate on the device
/// meanwhile.
fn holds_no_matrix_of_scores(device: &Device, case: &Case) -> Checked {
    let tokens = 2048;
    let rows = |device: &Device| device.zeros([tokens, 1, 8], DType::F32, Category::Activations);
    let tensors = Tensors {
        q: rows(device)?,
        k: rows(device)?,
        v: rows(device)?,
        dout: rows(device)?,
        seq_q: Sequences::from_lengths(device, &[tokens])?,
        seq_k: Sequences::from_lengths(device, &[tokens])?,
    };
    device.backend().reset_peak();
    let before = device.usage().total_live_bytes();
    tensors.run(Options::causal(8))?;
    let taken = device.usage().total_peak_bytes() - before;
    let matrix = (tokens * tokens * 4) as u64;
    expect::holds(case, &format!("{taken} bytes taken where all scores are {matrix}"), taken < matrix / 4)
}
