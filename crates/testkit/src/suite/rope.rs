//! What [`unsloth_core::ops::rope`] has to show on a device.

use unsloth_core::{
    Category, DType, Device, Error, Tensor,
    ops::{
        elementwise,
        rope::{self, Angles, Direction, Layout},
    },
};

use crate::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::rope::{Rotation, rotate},
    report::{self, Case, Checked},
};

const OP: &str = "rope";

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
        for sizes in SIZES {
            for layout in [Layout::Half, Layout::Interleaved] {
                for direction in [Direction::Forward, Direction::Inverse] {
                    let case = Case::new(device, OP, format!("{sizes:?}, {dtype}, {layout:?}, {direction:?}"));
                    let problem = Problem::new(sizes, dtype, 1.0);
                    problem.check(device, &case, (layout, direction)).map_err(|failure| failure.within(&case))?;
                }
            }
        }
    }
    for (name, hazard) in HAZARDS {
        let case = Case::new(device, OP, name);
        hazard(device, &case).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

type Hazard = fn(&Device, &Case) -> Checked;

const HAZARDS: [(&str, Hazard); 4] = [
    ("large_bf16_inputs", large_bf16_inputs),
    ("inverse_undoes_forward", inverse_undoes_forward),
    ("rejects_positions_outside_the_table", rejects_positions_outside_the_table),
    ("rejects_operands", rejects_operands),
];

#[derive(Clone, Copy, Debug)]
struct Sizes {
    tokens: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

const SIZES: [Sizes; 7] = [
    Sizes { tokens: 0, num_heads: 2, num_kv_heads: 1, head_dim: 8 },
    Sizes { tokens: 1, num_heads: 1, num_kv_heads: 1, head_dim: 2 },
    Sizes { tokens: 7, num_heads: 3, num_kv_heads: 1, head_dim: 6 },
    Sizes { tokens: 5, num_heads: 4, num_kv_heads: 2, head_dim: 64 },
    Sizes { tokens: 13, num_heads: 2, num_kv_heads: 2, head_dim: 34 },
    Sizes { tokens: 65, num_heads: 6, num_kv_heads: 3, head_dim: 14 },
    Sizes { tokens: 3, num_heads: 1, num_kv_heads: 1, head_dim: 258 },
];

const NUM_POSITIONS: usize = 11;

struct Problem {
    sizes: Sizes,
    dtype: DType,
    q: Vec<f64>,
    k: Vec<f64>,
    cos: Vec<f64>,
    sin: Vec<f64>,
    positions: Vec<i32>,
}

impl Problem {
    fn new(sizes: Sizes, dtype: DType, scale: f64) -> Self {
        let Sizes { tokens, num_heads, num_kv_heads, head_dim } = sizes;
        let mut data = Data::new(51);
        let q = data.normal(tokens * num_heads * head_dim, scale, dtype);
        let k = data.normal(tokens * num_kv_heads * head_dim, scale, dtype);
        let half = head_dim / 2;
        let angles: Vec<f64> = (0..NUM_POSITIONS * half)
            .map(|at| (at / half) as f64 * 10_000f64.powf(-((at % half) as f64) / half as f64))
            .collect();
        let table = |f: fn(f64) -> f64| angles.iter().map(|&a| f64::from(f(a) as f32)).collect();
        // Documents of 4 tokens: positions restart, repeat, and end at the last row of the table.
        let mut positions: Vec<i32> = (0..tokens as i32).map(|t| t % 4).collect();
        if let Some(last) = positions.last_mut() {
            *last = NUM_POSITIONS as i32 - 1;
        }
        Self { sizes, dtype, q, k, cos: table(f64::cos), sin: table(f64::sin), positions }
    }

    fn tensors(&self, device: &Device) -> unsloth_core::Result<(Tensor, Tensor)> {
        let Sizes { tokens, num_heads, num_kv_heads, head_dim } = self.sizes;
        let q = data::tensor(device, &self.q, [tokens, num_heads, head_dim], self.dtype)?;
        Ok((q, data::tensor(device, &self.k, [tokens, num_kv_heads, head_dim], self.dtype)?))
    }

    fn apply(
        &self,
        device: &Device,
        (q, k): (Tensor, Tensor),
        (layout, direction): (Layout, Direction),
    ) -> unsloth_core::Result<(Tensor, Tensor)> {
        let shape = [NUM_POSITIONS, self.sizes.head_dim / 2];
        let cos = data::tensor(device, &self.cos, shape, DType::F32)?;
        let sin = data::tensor(device, &self.sin, shape, DType::F32)?;
        let positions = data::integers(device, &self.positions)?;
        rope::apply(q, k, Angles { cos: &cos, sin: &sin, positions: &positions }, layout, direction)
    }

    fn rotation(&self, (layout, direction): (Layout, Direction)) -> Rotation<'_> {
        let head_dim = self.sizes.head_dim;
        Rotation { cos: &self.cos, sin: &self.sin, positions: &self.positions, head_dim, layout, direction }
    }

    fn check(&self, device: &Device, case: &Case, how: (Layout, Direction)) -> Checked {
        let (q, k) = self.tensors(device)?;
        let shared = self.apply(device, (q.clone(), k.clone()), how)?;
        for (name, input, values, actual) in [("q", &q, &self.q, &shared.0), ("k", &k, &self.k, &shared.1)] {
            expect::form(case, name, actual, (input.shape(), self.dtype))?;
            let exact = rotate(&Exact, values, self.rotation(how));
            let naive = rotate(&Rounded(self.dtype), values, self.rotation(how));
            let expected = Expected { exact: &exact, naive: &naive, floor: Floor::Stored(self.dtype) };
            check_tensor(case, name, actual, expected)?;
        }
        // The same bits in place and in new buffers, together or one of the two; a shared input is left alone.
        let originals = self.tensors(device)?;
        expect::same_bits(case, "the shared q", &q, &originals.0)?;
        expect::same_bits(case, "the shared k", &k, &originals.1)?;
        let unique_q = self.apply(device, (elementwise::copy(&q)?, k.clone()), how)?;
        let unique = self.apply(device, (q, k), how)?;
        for again in [unique_q, unique] {
            expect::same_bits(case, "q", &shared.0, &again.0)?;
            expect::same_bits(case, "k", &shared.1, &again.1)?;
        }
        Ok(())
    }
}

fn large_bf16_inputs(device: &Device, case: &Case) -> Checked {
    let problem = Problem::new(SIZES[3], super::wide_dtype(device), 1e30);
    problem.check(device, case, (Layout::Half, Direction::Forward))
}

/// The gradient of a rotation is its inverse: there and back is the input, up to two roundings.
fn inverse_undoes_forward(device: &Device, case: &Case) -> Checked {
    for layout in [Layout::Half, Layout::Interleaved] {
        let problem = Problem::new(SIZES[5], DType::F32, 1.0);
        let there = problem.apply(device, problem.tensors(device)?, (layout, Direction::Forward))?;
        let back = problem.apply(device, there, (layout, Direction::Inverse))?;
        let twice = |x: &[f64]| {
            let naive = Rounded(DType::F32);
            let there = rotate(&naive, x, problem.rotation((layout, Direction::Forward)));
            rotate(&naive, &there, problem.rotation((layout, Direction::Inverse)))
        };
        for (name, values, actual) in [("q", &problem.q, &back.0), ("k", &problem.k, &back.1)] {
            let expected = Expected { exact: values, naive: &twice(values), floor: Floor::Stored(DType::F32) };
            check_tensor(case, name, actual, expected)?;
        }
    }
    Ok(())
}

/// Where the host can see the positions the call is refused; elsewhere the token becomes NaN and the others are right.
fn rejects_positions_outside_the_table(device: &Device, case: &Case) -> Checked {
    for bad in [-1, NUM_POSITIONS as i32, i32::MAX, i32::MIN] {
        let mut problem = Problem::new(SIZES[3], DType::F32, 1.0);
        problem.positions[2] = bad;
        match problem.apply(device, problem.tensors(device)?, (Layout::Half, Direction::Forward)) {
            Err(error) => {
                let typed = matches!(error, Error::InvalidSpec { field: "positions", .. });
                expect::holds(
                    case,
                    &format!("position {bad} is refused as a field `positions`, got \"{error}\""),
                    typed,
                )?;
            }
            Ok((q, k)) => {
                let good = Problem::new(SIZES[3], DType::F32, 1.0);
                let how = good.rotation((Layout::Half, Direction::Forward));
                for (name, values, actual) in [("q", &good.q, q), ("k", &good.k, k)] {
                    let width = values.len() / good.sizes.tokens;
                    let (exact, actual) = (rotate(&Exact, values, how), data::read(&actual)?);
                    let mut tokens = actual.chunks(width).zip(exact.chunks(width)).enumerate();
                    let right = tokens.all(|(token, (actual, exact))| match token {
                        2 => actual.iter().all(|a| a.is_nan()),
                        _ => actual.iter().zip(exact).all(|(a, e)| (a - e).abs() <= 1e-5),
                    });
                    let what = format!("position {bad} makes NaN of its token and leaves the others of {name} alone");
                    expect::holds(case, &what, right)?;
                }
            }
        }
    }
    Ok(())
}

fn rejects_operands(device: &Device, case: &Case) -> Checked {
    let heads = |shape: [usize; 3]| device.zeros(shape, DType::F32, Category::Activations);
    let table = |shape: [usize; 2]| device.zeros(shape, DType::F32, Category::Activations);
    let apply = |q: Tensor, k: Tensor, cos: &Tensor, sin: &Tensor, positions: &Tensor| {
        rope::apply(q, k, Angles { cos, sin, positions }, Layout::Half, Direction::Forward)
    };
    let good = table([5, 2])?;
    let positions = data::integers(device, &[0, 1])?;
    let (q, k) = (heads([2, 3, 4])?, heads([2, 1, 4])?);
    let flat = table([2, 12])?;
    expect::rejects(case, Rejects::Shape("q"), apply(flat, k.clone(), &good, &good, &positions))?;
    expect::rejects(case, Rejects::Shape("k"), apply(q.clone(), heads([3, 1, 4])?, &good, &good, &positions))?;
    expect::rejects(case, Rejects::Shape("k"), apply(q.clone(), heads([2, 1, 6])?, &good, &good, &positions))?;
    expect::rejects(case, Rejects::Shape("cos"), apply(q.clone(), k.clone(), &table([5, 3])?, &good, &positions))?;
    expect::rejects(case, Rejects::Shape("sin"), apply(q.clone(), k.clone(), &good, &table([4, 2])?, &positions))?;
    let more = data::integers(device, &[0, 1, 2])?;
    expect::rejects(case, Rejects::Shape("positions"), apply(q.clone(), k.clone(), &good, &good, &more))?;
    let floats = device.zeros([2], DType::F32, Category::Activations)?;
    expect::rejects(case, Rejects::DType("positions"), apply(q.clone(), k.clone(), &good, &good, &floats))?;
    let ids = data::integers(device, &[0; 24])?.reshape([2, 3, 4])?;
    expect::rejects(case, Rejects::DType("q"), apply(ids, k.clone(), &good, &good, &positions))?;
    for dtype in device.float_dtypes().into_iter().filter(|&dtype| dtype != DType::F32) {
        let k = device.zeros([2, 1, 4], dtype, Category::Activations)?;
        expect::rejects(case, Rejects::DType("k"), apply(q.clone(), k, &good, &good, &positions))?;
        let narrow = device.zeros([5, 2], dtype, Category::Activations)?;
        expect::rejects(case, Rejects::DType("cos"), apply(q.clone(), heads([2, 1, 4])?, &narrow, &good, &positions))?;
    }
    let odd = apply(heads([2, 3, 5])?, heads([2, 1, 5])?, &good, &good, &positions);
    expect::rejects(case, Rejects::Spec("head_dim"), odd)
}
