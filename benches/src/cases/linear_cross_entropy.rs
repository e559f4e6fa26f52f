//! `linear_cross_entropy` at a real vocabulary.

use anyhow::Result;
use serde_json::json;
use unsloth_rs::{
    DType,
    core::ops::{cross_entropy::LossSpec, linear_cross_entropy as op},
};
use unsloth_testkit::oracle::{
    cross_entropy as rows_oracle,
    linear::{self as linear_oracle, Dims},
};

use super::{
    Selection,
    cross_entropy::{on, only, targets},
    each,
};
use crate::{
    case::{Case, Context, Prepared, Run, random_scaled},
    check::{Host, cancelling, hold, largest, magnitudes, references, spread},
};

const OP: &str = "linear_cross_entropy";
/// Rows that are compared: each costs the oracle a product with the whole matrix.
const SAMPLE: usize = 2;

/// The loss alone, as an evaluation has it, and with the gradient of the hidden states.
pub fn cases(selection: &Selection) -> Vec<Case> {
    each(selection.small_models(), &selection.dtypes, |model, dtype| {
        let dims = Dims { rows: selection.loss_tokens, in_features: model.hidden_size, out_features: model.vocab_size };
        let part = |part: &str, needs_dx| {
            let shape = format!("{} x {} -> {}", dims.rows, dims.in_features, dims.out_features);
            Case::new((OP, part), (model.name, shape), dtype, move |at| loss(at, dims, dtype, needs_dx))
        };
        let mut cases = vec![part("loss and dx", true)];
        if selection.all_calls {
            cases.push(part("loss", false));
        }
        cases
    })
}

fn loss(context: &Context<'_>, dims: Dims, dtype: DType, needs_dx: bool) -> Result<Prepared> {
    let device = context.device.clone();
    let Dims { rows, in_features, out_features } = dims;
    // As large as what a trained model's norm gives, so that the softmax is not flat.
    let x = random_scaled(&device, [rows, in_features], dtype, (1, 4.0))?;
    let dense = random_scaled(&device, [out_features, in_features], dtype, (2, 0.1))?;
    let (head, ids) = (device.prepare_weight(dense.clone())?, targets(rows, out_features));
    let all = on(&device, &ids)?;
    let spec = LossSpec::mean(rows);
    let run = {
        let (x, head) = (x.clone(), head.clone());
        move || op::forward(&x, &head, &all, spec, needs_dx, None)
    };
    let checked = run.clone();
    let check = move || {
        let sample = spread(rows, SAMPLE);
        let (values, matrix) = (Host::read(&x)?.rows(&sample), Host::read(&dense)?.all());
        let targets: Vec<i32> = sample.iter().map(|&row| ids[row]).collect();
        let dims = Dims { rows: sample.len(), ..dims };
        let (exact, naive) = references!(dtype, |a| {
            let logits = linear_oracle::forward(a, dims, &values, &matrix, None);
            let rows_oracle::Forward { loss, lse } = rows_oracle::forward(a, &spec, &logits, &targets);
            let dlogits = rows_oracle::backward(a, &spec, &logits, &targets, &lse);
            let dx = if needs_dx { linear_oracle::input_gradient(a, dims, &dlogits, &matrix) } else { Vec::new() };
            (loss, dlogits, dx)
        });
        // The loss of these rows alone: the others are ignored.
        let part = op::forward(&x, &head, &on(&device, &only(&ids, &sample))?, spec, false, None)?;
        let share = sample.len() as f64 / rows as f64;
        let largest_terms = largest(&values) * largest(&matrix) * (in_features as f64).sqrt();
        let floor = cancelling(DType::F32, share * (largest_terms + (out_features as f64).ln()));
        hold((OP, "loss"), &Host::read(&part.loss)?.all(), (&[exact.0], &[naive.0]), floor)?;
        let Some(dx) = checked()?.dx else { return Ok(()) };
        let terms = linear_oracle::input_gradient(
            &unsloth_testkit::arith::Exact,
            dims,
            &magnitudes(&exact.1),
            &magnitudes(&matrix),
        );
        let magnitude = largest(&terms) + 2.0 / rows as f64 * largest(&matrix);
        hold((OP, "dx"), &Host::read(&dx)?.rows(&sample), (&exact.2, &naive.2), cancelling(dtype, magnitude))
    };
    let part = if needs_dx { "loss and dx" } else { "loss" };
    let torch = json!({ "op": OP, "part": part, "tokens": rows, "hidden_size": in_features,
        "vocab_size": out_features, "dtype": dtype.name() });
    Ok(Prepared::new(check, Run::call(run)).with_torch(torch))
}
