//! What [`unsloth_core::ops::embedding`] has to show on a device.

use unsloth_core::{Category, DType, Device, Error, Tensor, ops::embedding};

use super::mixed_dtypes;
use crate::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle,
    report::{self, Case, Checked},
};

const OP: &str = "embedding";

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
    let mut pairs = mixed_dtypes(device);
    if device.supports(DType::BF16) {
        // A table kept in less than the activations.
        pairs.push((DType::F32, DType::BF16));
    }
    for (dtype, weight_dtype) in pairs {
        for (tokens, vocab_size, hidden_size) in
            [(0, 5, 8), (1, 1, 1), (3, 7, 63), (65, 11, 65), (130, 97, 64), (1500, 300, 5)]
        {
            let detail = format!("tokens {tokens}, table {weight_dtype} [{vocab_size}, {hidden_size}], {dtype}");
            let case = Case::new(device, OP, detail);
            let mut data = Data::new(31);
            let ids = data.integers(tokens, vocab_size);
            let shape = Lookup { vocab_size, hidden_size, dtype, weight_dtype };
            forward(device, &case, &shape, &ids).map_err(|failure| failure.within(&case))?;
            backward(device, &case, &shape, &ids).map_err(|failure| failure.within(&case))?;
        }
    }
    for (name, hazard) in HAZARDS {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

type Hazard = fn(&Device, &Case) -> Checked;

const HAZARDS: [(&str, Hazard); 5] = [
    ("large_bf16_inputs", large_bf16_inputs),
    ("one_id_for_all_tokens", one_id_for_all_tokens),
    ("rejects_ids_outside_the_table", rejects_ids_outside_the_table),
    ("rejects_operands", rejects_operands),
    ("rejects_shared", rejects_shared),
];

struct Lookup {
    vocab_size: usize,
    hidden_size: usize,
    dtype: DType,
    weight_dtype: DType,
}

fn forward(device: &Device, case: &Case, lookup: &Lookup, ids: &[i32]) -> Checked {
    let &Lookup { vocab_size, hidden_size, dtype, weight_dtype } = lookup;
    let table = Data::new(32).normal(vocab_size * hidden_size, 1.0, weight_dtype);
    let weight = device.prepare_weight(data::tensor(device, &table, [vocab_size, hidden_size], weight_dtype)?)?;
    let id_tensor = data::integers(device, ids)?;
    let out = embedding::forward(&weight, &id_tensor, dtype)?;
    expect::form(case, "out", &out, (&[ids.len(), hidden_size], dtype))?;
    let exact = oracle::embedding::forward(&Exact, &table, ids, hidden_size);
    let naive = oracle::embedding::forward(&Rounded(dtype), &table, ids, hidden_size);
    check_tensor(case, "out", &out, Expected { exact: &exact, naive: &naive, floor: Floor::Exact })?;
    expect::same_bits(case, "out, deterministic", &out, &embedding::forward(&weight, &id_tensor, dtype)?)
}

/// Two backward passes into a buffer that is not zero: the second adds to the first.
fn backward(device: &Device, case: &Case, lookup: &Lookup, ids: &[i32]) -> Checked {
    let &Lookup { vocab_size, hidden_size, dtype, .. } = lookup;
    let mut data = Data::new(33);
    let dout = data.normal(ids.len() * hidden_size, 1.0, dtype);
    let start = data.normal(vocab_size * hidden_size, 1.0, DType::F32);
    let dout_tensor = data::tensor(device, &dout, [ids.len(), hidden_size], dtype)?;
    let id_tensor = data::integers(device, ids)?;
    let passes = || -> Checked<Tensor> {
        let mut dweight = data::tensor(device, &start, [vocab_size, hidden_size], DType::F32)?;
        embedding::backward(&id_tensor, &dout_tensor, &mut dweight)?;
        embedding::backward(&id_tensor, &dout_tensor, &mut dweight)?;
        Ok(dweight)
    };
    let dweight = passes()?;
    let (exact, naive) = (twice(&Exact, &start, ids, &dout), twice(&Rounded(dtype), &start, ids, &dout));
    let mut magnitudes: Vec<f64> = start.iter().map(|v| v.abs()).collect();
    let sizes: Vec<f64> = dout.iter().map(|v| v.abs()).collect();
    magnitudes = twice(&Exact, &magnitudes, ids, &sizes);
    let magnitude = magnitudes.into_iter().fold(0.0, f64::max);
    let floor = Floor::Cancelling { dtype: DType::F32, magnitude };
    check_tensor(case, "dweight", &dweight, Expected { exact: &exact, naive: &naive, floor })?;
    expect::same_bits(case, "dweight, deterministic", &dweight, &passes()?)
}

fn twice<A: crate::arith::Arith>(arith: &A, start: &[f64], ids: &[i32], dout: &[f64]) -> Vec<f64> {
    let hidden_size = dout.len().checked_div(ids.len()).unwrap_or(0);
    let once = oracle::embedding::backward(arith, start, ids, dout, hidden_size);
    oracle::embedding::backward(arith, &once, ids, dout, hidden_size)
}

fn large_bf16_inputs(device: &Device, case: &Case) -> Checked {
    let dtype = super::wide_dtype(device);
    let table = Data::new(34).normal(4 * 65, 1e30, dtype);
    let weight = device.prepare_weight(data::tensor(device, &table, [4, 65], dtype)?)?;
    let out = embedding::forward(&weight, &data::integers(device, &[3])?, dtype)?;
    let exact = &table[3 * 65..];
    check_tensor(case, "out", &out, Expected { exact, naive: exact, floor: Floor::Exact })
}

/// Padding: every token adds to one row, where a lost update shows and a bf16 accumulator stops at 256.
fn one_id_for_all_tokens(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let tokens = 1031;
        let ids = data::integers(device, &vec![2; tokens])?;
        let dout = data::tensor(device, &vec![1.0; tokens * 3], [tokens, 3], dtype)?;
        let mut dweight = device.zeros([4, 3], DType::F32, Category::Gradients)?;
        embedding::backward(&ids, &dout, &mut dweight)?;
        let mut exact = vec![0.0; 12];
        exact[6..9].fill(tokens as f64);
        check_tensor(case, "dweight", &dweight, Expected { exact: &exact, naive: &exact, floor: Floor::Exact })?;
    }
    Ok(())
}

