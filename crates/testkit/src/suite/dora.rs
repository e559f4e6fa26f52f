//! What [`unsloth_core::ops::dora`] has to show on a device.

use unsloth_core::{
    Category, DType, Device,
    ops::{
        dora::{self, Lengths},
        elementwise,
    },
};

use super::AWKWARD_ROWS;
use crate::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::dora as oracle,
    report::{self, Case, Checked},
};

const OP: &str = "dora";

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
        for (rows, width) in AWKWARD_ROWS {
            let case = Case::new(device, OP, format!("[{rows}, {width}], {dtype}"));
            check_scaling(device, &case, (rows, width, dtype)).map_err(|failure| failure.within(&case))?;
            for rank in [1, 5] {
                let case = Case::new(device, OP, format!("norms of [{width}, {rows}], rank {rank}, {dtype}"));
                check_norms(device, &case, ([width, rows.max(1)], rank, dtype))
                    .map_err(|failure| failure.within(&case))?;
            }
        }
    }
    let case = Case::new(device, OP, "rejects_operands");
    rejects_operands(device, &case).map_err(|failure| failure.within(&case))
}

fn check_norms(
    device: &Device,
    case: &Case,
    ([out_features, in_features], rank, dtype): ([usize; 2], usize, DType),
) -> Checked {
    let mut data = Data::new(93);
    let weight = data.normal(out_features * in_features, 1.0, dtype);
    let lora_a = data.normal(rank * in_features, 1.0, DType::F32);
    let lora_b = data.normal(out_features * rank, 1.0, DType::F32);
    let scale = 0.75;
    let matrix = oracle::Adapted { weight: &weight, lora_a: &lora_a, lora_b: &lora_b, in_features, scale };
    let (exact, naive) = (oracle::norms(&Exact, matrix), oracle::norms(&Rounded(DType::F32), matrix));
    let dense = data::tensor(device, &weight, [out_features, in_features], dtype)?;
    let dense = device.prepare_weight(dense)?;
    let a = data::tensor(device, &lora_a, [rank, in_features], DType::F32)?;
    let b = data::tensor(device, &lora_b, [out_features, rank], DType::F32)?;
    let norms = dora::norms(&dense, &a, &b, scale as f32)?;
    expect::form(case, "norms", &norms, (&[out_features], DType::F32))?;
    let floor = Floor::Stored(DType::F32);
    check_tensor(case, "norms", &norms, Expected { exact: &exact, naive: &naive, floor })?;
    expect::same_bits(case, "norms, deterministic", &norms, &dora::norms(&dense, &a, &b, scale as f32)?)
}

fn check_scaling(device: &Device, case: &Case, (rows, width, dtype): (usize, usize, DType)) -> Checked {
    let mut data = Data::new(92);
    let (t, dy) = (data.normal(rows * width, 1.0, dtype), data.normal(rows * width, 1.0, dtype));
    let (magnitude, bias) = (data.normal(width, 2.0, DType::F32), data.normal(width, 1.0, dtype));
    let norms = data.uniform(width, 0.5..3.0, DType::F32);
    let start = data.normal(width, 1.0, DType::F32);
    let floats = |values: &[f64]| data::tensor(device, values, [width], DType::F32);
    let (m, n, b) = (floats(&magnitude)?, floats(&norms)?, data::tensor(device, &bias, [width], dtype)?);
    let lengths = Lengths { magnitude: &m, norms: &n };
    let (to_t, to_dy) =
        (data::tensor(device, &t, [rows, width], dtype)?, data::tensor(device, &dy, [rows, width], dtype)?);
    let (factors, naive_in) = ((&magnitude[..], &norms[..]), Rounded(dtype));

    for (bias, value) in [(Some(&b), &bias), (None, &vec![0.0; width])] {
        let y = dora::forward(&to_t, lengths, bias)?;
        expect::form(case, "y", &y, (&[rows, width], dtype))?;
        let (exact, naive) =
            (oracle::forward(&Exact, &t, factors, value), oracle::forward(&naive_in, &t, factors, value));
        check_tensor(case, "y", &y, Expected { exact: &exact, naive: &naive, floor: Floor::Stored(dtype) })?;
    }

    let exact = oracle::backward(&Exact, &dy, &t, factors);
    let naive = oracle::backward(&naive_in, &dy, &t, factors);
    // The gradient is added to what is there.
    let added = |gradient: &[f64]| gradient.iter().zip(&start).map(|(g, s)| g + s).collect::<Vec<f64>>();
    let mut dmagnitude = floats(&start)?;
    let dt = dora::backward(to_dy.clone(), &to_t, lengths, Some(&mut dmagnitude))?;
    let floor = Floor::Stored(dtype);
    check_tensor(case, "dt", &dt, Expected { exact: &exact.dt, naive: &naive.dt, floor })?;
    let (exact, naive) = (added(&exact.dmagnitude), added(&naive.dmagnitude));
    let size = |j: usize| -> f64 {
        let products = (j..dy.len()).step_by(width).map(|i| (dy[i] * t[i]).abs());
        products.sum::<f64>() / norms[j] + start[j].abs()
    };
    let magnitude = (0..width).map(size).fold(0.0, f64::max);
    let floor = Floor::Cancelling { dtype: DType::F32, magnitude };
    check_tensor(case, "dmagnitude", &dmagnitude, Expected { exact: &exact, naive: &naive, floor })?;

    // The same bits over a buffer of its own, and without the parameter's gradient; a shared input is left alone.
    expect::same_bits(case, "the shared dy", &to_dy, &data::tensor(device, &dy, [rows, width], dtype)?)?;
    let again = dora::backward(elementwise::copy(&to_dy)?, &to_t, lengths, None)?;
    expect::same_bits(case, "dt", &dt, &again)
}

fn rejects_operands(device: &Device, case: &Case) -> Checked {
    let zeros = |shape: &[usize]| match *shape {
        [length] => device.zeros([length], DType::F32, Category::Activations),
        _ => device.zeros([shape[0], shape[1]], DType::F32, Category::Activations),
    };
    let weight = device.prepare_weight(zeros(&[3, 4])?)?;
    expect::rejects(case, Rejects::Shape("lora_a"), dora::norms(&weight, &zeros(&[2, 3])?, &zeros(&[3, 2])?, 1.0))?;
    expect::rejects(case, Rejects::Shape("lora_b"), dora::norms(&weight, &zeros(&[2, 4])?, &zeros(&[2, 3])?, 1.0))?;
    expect::rejects(case, Rejects::Spec("rank"), dora::norms(&weight, &zeros(&[0, 4])?, &zeros(&[3, 0])?, 1.0))?;
    let (t, three, four) = (zeros(&[2, 3])?, zeros(&[3])?, zeros(&[4])?);
    let wrong = Lengths { magnitude: &four, norms: &three };
    expect::rejects(case, Rejects::Shape("magnitude"), dora::forward(&t, wrong, None))?;
    let wrong = Lengths { magnitude: &three, norms: &four };
    expect::rejects(case, Rejects::Shape("norms"), dora::forward(&t, wrong, None))?;
    let lengths = Lengths { magnitude: &three, norms: &three };
    expect::rejects(case, Rejects::Shape("bias"), dora::forward(&t, lengths, Some(&four)))?;
    expect::rejects(case, Rejects::Shape("dy"), dora::backward(zeros(&[3, 2])?, &t, lengths, None))?;
    let mut wrong = zeros(&[4])?;
    expect::rejects(case, Rejects::Shape("dmagnitude"), dora::backward(zeros(&[2, 3])?, &t, lengths, Some(&mut wrong)))
}
