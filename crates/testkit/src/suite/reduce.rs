//! What [`unsloth_core::ops::reduce`] has to show on a device.

use unsloth_core::{Category, DType, Device, Tensor, ops::reduce};

use super::AWKWARD_LENGTHS;
use crate::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle,
    report::{self, Case, Checked},
};

const OP: &str = "reduce";

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
        for length in AWKWARD_LENGTHS.into_iter().chain([100_003]) {
            let case = Case::new(device, OP, format!("{length} elements, {dtype}"));
            sum(device, &case, (length, dtype)).map_err(|failure| failure.within(&case))?;
            grad_norm(device, &case, (length, dtype)).map_err(|failure| failure.within(&case))?;
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
    ("counts_every_element", counts_every_element),
    ("large_bf16_inputs", large_bf16_inputs),
    ("norms_of_huge_and_tiny_values", norms_of_huge_and_tiny_values),
    ("finds_what_is_not_finite", finds_what_is_not_finite),
    ("norms_of_mixed_dtypes", norms_of_mixed_dtypes),
    ("rejects_tensors", rejects_tensors),
];

fn sum(device: &Device, case: &Case, (length, dtype): (usize, DType)) -> Checked {
    let x = Data::new(21).normal(length, 1.0, dtype);
    let tensor = data::tensor(device, &x, [length], dtype)?;
    let actual = reduce::sum(&tensor)?;
    expect::form(case, "sum", &actual, (&[1], DType::F32))?;
    let exact = [oracle::reduce::sum(&Exact, &x)];
    let naive = [oracle::reduce::sum(&Rounded(dtype), &x)];
    let magnitude = x.iter().map(|x| x.abs()).sum();
    let floor = Floor::Cancelling { dtype: DType::F32, magnitude };
    check_tensor(case, "sum", &actual, Expected { exact: &exact, naive: &naive, floor })?;
    expect::same_bits(case, "sum, deterministic", &actual, &reduce::sum(&tensor)?)
}

fn grad_norm(device: &Device, case: &Case, (length, dtype): (usize, DType)) -> Checked {
    let mut data = Data::new(22);
    let values = [data.normal(length, 1e-3, dtype), data.normal(3, 1e-3, dtype), data.normal(65, 2e-3, dtype)];
    let tensors = values.iter().map(|v| data::tensor(device, v, [v.len()], dtype)).collect::<Result<Vec<_>, _>>()?;
    let list: Vec<&Tensor> = tensors.iter().collect();
    let actual = reduce::grad_norm(&list)?;
    expect::form(case, "grad_norm", &actual, (&[1], DType::F32))?;
    let exact = [oracle::reduce::grad_norm(&Exact, &values)];
    let naive = [oracle::reduce::grad_norm(&Rounded(dtype), &values)];
    let expected = Expected { exact: &exact, naive: &naive, floor: Floor::Stored(DType::F32) };
    check_tensor(case, "grad_norm", &actual, expected)?;
    expect::same_bits(case, "grad_norm, deterministic", &actual, &reduce::grad_norm(&list)?)
}

/// No element is missed or taken twice, wherever the tail begins.
fn counts_every_element(device: &Device, case: &Case) -> Checked {
    for length in AWKWARD_LENGTHS {
        for dtype in device.float_dtypes() {
            let ones = data::tensor(device, &vec![1.0; length], [length], dtype)?;
            let count = data::read(&reduce::sum(&ones)?)?;
            expect::holds(case, &format!("{length} ones of {dtype} sum to {count:?}"), count == [length as f64])?;
            let norm = data::read(&reduce::grad_norm(&[&ones])?)?;
            let error = (norm[0] - (length as f64).sqrt()).abs();
            let good = error <= 1e-6 * (length as f64).sqrt();
            expect::holds(case, &format!("{length} ones of {dtype} have norm {norm:?}"), good)?;
        }
    }
    Ok(())
}

/// Sums that bf16 accumulators get stuck in, and values beyond f16.
fn large_bf16_inputs(device: &Device, case: &Case) -> Checked {
    let dtype = super::wide_dtype(device);
    let ones = data::tensor(device, &vec![1.0; 100_000], [100_000], dtype)?;
    let count = data::read(&reduce::sum(&ones)?)?;
    expect::holds(case, &format!("100000 ones sum to {count:?}"), count == [100_000.0])?;
    let x = Data::new(23).normal(1031, 1e15, dtype);
    let tensor = data::tensor(device, &x, [1031], dtype)?;
    let x = [x];
    let (exact, naive) = (oracle::reduce::grad_norm(&Exact, &x), oracle::reduce::grad_norm(&Rounded(dtype), &x));
    let expected = Expected { exact: &[exact], naive: &[naive], floor: Floor::Stored(DType::F32) };
    check_tensor(case, "grad_norm", &reduce::grad_norm(&[&tensor])?, expected)
}

