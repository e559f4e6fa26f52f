//! What [`unsloth_core::ops::lora_linear`] has to show with dropout.

use unsloth_core::{
    DType, Device,
    ops::lora_linear::{self, Adapter, Dropout, RowDropout},
    rng::Philox,
};

use super::{
    linear::dtype_pairs,
    lora_linear::{Problem, Zeros, layer},
};
use crate::{
    data,
    expect::{self, Rejects},
    oracle::linear::Dims,
    report::{self, Case, Checked},
};

const OP: &str = "lora_dropout";

/// `(rows, in_features, out_features, rank)`: none, one, widths around a multiple of the four numbers of a block, and each
/// dimension longer than a block that a device may work in.
const SHAPES: [(usize, usize, usize, usize); 9] = [
    (0, 5, 7, 2),
    (1, 1, 1, 1),
    (3, 7, 1, 2),
    (2, 63, 65, 16),
    (65, 64, 63, 8),
    (7, 129, 130, 5),
    (1031, 6, 7, 2),
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
        for ((rows, in_features, out_features, rank), probability) in SHAPES.into_iter().zip(PROBABILITIES) {
            let dims = Dims { rows, in_features, out_features };
            let shape = format!("{rows} rows, {in_features} -> {out_features}, rank {rank}");
            let detail = format!("{shape}, {dtype}, weight {weight_dtype}, probability {probability}");
            let case = Case::new(device, OP, detail);
            let mut problem = Problem::new((dims, rank), dtype, weight_dtype, DType::F32);
            problem.dropout = Some(zeros(rows, probability));
            layer(device, &case, &problem).map_err(|failure| failure.within(&case))?;
        }
    }
    for (name, hazard) in HAZARDS {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

const PROBABILITIES: [f32; 9] = [0.5, 0.1, 0.9, 0.3, 0.05, 0.0, 0.3, 0.5, 0.1];

type Hazard = fn(&Device, &Case) -> Checked;

const HAZARDS: [(&str, Hazard); 3] = [
    ("zeros_are_those_of_the_counter", zeros_are_those_of_the_counter),
    ("zeros_do_not_depend_on_the_split", zeros_do_not_depend_on_the_split),
    ("rejects", rejects),
];

/// Rows of two sequences, neither of which starts where the counter would by itself.
fn zeros(rows: usize, probability: f32) -> Zeros {
    let half = rows.div_ceil(2);
    let row = |t: usize| if t < half { (3, 7 + t as i32) } else { (4, (t - half) as i32) };
    let (sequences, positions) = (0..rows).map(row).unzip();
    let dropout = Dropout { probability, stream: Philox::new(1 << 40 | 9, 21), step: 12 };
    Zeros { dropout, sequences, positions }
}

/// A layer whose `h` is `drop(x)` itself: ones for `x`, the identity for `A`.
fn unmixed(width: usize, zeros: Zeros) -> Problem {
    let dims = Dims { rows: zeros.sequences.len(), in_features: width, out_features: 3 };
    let mut problem = Problem::new((dims, width), DType::F32, DType::F32, DType::F32);
    problem.ones_through_identity();
    problem.dropout = Some(zeros);
    problem
}

/// Every element is dropped or kept as the random numbers of the contract say, whichever part of the counter differs.
fn zeros_are_those_of_the_counter(device: &Device, case: &Case) -> Checked {
    const WIDTH: usize = 131;
    let base = zeros(70, 0.4);
    let mut variants = vec![base.clone()];
    let changed = |change: fn(&mut Zeros)| {
        let mut zeros = base.clone();
        change(&mut zeros);
        zeros
    };
    variants.push(changed(|zeros| zeros.dropout.step += 1));
    variants.push(changed(|zeros| zeros.dropout.stream = Philox::new(1 << 40 | 9, 22)));
    variants.push(changed(|zeros| zeros.dropout.stream = Philox::new(9, 21)));
    variants.push(changed(|zeros| zeros.sequences.iter_mut().for_each(|sequence| *sequence += 1)));
    variants.push(changed(|zeros| zeros.positions.iter_mut().for_each(|position| *position += 1)));
    let mut seen: Vec<Vec<f64>> = Vec::new();
    for zeros in variants {
        let keep = zeros.keep(WIDTH);
        let h = data::read(&unmixed(WIDTH, zeros).run(device)?.h)?;
        let same = h.iter().zip(&keep).all(|(h, keep)| (h - keep).abs() <= 1e-6 * keep);
        expect::holds(case, "drops other elements than the counter says", same)?;
        let kept = h.iter().filter(|&&value| value != 0.0).count() as f64 / h.len() as f64;
        // Six standard deviations of the mean of 9170 elements.
        expect::holds(case, "drops another share than asked for", (kept - 0.6).abs() <= 6.0 * (0.24 / 9170f64).sqrt())?;
        expect::holds(case, "drops the same elements under another counter", !seen.contains(&h))?;
        seen.push(h);
    }
    Ok(())
}

/// Rows given in two calls, the second half first, have the zeros that they have in one.
fn zeros_do_not_depend_on_the_split(device: &Device, case: &Case) -> Checked {
    const WIDTH: usize = 37;
    let all = zeros(21, 0.5);
    let whole = data::read(&unmixed(WIDTH, all.clone()).run(device)?.h)?;
    for rows in [11..21, 0..11] {
        let (sequences, positions) = (all.sequences[rows.clone()].to_vec(), all.positions[rows.clone()].to_vec());
        let part = Zeros { sequences, positions, ..all.clone() };
        let h = data::read(&unmixed(WIDTH, part).run(device)?.h)?;
        let expected = &whole[rows.start * WIDTH..rows.end * WIDTH];
        expect::holds(case, "drops by the split", h.iter().zip(expected).all(|(a, b)| (a == &0.0) == (b == &0.0)))?;
    }
    Ok(())
}

fn rejects(device: &Device, case: &Case) -> Checked {
    let dims = Dims { rows: 2, in_features: 3, out_features: 4 };
    let problem = Problem::new((dims, 2), DType::F32, DType::F32, DType::F32);
    let tensors = problem.tensors(device)?;
    let (two, three) = (data::integers(device, &[0, 1])?, data::integers(device, &[0, 1, 2])?);
    let floats = data::tensor(device, &[0.0, 1.0], [2], DType::F32)?;
    let forward = |rows: RowDropout<'_>| {
        let adapter = Adapter { dropout: Some(rows), ..tensors.adapter(1.0) };
        lora_linear::forward(&tensors.x, &tensors.weight, None, adapter)
    };
    let dropout = zeros(2, 0.5).dropout;
    let rows = RowDropout { dropout, sequences: &two, positions: &two };
    expect::rejects(case, Rejects::Shape("sequences"), forward(RowDropout { sequences: &three, ..rows }))?;
    expect::rejects(case, Rejects::Shape("positions"), forward(RowDropout { positions: &three, ..rows }))?;
    expect::rejects(case, Rejects::DType("sequences"), forward(RowDropout { sequences: &floats, ..rows }))?;
    expect::rejects(case, Rejects::DType("positions"), forward(RowDropout { positions: &floats, ..rows }))?;
    for probability in [1.0, -0.1, f32::NAN] {
        let dropout = Dropout { probability, ..dropout };
        expect::rejects(case, Rejects::Spec("probability"), forward(RowDropout { dropout, ..rows }))?;
    }
    Ok(())
}
