//! What [`unsloth_core::ops::elementwise`] has to show on a device.

use half::{bf16, f16};
use unsloth_core::{Category, DType, Device, Tensor, ops::elementwise};

use super::AWKWARD_LENGTHS;
use crate::{
    arith::{Exact, Rounded, round},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle,
    report::{self, Case, Checked},
};

const OP: &str = "elementwise";

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
        for length in AWKWARD_LENGTHS {
            let case = Case::new(device, OP, format!("{length} elements, {dtype}"));
            binary(device, &case, (length, dtype)).map_err(|failure| failure.within(&case))?;
            scaling(device, &case, (length, dtype)).map_err(|failure| failure.within(&case))?;
            casts(device, &case, (length, dtype)).map_err(|failure| failure.within(&case))?;
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
    ("casts_special_values", casts_special_values),
    ("copies_to_its_own_buffer", copies_to_its_own_buffer),
    ("fills_with_zero", fills_with_zero),
    ("rejects_operands", rejects_operands),
    ("rejects_shared", rejects_shared),
];

/// An operation that may reuse its input: budget, repeatability, the same bits with and without reuse, and an input that
/// others still hold is left alone.
fn reusing(
    case: &Case,
    name: &str,
    input: &Tensor,
    run: impl Fn(Tensor) -> unsloth_core::Result<Tensor>,
    expected: Expected<'_>,
) -> Checked {
    let before = elementwise::copy(input)?;
    let shared = run(input.clone())?;
    expect::form(case, name, &shared, (input.shape(), input.dtype()))?;
    check_tensor(case, name, &shared, expected)?;
    expect::same_bits(case, &format!("{name}: the shared input"), &before, input)?;
    let unique = run(elementwise::copy(input)?)?;
    expect::same_bits(case, name, &shared, &unique)
}

fn binary(device: &Device, case: &Case, (length, dtype): (usize, DType)) -> Checked {
    let mut data = Data::new(11);
    let (a, b) = (data.normal(length, 1.0, dtype), data.normal(length, 3.0, dtype));
    let (a_tensor, b_tensor) = (data::tensor(device, &a, [length], dtype)?, data::tensor(device, &b, [length], dtype)?);
    let naive = Rounded(dtype);
    let expected = |exact, naive| Expected { exact, naive, floor: Floor::Exact };
    let (exact_sum, naive_sum) = (oracle::elementwise::add(&Exact, &a, &b), oracle::elementwise::add(&naive, &a, &b));
    let add = |a| elementwise::add(a, &b_tensor);
    reusing(case, "add", &a_tensor, add, expected(&exact_sum, &naive_sum))?;
    let (exact, rounded) = (oracle::elementwise::mul(&Exact, &a, &b), oracle::elementwise::mul(&naive, &a, &b));
    let mul = |a| elementwise::mul(a, &b_tensor);
    reusing(case, "mul", &a_tensor, mul, expected(&exact, &rounded))?;
    // Both operands in one buffer.
    let doubled = elementwise::add(a_tensor.clone(), &a_tensor)?;
    let exact: Vec<f64> = a.iter().map(|a| 2.0 * a).collect();
    check_tensor(case, "add of one tensor to itself", &doubled, expected(&exact, &exact))
}

fn scaling(device: &Device, case: &Case, (length, dtype): (usize, DType)) -> Checked {
    let mut data = Data::new(12);
    let x = data.normal(length, 1.0, dtype);
    let x_tensor = data::tensor(device, &x, [length], dtype)?;
    let factor = 0.712_345_f32;
    let scalar = device.from_slice(&[factor], [1], Category::Activations)?;
    let factor64 = f64::from(factor);
    let exact = oracle::elementwise::scale(&Exact, &x, factor64);
    let naive = oracle::elementwise::scale(&Rounded(dtype), &x, factor64);
    let expected = Expected { exact: &exact, naive: &naive, floor: Floor::Stored(dtype) };
    reusing(case, "scale", &x_tensor, |x| elementwise::scale(x, factor), expected)?;
    reusing(case, "scale_by", &x_tensor, |x| elementwise::scale_by(x, &scalar), expected)?;

    let start = data.normal(length, 2.0, DType::F32);
    let mut accumulator = data::tensor(device, &start, [length], DType::F32)?;
    elementwise::accumulate(&mut accumulator, &x_tensor)?;
    let exact = oracle::elementwise::accumulate(&Exact, &start, &x);
    let naive = oracle::elementwise::accumulate(&Rounded(dtype), &start, &x);
    let expected = Expected { exact: &exact, naive: &naive, floor: Floor::Exact };
    check_tensor(case, "accumulate", &accumulator, expected)
}

fn casts(device: &Device, case: &Case, (length, dtype): (usize, DType)) -> Checked {
    let x = Data::new(13).normal(length, 5.0, dtype);
    let x_tensor = data::tensor(device, &x, [length], dtype)?;
    for target in device.float_dtypes() {
        let cast = elementwise::cast(&x_tensor, target)?;
        expect::form(case, "cast", &cast, (&[length], target))?;
        let rounded: Vec<f64> = x.iter().map(|&x| round(target, x)).collect();
        let expected = Expected { exact: &rounded, naive: &rounded, floor: Floor::Exact };
        check_tensor(case, &format!("cast to {target}"), &cast, expected)?;
    }
    Ok(())
}

