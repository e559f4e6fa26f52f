//! Attention over cached keys, and appending to the cache.

use unsloth_core::{
    DType, Device, KvView, Lengths, Sequences, Tensor,
    ops::attention::{self as op, Options, Window},
};

use super::{OP, Tensors, Values, problem};
use crate::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect,
    oracle::attention::{self as oracle, Problem},
    report::{Case, Checked},
};

/// Every dtype with every cached problem.
pub(super) fn check(device: &Device) -> Checked {
    for dtype in device.float_dtypes() {
        for problem in problems() {
            let case = Case::new(device, OP, format!("cached, {dtype}, {problem:?}"));
            cached(device, &case, (problem, dtype)).map_err(|failure| failure.within(&case))?;
        }
    }
    Ok(())
}

/// [`check`] of half-precision types, with heads that tensor cores take.
pub(super) fn on_tensor_cores(device: &Device) -> Checked {
    for dtype in device.float_dtypes().into_iter().filter(|&dtype| dtype != DType::F32) {
        let more = problem((4, 2, 64), (&[70, 5, 0, 90], &[130, 5, 7, 40]));
        for problem in problems().into_iter().chain([more]) {
            let case = Case::new(device, OP, format!("cached, {dtype}, {problem:?}"));
            let problem = Problem { head_dim: 64, ..problem };
            cached(device, &case, (problem, dtype)).map_err(|failure| failure.within(&case))?;
        }
    }
    // Devices with tensor cores have planes of a known size, by which single tokens go over long caches.
    for dtype in device.float_dtypes() {
        for problem in single_tokens() {
            let case = Case::new(device, OP, format!("cached, {dtype}, {problem:?}"));
            cached(device, &case, (problem, dtype)).map_err(|failure| failure.within(&case))?;
        }
    }
    Ok(())
}

/// Generation: one query per sequence, a prompt, both at once, and the options.
fn problems() -> Vec<Problem> {
    let decode = problem((4, 2, 16), (&[1, 1, 1, 1], &[5, 1, 67, 130]));
    let prompts = problem((2, 1, 40), (&[5, 0, 3, 1, 9], &[5, 0, 70, 2, 9]));
    let nothing_cached = problem((2, 1, 8), (&[1, 2], &[0, 1]));
    let mut all = vec![decode, prompts, nothing_cached, problem((2, 2, 8), (&[], &[]))];
    let options = Options { window: Window::Sliding { left: 16 }, softcap: Some(3.0), ..Options::causal(16) };
    all.push(Problem { options, ..problem((2, 1, 16), (&[1, 4, 1], &[65, 4, 3])) });
    all.push(Problem { options: Options { causal: false, ..options }, ..problem((2, 1, 16), (&[2], &[33])) });
    all.extend(single_tokens());
    all
}

/// Long caches, whose keys a device may share out: lengths around a multiple of the shares, one without keys, groups of one head and of
/// many, long heads, and a window that leaves out the first keys.
fn single_tokens() -> Vec<Problem> {
    let options = Options { window: Window::Sliding { left: 149 }, softcap: Some(3.0), ..Options::causal(40) };
    let windowed = Problem { options, ..problem((6, 2, 40), (&[1, 0, 1], &[205, 3, 70])) };
    vec![
        problem((4, 2, 16), (&[1, 1, 1, 1], &[300, 0, 129, 128])),
        problem((11, 1, 7), (&[1], &[193])),
        problem((7, 1, 256), (&[1], &[130])),
        problem((2, 2, 16), (&[1], &[193])),
        windowed,
    ]
}

/// The rows of packed sequences in a cache of this capacity, NaN where no row is.
fn to_cache(rows: &[f64], lens: &[usize], (capacity, row): (usize, usize)) -> Vec<f64> {
    let mut cache = vec![f64::NAN; lens.len() * capacity * row];
    let mut start = 0;
    for (s, len) in lens.iter().enumerate() {
        let to = s * capacity * row;
        cache[to..to + len * row].copy_from_slice(&rows[start * row..(start + len) * row]);
        start += len;
    }
    cache
}