/// Values whose squares overflow or vanish in f32, alone and in one norm with others.
fn norms_of_huge_and_tiny_values(device: &Device, case: &Case) -> Checked {
    let dtype = super::wide_dtype(device);
    for scales in
        [[1e30, 1e30], [1e-30, 1e-30], [1e30, 1e13], [1e15, 1e14], [1e-30, 1e-15], [1e-18, 1e-19], [1e36, 1e-36]]
    {
        let mut data = Data::new(24);
        let values = scales.map(|scale| data.normal(1031, scale, dtype));
        let tensors = values.iter().map(|x| data::tensor(device, x, [1031], dtype)).collect::<Result<Vec<_>, _>>()?;
        let actual = reduce::grad_norm(&tensors.iter().collect::<Vec<_>>())?;
        // The naive form is of no use here: its squares overflow.
        let exact = [oracle::reduce::grad_norm(&Exact, &values)];
        let expected = Expected { exact: &exact, naive: &exact, floor: Floor::Stored(DType::F32) };
        check_tensor(case, &format!("grad_norm of values around {scales:?}"), &actual, expected)?;
    }
    Ok(())
}

/// One bad element among many, wherever it stands, of whichever kind, in whichever tensor.
fn finds_what_is_not_finite(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        let largest = match dtype {
            DType::F16 => 65504.0,
            DType::BF16 => 3.38e38,
            _ => f64::from(f32::MAX),
        };
        let good = data::tensor(device, &vec![largest; 65], [65], dtype)?;
        let empty = data::tensor(device, &[], [0], dtype)?;
        let ones = data::tensor(device, &[1.0; 7], [7], dtype)?;
        let verdict = |tensors: &[&Tensor]| -> Checked<Vec<f64>> { Ok(data::read(&reduce::all_finite(tensors)?)?) };
        let all_good = verdict(&[&good, &empty, &good])?;
        expect::holds(case, &format!("{dtype} values of {largest:e} are finite, got {all_good:?}"), all_good == [1.0])?;
        for length in AWKWARD_LENGTHS.into_iter().filter(|&length| length > 0) {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for position in [0, length / 2, length - 1] {
                    let mut values = vec![-1.5; length];
                    values[position] = bad;
                    let tensor = data::tensor(device, &values, [length], dtype)?;
                    let found = verdict(&[&good, &tensor])? == [0.0] && verdict(&[&tensor, &good])? == [0.0];
                    expect::holds(case, &format!("{bad} of {dtype} at {position} of {length} is found"), found)?;
                    let norm = data::read(&reduce::grad_norm(&[&ones, &tensor, &ones])?)?[0];
                    expect::holds(case, &format!("the norm is {norm} with {bad} of {dtype} in it"), !norm.is_finite())?;
                }
            }
        }
    }
    Ok(())
}

fn norms_of_mixed_dtypes(device: &Device, case: &Case) -> Checked {
    // 3-4-12-13: squares of integers are exact in every type.
    let dtypes = device.float_dtypes();
    let parts = [3.0, 4.0, 12.0];
    let tensors = parts
        .iter()
        .zip(dtypes.iter().cycle())
        .map(|(&part, &dtype)| data::tensor(device, &[part], [1], dtype))
        .collect::<Result<Vec<_>, _>>()?;
    let list: Vec<&Tensor> = tensors.iter().collect();
    let norm = data::read(&reduce::grad_norm(&list)?)?;
    expect::holds(case, &format!("the norm of 3, 4, 12 is {norm:?}"), (norm[0] - 13.0).abs() <= 1e-5)?;
    let finite = data::read(&reduce::all_finite(&list)?)?;
    expect::holds(case, &format!("3, 4, 12 are finite, got {finite:?}"), finite == [1.0])
}

fn rejects_tensors(device: &Device, case: &Case) -> Checked {
    let ids = data::integers(device, &[1, 2, 3])?;
    let x = device.zeros([3], DType::F32, Category::Activations)?;
    expect::rejects(case, Rejects::DType("x"), reduce::sum(&ids))?;
    expect::rejects(case, Rejects::Spec("tensors"), reduce::all_finite(&[]))?;
    expect::rejects(case, Rejects::Spec("tensors"), reduce::grad_norm(&[]))?;
    expect::rejects(case, Rejects::DType("tensors"), reduce::grad_norm(&[&x, &ids]))?;
    expect::rejects(case, Rejects::DType("tensors"), reduce::all_finite(&[&x, &ids]))
}