/// Where the host can see the ids the call is refused; elsewhere the row is zero and nothing outside the table is touched.
fn rejects_ids_outside_the_table(device: &Device, case: &Case) -> Checked {
    let table = data::tensor(device, &[1.0; 12], [4, 3], DType::F32)?;
    let weight = device.prepare_weight(table)?;
    for bad in [-1, 4, i32::MAX, i32::MIN] {
        let ids = data::integers(device, &[0, bad])?;
        match embedding::forward(&weight, &ids, DType::F32) {
            Err(error) => {
                let typed = matches!(error, Error::InvalidSpec { field: "ids", .. });
                expect::holds(case, &format!("id {bad} is refused as a field `ids`, got \"{error}\""), typed)?;
            }
            Ok(out) => {
                let row = data::read(&out)?;
                expect::holds(case, &format!("id {bad} gives {row:?}"), row == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0])?;
            }
        }
        let dout = data::tensor(device, &[1.0; 6], [2, 3], DType::F32)?;
        let mut dweight = device.zeros([4, 3], DType::F32, Category::Gradients)?;
        if embedding::backward(&ids, &dout, &mut dweight).is_ok() {
            let sum: f64 = data::read(&dweight)?.iter().sum();
            expect::holds(case, &format!("id {bad} adds nothing, the sum is {sum}"), sum == 3.0)?;
        }
    }
    Ok(())
}

fn rejects_operands(device: &Device, case: &Case) -> Checked {
    let weight = device.prepare_weight(data::tensor(device, &[1.0; 12], [4, 3], DType::F32)?)?;
    let ids = data::integers(device, &[0, 1])?;
    let floats = |shape: [usize; 2]| device.zeros(shape, DType::F32, Category::Gradients);
    let square = data::integers(device, &[0, 1])?.reshape([2, 1])?;
    expect::rejects(case, Rejects::Shape("ids"), embedding::forward(&weight, &square, DType::F32))?;
    expect::rejects(case, Rejects::DType("dtype"), embedding::forward(&weight, &ids, DType::I32))?;
    let float_ids = data::tensor(device, &[0.0, 1.0], [2], DType::F32)?;
    expect::rejects(case, Rejects::DType("ids"), embedding::forward(&weight, &float_ids, DType::F32))?;
    let wrong_rows = embedding::backward(&ids, &floats([3, 3])?, &mut floats([4, 3])?);
    expect::rejects(case, Rejects::Shape("dout"), wrong_rows)?;
    let wrong_width = embedding::backward(&ids, &floats([2, 3])?, &mut floats([4, 5])?);
    expect::rejects(case, Rejects::Shape("dout"), wrong_width)?;
    if device.supports(DType::BF16) {
        let mut dweight = device.zeros([4, 3], DType::BF16, Category::Gradients)?;
        let refused = embedding::backward(&ids, &floats([2, 3])?, &mut dweight);
        expect::rejects(case, Rejects::DType("dweight"), refused)?;
    }
    Ok(())
}

fn rejects_shared(device: &Device, case: &Case) -> Checked {
    let ids = data::integers(device, &[0, 1])?;
    let dout = device.zeros([2, 3], DType::F32, Category::Gradients)?;
    let dweight = device.zeros([4, 3], DType::F32, Category::Gradients)?;
    expect::rejects(case, Rejects::Shared("dweight"), embedding::backward(&ids, &dout, &mut dweight.clone()))
}