/// Values that a detour through f16 would turn into infinity, and sums that a bf16 accumulator would lose.
fn large_bf16_inputs(device: &Device, case: &Case) -> Checked {
    let dtype = super::wide_dtype(device);
    let x = Data::new(14).normal(65, 1e30, dtype);
    let tensor = data::tensor(device, &x, [65], dtype)?;
    let sum = elementwise::add(tensor.clone(), &tensor)?;
    let exact: Vec<f64> = x.iter().map(|x| 2.0 * x).collect();
    check_tensor(case, "add", &sum, Expected { exact: &exact, naive: &exact, floor: Floor::Exact })?;
    // 256 + 1 is 256 in bf16; the accumulator is f32 and keeps the one.
    let mut accumulator = data::tensor(device, &[256.0], [1], DType::F32)?;
    let one = data::tensor(device, &[1.0], [1], dtype)?;
    elementwise::accumulate(&mut accumulator, &one)?;
    check_tensor(case, "accumulate", &accumulator, Expected { exact: &[257.0], naive: &[257.0], floor: Floor::Exact })
}

/// Ties, overflow, signed zero, infinities, NaN and f16 subnormals.
fn casts_special_values(device: &Device, case: &Case) -> Checked {
    let values = [
        0.0f32,
        -0.0,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        65504.0,
        65519.9,
        65520.0,
        -1e30,
        3.4e38,
        6e-8,
        2e-8,
        -5.96e-8,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ];
    let x = device.from_slice(&values, [values.len()], Category::Activations)?;
    for target in device.float_dtypes() {
        let cast = elementwise::cast(&x, target)?.to_f32_vec()?;
        for (&value, &actual) in values.iter().zip(&cast) {
            let expected = match target {
                DType::F16 => f16::from_f32(value).to_f32(),
                DType::BF16 => bf16::from_f32(value).to_f32(),
                _ => value,
            };
            let same = actual.to_bits() == expected.to_bits() || (actual.is_nan() && expected.is_nan());
            expect::holds(case, &format!("{value:e} as {target} is {actual:e}, expected {expected:e}"), same)?;
        }
    }
    Ok(())
}

fn copies_to_its_own_buffer(device: &Device, case: &Case) -> Checked {
    let x = device.from_slice(&[1.0f32, 2.0, 3.0], [3], Category::KvCache)?;
    let mut copy = elementwise::copy(&x)?;
    expect::holds(case, "a copy is held for what the original is", copy.buffer().category() == Category::KvCache)?;
    expect::holds(case, "a copy shares its buffer with nothing", copy.is_unique() && x.is_unique())?;
    copy.write(&[7.0f32, 8.0, 9.0])?;
    expect::holds(case, "writing a copy leaves the original", x.to_vec::<f32>()? == [1.0, 2.0, 3.0])?;
    let ids = data::integers(device, &[5, -1, i32::MIN])?;
    expect::same_bits(case, "copy of integers", &ids, &elementwise::copy(&ids)?)?;
    for dtype in device.float_dtypes() {
        let x = device.zeros([3], dtype, Category::Weights)?;
        let cast = elementwise::cast(&x, DType::F32)?;
        let kept = cast.buffer().category() == Category::Weights;
        expect::holds(case, "a cast is held for what the original is", kept)?;
    }
    Ok(())
}

fn fills_with_zero(device: &Device, case: &Case) -> Checked {
    for dtype in device.float_dtypes() {
        for length in AWKWARD_LENGTHS {
            let mut x = data::tensor(device, &vec![f64::NAN; length], [length], dtype)?;
            elementwise::fill_zero(&mut x)?;
            let zero = x.to_f32_vec()?.iter().all(|v| v.to_bits() == 0);
            expect::holds(case, &format!("{length} elements of {dtype} are zero"), zero)?;
        }
    }
    let mut ids = data::integers(device, &[3; 65])?;
    elementwise::fill_zero(&mut ids)?;
    expect::holds(case, "integers are zero", ids.to_vec::<i32>()? == [0; 65])
}

fn rejects_operands(device: &Device, case: &Case) -> Checked {
    let floats = |length| device.zeros([length], DType::F32, Category::Activations);
    let ids = data::integers(device, &[1, 2, 3])?;
    let x = floats(3)?;
    expect::rejects(case, Rejects::Shape("b"), elementwise::add(x.clone(), &floats(4)?))?;
    expect::rejects(case, Rejects::Shape("b"), elementwise::mul(x.clone(), &floats(4)?))?;
    expect::rejects(case, Rejects::DType("b"), elementwise::add(x.clone(), &ids))?;
    expect::rejects(case, Rejects::DType("a"), elementwise::add(ids.clone(), &ids))?;
    expect::rejects(case, Rejects::DType("x"), elementwise::scale(ids.clone(), 2.0))?;
    expect::rejects(case, Rejects::Shape("scalar"), elementwise::scale_by(x.clone(), &floats(2)?))?;
    expect::rejects(case, Rejects::Shape("accumulator"), elementwise::accumulate(&mut floats(4)?, &x))?;
    expect::rejects(case, Rejects::DType("x"), elementwise::cast(&ids, DType::F32))?;
    expect::rejects(case, Rejects::DType("dtype"), elementwise::cast(&x, DType::I32))
}

fn rejects_shared(device: &Device, case: &Case) -> Checked {
    let x = device.zeros([3], DType::F32, Category::Activations)?;
    let mut shared = x.clone();
    let refused = elementwise::accumulate(&mut shared, &elementwise::copy(&x)?);
    expect::rejects(case, Rejects::Shared("accumulator"), refused)?;
    expect::rejects(case, Rejects::Shared("x"), elementwise::fill_zero(&mut shared))
}
