//! `reduce` of a gradient as large as a projection's matrix.

use anyhow::Result;
use unsloth_rs::{DType, Tensor, core::ops::reduce};
use unsloth_testkit::{budget::Floor, oracle::reduce as oracle};

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, random},
    check::{Host, cancelling, hold, references},
};

const OP: &str = "reduce";

/// `sum`, `grad_norm` and `all_finite` in f32, which is what gradients are.
pub fn cases(selection: &Selection) -> Vec<Case> {
    each(&selection.models[..1], &[DType::F32], |model, dtype| {
        let size = [model.intermediate_size, model.hidden_size];
        let shape = || (model.name, format!("{} x {}", size[0], size[1]));
        vec![
            Case::new((OP, "sum"), shape(), dtype, move |at| prepare(at, size, "sum", reduce::sum)),
            Case::new((OP, "grad_norm"), shape(), dtype, move |at| {
                prepare(at, size, "grad_norm", |x| reduce::grad_norm(&[x]))
            }),
            Case::new((OP, "all_finite"), shape(), dtype, move |at| {
                prepare(at, size, "all_finite", |x| reduce::all_finite(&[x]))
            }),
        ]
    })
}

type Reduction = fn(&Tensor) -> unsloth_rs::Result<Tensor>;

fn prepare(context: &Context<'_>, shape: [usize; 2], name: &'static str, reduction: Reduction) -> Result<Prepared> {
    let x = random(context.device, shape, DType::F32, 1)?;
    let checked = x.clone();
    let check = move || {
        let (values, actual) = (vec![Host::read(&checked)?.all()], Host::read(&reduction(&checked)?)?.all());
        let (exact, naive) = references!(DType::F32, |a| match name {
            "sum" => oracle::sum(a, &values[0]),
            "grad_norm" => oracle::grad_norm(a, &values),
            _ => 1.0,
        });
        let floor = match name {
            "sum" => cancelling(DType::F32, values[0].iter().map(|x| x.abs()).sum()),
            "grad_norm" => Floor::Stored(DType::F32),
            _ => Floor::Exact,
        };
        hold((OP, name), &actual, (&[exact], &[naive]), floor)
    };
    Ok(Prepared::new(check, Run::call(move || reduction(&x))))
}
