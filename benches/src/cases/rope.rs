//! `rope` of the heads of a micro-batch, in place as a training step has it.

use anyhow::Result;
use candle_core as candle;
use serde_json::json;
use unsloth_rs::{
    Category, DType, Tensor,
    core::ops::{
        elementwise,
        rope::{self, Angles, Direction, Layout},
        rope_table::{RopeSpec, Scaling},
    },
    cpu::candle::to_candle,
};
use unsloth_testkit::oracle::rope as oracle;

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, random},
    check::{Host, cancelling, hold, references, spread},
    models::ModelShape,
};

const OP: &str = "rope";

/// The rotation, whose gradient is one too; and the traffic of a form that is not fused.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let tokens = selection.tokens;
    each(&selection.models, &selection.dtypes, |model, dtype| {
        let ModelShape { num_heads, num_kv_heads, head_dim, .. } = model;
        let shape = || (model.name, format!("{tokens} x ({num_heads} + {num_kv_heads}) x {head_dim}"));
        let rotations = [("forward", Direction::Forward), ("backward", Direction::Inverse)];
        let rotation = |(part, direction)| {
            Case::new((OP, part), shape(), dtype, move |at| rotate(at, &model, (tokens, dtype), direction))
        };
        let mut cases: Vec<Case> = rotations.into_iter().map(rotation).collect();
        let separate = move |at: &Context<'_>| unfused(at, &model, (tokens, dtype));
        cases.push(Case::new((OP, "forward, unfused traffic"), shape(), dtype, separate));
        cases
    })
}

fn heads(context: &Context<'_>, model: &ModelShape, (tokens, dtype): (usize, DType)) -> Result<(Tensor, Tensor)> {
    let q = random(context.device, [tokens, model.num_heads, model.head_dim], dtype, 1)?;
    Ok((q, random(context.device, [tokens, model.num_kv_heads, model.head_dim], dtype, 2)?))
}

fn rotate(
    context: &Context<'_>,
    model: &ModelShape,
    (tokens, dtype): (usize, DType),
    direction: Direction,
) -> Result<Prepared> {
    let (device, head_dim) = (context.device, model.head_dim);
    let (q, k) = heads(context, model, (tokens, dtype))?;
    let (cos, sin) = RopeSpec { head_dim, theta: 1e6, scaling: Scaling::Default }.tables(device, tokens)?;
    let ids: Vec<i32> = (0..tokens).map(|token| token as i32).collect();
    let positions = device.from_slice(&ids, [tokens], Category::Activations)?;
    let forward = matches!(direction, Direction::Forward);
    let candle = (context.with_candle && forward).then(|| peer((&q, &k), (&cos, &sin))).transpose()?;
    let run = {
        let (cos, sin) = (cos.clone(), sin.clone());
        move |q: Tensor, k: Tensor| {
            let angles = Angles { cos: &cos, sin: &sin, positions: &positions };
            rope::apply(q, k, angles, Layout::Half, direction)
        }
    };
    let timed = (elementwise::copy(&q)?, elementwise::copy(&k)?);
    let checked = run.clone();
    let check = move || {
        let rotated = checked(q.clone(), k.clone())?;
        let at = spread(tokens, 5);
        let positions: Vec<i32> = at.iter().map(|&token| token as i32).collect();
        let (cos, sin) = (Host::read(&cos)?.all(), Host::read(&sin)?.all());
        for (name, before, after, heads) in [("q", &q, rotated.0, q.shape()[1]), ("k", &k, rotated.1, k.shape()[1])] {
            let row =
                |tensor: &Tensor| Ok::<_, anyhow::Error>(Host::read(tensor)?.with_columns(heads * head_dim).rows(&at));
            let (before, after) = (row(before)?, row(&after)?);
            let layout = Layout::Half;
            let rotation =
                oracle::Rotation { cos: &cos, sin: &sin, positions: &positions, head_dim, layout, direction };
            let (exact, naive) = references!(dtype, |a| oracle::rotate(a, &before, rotation));
            hold((OP, name), &after, (&exact, &naive), cancelling(dtype, 1.0))?;
        }
        Ok(())
    };
    let part = if forward { "forward" } else { "backward" };
    let (num_heads, num_kv_heads) = (model.num_heads, model.num_kv_heads);
    let torch = json!({ "op": OP, "part": part, "tokens": tokens, "num_heads": num_heads,
        "num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": dtype.name() });
    // Rotations keep the length of a vector.
    let run = Run::in_place(timed, move |(q, k)| run(q, k));
    Ok(Prepared::new(check, run).with_candle(candle).with_torch(torch))
}

/// As a user of candle writes it where gradients are wanted.
fn peer((q, k): (&Tensor, &Tensor), (cos, sin): (&Tensor, &Tensor)) -> Result<Run> {
    let (q, k) = (to_candle(q)?, to_candle(k)?);
    let table = |table: &Tensor| -> Result<candle::Tensor> {
        let half = to_candle(table)?;
        Ok(candle::Tensor::cat(&[&half, &half], 1)?.unsqueeze(1)?.to_dtype(q.dtype())?)
    };
    let (cos, sin) = (table(cos)?, table(sin)?);
    let rotate = move |x: &candle::Tensor| -> candle::Result<candle::Tensor> {
        let half = x.dim(2)? / 2;
        let turned = candle::Tensor::cat(&[&x.narrow(2, half, half)?.neg()?, &x.narrow(2, 0, half)?], 2)?;
        x.broadcast_mul(&cos)? + turned.broadcast_mul(&sin)?
    };
    Ok(Run::call(move || -> candle::Result<()> {
        rotate(&q)?;
        rotate(&k).map(drop)
    }))
}

/// What separate kernels for turning the halves, two products and a sum would move, in this library's own elementwise kernels: a
/// copy has the traffic of the turn and of the first product.
fn unfused(context: &Context<'_>, model: &ModelShape, shape: (usize, DType)) -> Result<Prepared> {
    let (q, k) = heads(context, model, shape)?;
    let separate = |x: &Tensor| -> unsloth_rs::Result<Tensor> {
        let (product, turned) = (elementwise::copy(x)?, elementwise::copy(x)?);
        elementwise::add(product, &elementwise::scale(turned, 1.0)?)
    };
    let input = q.clone();
    let check = move || {
        let at = spread(input.shape()[0], 3);
        let expected: Vec<f64> = Host::read(&input)?.rows(&at).iter().map(|x| 2.0 * x).collect();
        let floor = unsloth_testkit::budget::Floor::Exact;
        hold((OP, "out"), &Host::read(&separate(&input)?)?.rows(&at), (&expected, &expected), floor)
    };
    Ok(Prepared::new(check, Run::call(move || separate(&q).and_then(|_| separate(&k)))))
}
