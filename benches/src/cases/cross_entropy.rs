//! `cross_entropy` of logits over a real vocabulary.

use anyhow::Result;
use serde_json::json;
use unsloth_rs::{
    Category, DType, Device, Tensor,
    core::ops::{
        cross_entropy::{self, IGNORE_INDEX, LossSpec},
        elementwise,
    },
};
use unsloth_testkit::oracle::cross_entropy as oracle;

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, random},
    check::{Host, cancelling, hold, largest, references, spread},
};

const OP: &str = "cross_entropy";
const SAMPLE: usize = 3;

/// Forward and backward, which writes over the logits.
pub fn cases(selection: &Selection) -> Vec<Case> {
    // Logits of all tokens would not fit many machines: that is what `linear_cross_entropy` is for. On a card they are more than its caches.
    let tokens = selection.loss_tokens.min(selection.tokens.div_ceil(4)).min(512);
    each(selection.small_models(), &selection.dtypes, |model, dtype| {
        let size = [tokens, model.vocab_size];
        let shape = || (model.name, format!("{tokens} x {}", model.vocab_size));
        vec![
            Case::new((OP, "forward"), shape(), dtype, move |at| forward(at, size, dtype)),
            Case::new((OP, "backward"), shape(), dtype, move |at| backward(at, size, dtype)),
        ]
    })
}

/// A target for each row.
pub(super) fn targets(tokens: usize, vocab_size: usize) -> Vec<i32> {
    (0..tokens).map(|token| (token * 7919 % vocab_size) as i32).collect()
}

/// The same targets on rows `kept` alone.
pub(super) fn only(targets: &[i32], kept: &[usize]) -> Vec<i32> {
    let target = |(row, &target): (usize, &i32)| if kept.contains(&row) { target } else { IGNORE_INDEX };
    targets.iter().enumerate().map(target).collect()
}

pub(super) fn on(device: &Device, targets: &[i32]) -> Result<Tensor> {
    Ok(device.from_slice(targets, [targets.len()], Category::Activations)?)
}

fn torch(part: &str, [tokens, vocab_size]: [usize; 2], dtype: DType) -> serde_json::Value {
    json!({ "op": OP, "part": part, "tokens": tokens, "vocab_size": vocab_size, "dtype": dtype.name() })
}

fn forward(context: &Context<'_>, shape: [usize; 2], dtype: DType) -> Result<Prepared> {
    let device = context.device.clone();
    let (logits, ids) = (random(&device, shape, dtype, 1)?, targets(shape[0], shape[1]));
    let targets = on(&device, &ids)?;
    let spec = LossSpec::mean(shape[0]);
    let checked = logits.clone();
    let check = move || {
        let rows = spread(shape[0], SAMPLE);
        // The loss of these rows alone: the others are ignored.
        let forward = cross_entropy::forward(&checked, &on(&device, &only(&ids, &rows))?, spec)?;
        let (values, ids) = (Host::read(&checked)?.rows(&rows), rows.iter().map(|&row| ids[row]).collect::<Vec<_>>());
        let (exact, naive) = references!(dtype, |a| oracle::forward(a, &spec, &values, &ids));
        let size = largest(&exact.lse) + 2.0 * largest(&values);
        let floor = cancelling(DType::F32, size * rows.len() as f64 / shape[0] as f64);
        hold((OP, "loss"), &Host::read(&forward.loss)?.all(), (&[exact.loss], &[naive.loss]), floor)?;
        let lse = Host::read(&forward.lse)?.with_columns(1).rows(&rows);
        hold((OP, "lse"), &lse, (&exact.lse, &naive.lse), cancelling(DType::F32, size))
    };
    let run = Run::call(move || cross_entropy::forward(&logits, &targets, spec));
    Ok(Prepared::new(check, run).with_torch(torch("forward", shape, dtype)))
}

fn backward(context: &Context<'_>, shape: [usize; 2], dtype: DType) -> Result<Prepared> {
    let (logits, ids) = (random(context.device, shape, dtype, 1)?, targets(shape[0], shape[1]));
    let targets = on(context.device, &ids)?;
    let spec = LossSpec::mean(shape[0]);
    let lse = cross_entropy::forward(&logits, &targets, spec)?.lse;
    // With `lse` given, gradients in place of logits have gradients of about the same size.
    let timed = elementwise::copy(&logits)?;
    let run = move |logits| cross_entropy::backward(logits, &targets, &lse, spec);
    let checked = run.clone();
    let check = move || {
        let rows = spread(shape[0], SAMPLE);
        let (values, ids) = (Host::read(&logits)?.rows(&rows), rows.iter().map(|&row| ids[row]).collect::<Vec<_>>());
        let (exact, naive) = references!(dtype, |a| {
            let lse = oracle::forward(a, &spec, &values, &ids).lse;
            oracle::backward(a, &spec, &values, &ids, &lse)
        });
        hold(
            (OP, "dlogits"),
            &Host::read(&checked(logits.clone())?)?.rows(&rows),
            (&exact, &naive),
            cancelling(dtype, 2.0 / shape[0] as f64),
        )
    };
    Ok(Prepared::new(check, Run::in_place(timed, run)).with_torch(torch("backward", shape, dtype)))
}