fn run_cached(device: &Device, values: &Values, cache: (&[f64], &[f64]), capacity: usize) -> Checked<Tensor> {
    let problem = &values.problem;
    let shape = [problem.lens_k.len(), capacity, problem.num_kv_heads, problem.head_dim];
    let k = data::tensor(device, cache.0, shape, values.dtype)?;
    let v = data::tensor(device, cache.1, shape, values.dtype)?;
    let Tensors { q, seq_q, .. } = values.tensors(device)?;
    let lens = Lengths::new(device, &problem.lens_k)?;
    Ok(op::cached(&q, &seq_q, KvView { k: &k, v: &v, lens: &lens }, problem.options)?)
}

/// `cached` is attention over the first `lens[s]` rows of each sequence's cache.
fn cached(device: &Device, case: &Case, (problem, dtype): (Problem, DType)) -> Checked {
    let values = Values::new(problem, dtype, 1.0);
    let problem = &values.problem;
    let capacity = 3 + problem.lens_k.iter().copied().max().unwrap_or(0).max(130);
    let row = problem.num_kv_heads * problem.head_dim;
    let k = to_cache(&values.k, &problem.lens_k, (capacity, row));
    let v = to_cache(&values.v, &problem.lens_k, (capacity, row));
    let out = run_cached(device, &values, (&k, &v), capacity)?;
    expect::form(case, "out", &out, (&values.shape_q(), dtype))?;
    let exact = oracle::forward(&Exact, problem, values.inputs());
    let naive = oracle::forward(&Rounded(dtype), problem, values.inputs()).out;
    let terms = oracle::magnitudes(problem, values.inputs(), &values.dout, &exact);
    let magnitude = terms.out * (1.0 + terms.score / Floor::F32_STEPS);
    let floor = Floor::Cancelling { dtype, magnitude };
    check_tensor(case, "out", &out, Expected { exact: &exact.out, naive: &naive, floor })?;
    expect::same_bits(case, "out", &out, &run_cached(device, &values, (&k, &v), capacity)?)
}

/// The same bits whatever lies in the cache beyond a sequence's keys.
pub(super) fn does_not_read_beyond_lens(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let values = Values::new(problem((4, 2, 16), (&[1, 3, 1], &[5, 33, 0])), dtype, 1.0);
        let lens = &values.problem.lens_k;
        let k = to_cache(&values.k, lens, (64, 32));
        let v = to_cache(&values.v, lens, (64, 32));
        let filled = |cache: &[f64]| cache.iter().map(|&c| if c.is_nan() { 900.0 } else { c }).collect::<Vec<_>>();
        let out = run_cached(device, &values, (&k, &v), 64)?;
        let other = run_cached(device, &values, (&filled(&k), &filled(&v)), 64)?;
        expect::same_bits(case, &format!("out, {dtype}"), &out, &other)?;
    }
    Ok(())
}

/// Rows appear where they belong and every other element of the cache keeps its bits.
pub(super) fn append_writes_its_rows(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let (capacity, kv_heads, head_dim) = (7, 2, 3);
        let (row, lens, starts) = (kv_heads * head_dim, [3, 0, 1, 7], [2, 5, 6, 0]);
        let mut data = Data::new(62);
        let tokens = lens.iter().sum::<usize>();
        let rows = data.normal(tokens * row, 1.0, dtype);
        let mut expected = data.normal(lens.len() * capacity * row, 1.0, dtype);
        let shape = [lens.len(), capacity, kv_heads, head_dim];
        let mut cache = data::tensor(device, &expected, shape, dtype)?;
        let seqs = Sequences::from_lengths(device, &lens)?;
        let rows_tensor = data::tensor(device, &rows, [tokens, kv_heads, head_dim], dtype)?;
        op::kv_append(&mut cache, &rows_tensor, &seqs, &Lengths::new(device, &starts)?)?;
        let mut from = rows.chunks(row);
        for (s, (&len, &start)) in lens.iter().zip(&starts).enumerate() {
            for (to, from) in (start..start + len).zip(&mut from) {
                let at = (s * capacity + to) * row;
                expected[at..at + row].copy_from_slice(from);
            }
        }
        let expected = Expected { exact: &expected, naive: &expected, floor: Floor::Exact };
        check_tensor(case, &format!("cache, {dtype}"), &cache, expected)?;
    }
    Ok(())
}
