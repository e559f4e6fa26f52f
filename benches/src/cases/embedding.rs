//! `embedding` of a micro-batch.

use anyhow::Result;
use serde_json::json;
use unsloth_rs::{Category, DType, core::ops::embedding, cpu::candle::to_candle};
use unsloth_testkit::{budget::Floor, oracle::embedding as oracle};

use super::{Selection, cross_entropy::targets, each};
use crate::{
    case::{Case, Context, Prepared, Run, random},
    check::{Host, cancelling, hold, references, spread},
    models::ModelShape,
};

const OP: &str = "embedding";

/// Rows of the table, and their gradient.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let tokens = selection.tokens;
    each(selection.small_models(), &selection.dtypes, |model, dtype| {
        let shape = || (model.name, format!("{tokens} of {} x {}", model.vocab_size, model.hidden_size));
        vec![
            Case::new((OP, "forward"), shape(), dtype, move |at| forward(at, model, (tokens, dtype))),
            Case::new((OP, "backward"), shape(), dtype, move |at| backward(at, model, (tokens, dtype))),
        ]
    })
}

fn torch(part: &str, model: &ModelShape, (tokens, dtype): (usize, DType)) -> serde_json::Value {
    json!({ "op": OP, "part": part, "tokens": tokens, "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size, "dtype": dtype.name() })
}

fn forward(context: &Context<'_>, model: ModelShape, (tokens, dtype): (usize, DType)) -> Result<Prepared> {
    let device = context.device;
    let dense = random(device, [model.vocab_size, model.hidden_size], dtype, 1)?;
    let list = targets(tokens, model.vocab_size);
    let ids = device.from_slice(&list, [tokens], Category::Activations)?;
    let candle = context.with_candle.then(|| -> Result<Run> {
        let indices: Vec<u32> = list.iter().map(|&id| id as u32).collect();
        let indices = candle_core::Tensor::from_vec(indices, tokens, &candle_core::Device::Cpu)?;
        let table = to_candle(&dense)?;
        Ok(Run::call(move || table.index_select(&indices, 0)))
    });
    let weight = device.prepare_weight(dense.clone())?;
    let run = move || embedding::forward(&weight, &ids, dtype);
    let checked = run.clone();
    let check = move || {
        let at = spread(tokens, 5);
        let rows: Vec<usize> = at.iter().map(|&token| list[token] as usize).collect();
        let expected = Host::read(&dense)?.rows(&rows);
        hold((OP, "out"), &Host::read(&checked()?)?.rows(&at), (&expected, &expected), Floor::Exact)
    };
    let torch = torch("forward", &model, (tokens, dtype));
    Ok(Prepared::new(check, Run::call(run)).with_candle(candle.transpose()?).with_torch(torch))
}

fn backward(context: &Context<'_>, model: ModelShape, (tokens, dtype): (usize, DType)) -> Result<Prepared> {
    let device = context.device;
    let (vocab_size, hidden_size) = (model.vocab_size, model.hidden_size);
    let list = targets(tokens, vocab_size);
    let ids = device.from_slice(&list, [tokens], Category::Activations)?;
    let dout = random(device, [tokens, hidden_size], dtype, 2)?;
    let mut dweight = device.zeros([vocab_size, hidden_size], DType::F32, Category::Gradients)?;
    let (checked_ids, checked_dout, on) = (ids.clone(), dout.clone(), device.clone());
    let check = move || {
        let mut dweight = on.zeros([vocab_size, hidden_size], DType::F32, Category::Gradients)?;
        embedding::backward(&checked_ids, &checked_dout, &mut dweight)?;
        // Rows of some tokens, with every token that has the same id.
        let rows: Vec<usize> = spread(tokens, 4).iter().map(|&token| list[token] as usize).collect();
        let of_rows: Vec<usize> = (0..tokens).filter(|&token| rows.contains(&(list[token] as usize))).collect();
        let place = |&token: &usize| rows.iter().position(|&row| row == list[token] as usize).map(|row| row as i32);
        let ids: Vec<i32> = of_rows.iter().filter_map(place).collect();
        let dout = Host::read(&checked_dout)?.rows(&of_rows);
        let before = vec![0.0; rows.len() * hidden_size];
        let (exact, naive) = references!(dtype, |a| oracle::backward(a, &before, &ids, &dout, hidden_size));
        let magnitude = 0.5 * of_rows.len() as f64;
        hold((OP, "dweight"), &Host::read(&dweight)?.rows(&rows), (&exact, &naive), cancelling(DType::F32, magnitude))
    };
    let run = Run::call(move || embedding::backward(&ids, &dout, &mut dweight));
    Ok(Prepared::new(check, run).with_torch(torch("backward", &model, (tokens, dtype))))
}
