//! Generation of one sequence, a token at a time.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::json;
use unsloth_rs::{
    DType, Device,
    llm::{
        decoder::{Decoder, LoadOptions},
        generate::{GenerateOptions, generate},
        sampler::Sampling,
    },
    train::{Batch, Document},
};

use super::{Selection, each};
use crate::{
    candle,
    case::{Case, Context, Prepared, Run},
    training::{Folder, FolderPath, random_ids},
};

const OP: &str = "decode";
const PROMPT: usize = 128;
const NEW: usize = 32;

/// New tokens behind a prompt, the prompt's own pass not counted. Of a given folder, or of two layers of the smallest models.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let models = if selection.folder.is_some() { &selection.models[..1] } else { selection.small_models() };
    each(models, &selection.dtypes, |model, dtype| {
        let folder = Folder::of(selection.folder.as_deref(), model);
        let name = folder.name();
        let shape = format!("{NEW} tokens behind {PROMPT}");
        let with_candle = selection.all_calls;
        let prepare = move |at: &Context<'_>| prepare(at, &folder, dtype, with_candle);
        vec![Case::new((OP, "greedy"), (&name, shape), dtype, prepare).with_tokens(NEW - 1)]
    })
}

fn prepare(context: &Context<'_>, folder: &Folder, dtype: DType, with_candle: bool) -> Result<Prepared> {
    let path = Rc::new(folder.written()?);
    let model = Rc::new(Decoder::load((*path).as_ref(), context.device, LoadOptions::frozen(dtype))?);
    let prompt = random_ids(model.config().vocab_size, PROMPT)?;
    let options = GenerateOptions { max_new_tokens: NEW, ignore_eos: true, sampling: Sampling::GREEDY };
    let (checked, checked_prompt, device) = (Rc::clone(&model), prompt.clone(), context.device.clone());
    let check = move || {
        // What the cache gives for the last token is what a pass over the whole sequence gives, up to rounding.
        let tokens = generate(&checked, &checked_prompt, options, |_| ())?.tokens;
        let (last, before) = tokens.split_last().ok_or_else(|| anyhow::anyhow!("{OP}: no token"))?;
        let ids: Vec<i32> = checked_prompt.iter().chain(before).copied().collect();
        let targets = vec![0; ids.len()];
        let batch = Batch::new(&device, &[Document { ids: &ids, targets: &targets }])?;
        let logits = checked.logits(&batch)?;
        let row = &logits[logits.len() - checked.config().vocab_size..];
        let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let spread = best - row.iter().copied().fold(f32::INFINITY, f32::min);
        let chosen = row[*last as usize];
        ensure!(best - chosen <= 0.02 * spread, "{OP}: token {last} has logit {chosen}, the largest is {best}");
        Ok(())
    };
    let torch = json!({ "op": OP, "part": "greedy", "folder": (*path).as_ref().display().to_string(), "prompt": PROMPT,
        "new": NEW, "dtype": dtype.name() });
    let fits = with_candle && context.with_candle && candle::has(model.config());
    let candle = fits.then(|| peer(Rc::clone(&path), context.device, &prompt, dtype));
    let recording = Arc::clone(context.recording);
    let run = move || {
        let _folder = &path;
        let mut first = None;
        generate(&model, &prompt, options, |_| {
            first.get_or_insert_with(|| {
                recording.restart();
                Instant::now()
            });
        })?;
        Ok(first.map(|first| first.elapsed()).unwrap_or_default())
    };
    Ok(Prepared::new(check, Run::Clocked(Box::new(run))).with_candle(candle).with_torch(torch))
}

/// candle's own generation. Its copy of the weights is there from the first run on.
fn peer(path: Rc<FolderPath>, device: &Device, prompt: &[i32], dtype: DType) -> Run {
    let device = device.clone();
    let ids: Vec<u32> = prompt.iter().copied().map(i32::cast_unsigned).collect();
    let mut loaded = None;
    Run::Clocked(Box::new(move || {
        let model = match &mut loaded {
            Some(model) => model,
            none => none.insert(candle::Model::load((*path).as_ref(), &device, dtype, PROMPT + NEW)?),
        };
        let (_, seconds) = model.generate(&ids, NEW)?;
        Ok(Duration::from_secs_f64(seconds))
    }))
}
