//! What [`unsloth_core::ops::stochastic_rounding`] has to show on a device that has it.

use unsloth_core::{
    Category, DType, Device, Tensor,
    ops::stochastic_rounding::{self, Spec},
    rng::Philox,
};

use super::AWKWARD_LENGTHS;
use crate::{
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle,
    report::{self, Case, Checked},
};

const OP: &str = "stochastic_rounding";

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(OP, device, check(device));
}

fn spec(step: u32, tensor: u32) -> Spec {
    Spec { stream: Philox::new(5, 6), step, tensor }
}

type Hazard = fn(&Device, &Case) -> Checked;

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    for length in AWKWARD_LENGTHS {
        for scale in [1.0, 1e-3, 1e30] {
            let case = Case::new(device, OP, format!("{length} elements of about {scale}"));
            as_the_oracle(device, &case, (length, scale)).map_err(|failure| failure.within(&case))?;
        }
    }
    let hazards: [(&str, Hazard); 4] = [
        ("the_mean_is_the_number", the_mean_is_the_number),
        ("draws_differ", draws_differ),
        ("special_values_stay", special_values_stay),
        ("rejects", rejects),
    ];
    for (name, hazard) in hazards {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

fn rounded(device: &Device, spec: &Spec, x: &[f64]) -> unsloth_core::Result<Tensor> {
    // What is there already must not count.
    let mut out = data::tensor(device, &vec![f64::NAN; x.len()], [x.len()], DType::BF16)?;
    stochastic_rounding::round(spec, &data::tensor(device, x, [x.len()], DType::F32)?, &mut out)?;
    Ok(out)
}

/// The bits are fixed by the contract, so there is nothing to be off by.
fn as_the_oracle(device: &Device, case: &Case, (length, scale): (usize, f64)) -> Checked {
    let x = Data::new(95).normal(length, scale, DType::F32);
    for spec in [spec(0, 0), spec(7, u32::MAX)] {
        let expected = oracle::stochastic_rounding::round(&spec, &x);
        let out = rounded(device, &spec, &x)?;
        check_tensor(case, "out", &out, Expected { exact: &expected, naive: &expected, floor: Floor::Exact })?;
        expect::same_bits(case, "deterministic", &out, &rounded(device, &spec, &x)?)?;
    }
    Ok(())
}

/// A step of a thousandth of the distance of two numbers in bf16 is lost by rounding to nearest, and is not here.
fn the_mean_is_the_number(device: &Device, case: &Case) -> Checked {
    let (count, share) = (20_000, 0.1);
    for sign in [1.0, -1.0] {
        let x = vec![sign * (1.0 + share / 128.0); count];
        let out = data::read(&rounded(device, &spec(1, 1), &x)?)?;
        let mean = 128.0 * (sign * out.iter().sum::<f64>() / count as f64 - 1.0);
        let deviation = (share * (1.0 - share) / count as f64).sqrt();
        expect::holds(case, &format!("mean share {mean}, expected {share}"), (mean - share).abs() <= 5.0 * deviation)?;
    }
    Ok(())
}

/// Other steps and other tensors round otherwise.
fn draws_differ(device: &Device, case: &Case) -> Checked {
    let x = vec![1.0 + 0.5 / 128.0; 256];
    let of = |spec| rounded(device, &spec, &x).and_then(|out| data::read(&out));
    let first = of(spec(1, 1))?;
    for (what, other) in [("step", of(spec(2, 1))?), ("tensor", of(spec(1, 2))?)] {
        let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
        // Half of 256 fair draws agree, give or take eight standard deviations.
        expect::holds(
            case,
            &format!("{same} of 256 elements are the same for another {what}"),
            (64..192).contains(&same),
        )?;
    }
    Ok(())
}

fn special_values_stay(device: &Device, case: &Case) -> Checked {
    let x = [f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, 1.0, -3.5, 2f64.powi(127)];
    let out = data::read(&rounded(device, &spec(3, 3), &x)?)?;
    expect::holds(case, &format!("{x:?} became {out:?}"), out == x)?;
    let nan = data::read(&rounded(device, &spec(3, 3), &[f64::NAN; 9])?)?;
    expect::holds(case, &format!("NaN became {nan:?}"), nan.iter().all(|value| value.is_nan()))
}

fn rejects(device: &Device, case: &Case) -> Checked {
    let zeros = |length, dtype| device.zeros([length], dtype, Category::Weights);
    let x = zeros(3, DType::F32)?;
    let round = |x: &Tensor, out: &mut Tensor| stochastic_rounding::round(&spec(0, 0), x, out);
    expect::rejects(case, Rejects::DType("x"), round(&zeros(3, DType::BF16)?, &mut zeros(3, DType::BF16)?))?;
    expect::rejects(case, Rejects::DType("out"), round(&x, &mut zeros(3, DType::F32)?))?;
    expect::rejects(case, Rejects::DType("out"), round(&x, &mut zeros(3, DType::F16)?))?;
    expect::rejects(case, Rejects::Shape("out"), round(&x, &mut zeros(4, DType::BF16)?))?;
    let mut out = zeros(3, DType::BF16)?;
    let _shared = out.clone();
    expect::rejects(case, Rejects::Shared("out"), round(&x, &mut out))
}
