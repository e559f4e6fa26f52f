//! A whole LoRA step: forward, backward, clipping, AdamW.

use std::{cell::RefCell, path::Path, rc::Rc};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use unsloth_rs::{
    DType, Device,
    cpu::{CpuBackend, CpuOptions, Isa},
    llm::decoder::Decoder,
    train::Checkpointing,
};

use super::{Selection, each};
use crate::{
    candle,
    case::{Case, Context, Prepared, Run},
    models::ModelShape,
    training::{Folder, FolderPath, Options, random_batch, random_ids, trainer},
};

const OP: &str = "train_step";
const RANK: usize = 16;
/// Longest sequence of models that are not the smallest: one shows how cost grows.
const LONGEST_OF_OTHERS: usize = 2048;
/// Tokens that the first step is checked with at most. Operators are checked at the lengths they are timed at.
const CHECKED: usize = 2048;
/// Longest sequence that candle is timed with: it keeps the scores of every layer, and takes tens of seconds in bf16.
const LONGEST_OF_CANDLE: usize = 1024;
/// How far loss and gradient norm of the first step may be from those of the same step in f32 on the processor's portable path:
/// relative, by the storage type.
const TOLERANCE: [(DType, f32); 3] = [(DType::F32, 1e-4), (DType::F16, 1e-2), (DType::BF16, 5e-2)];

/// Steps over the lengths without checkpointing, and one with it. Of a given folder, or of two layers of the smallest models.
pub fn cases(selection: &Selection) -> Vec<Case> {
    let models = if selection.folder.is_some() { &selection.models[..1] } else { selection.small_models() };
    each(models, &selection.dtypes, |model, dtype| {
        let step = |seq_len, checkpointing| case(selection, model, (seq_len, dtype), checkpointing);
        let lens = selection.lens_of(&model, &selection.step_lens, LONGEST_OF_OTHERS);
        let mut cases: Vec<Case> = lens.iter().map(|&seq_len| step(seq_len, Checkpointing::None)).collect();
        let middle = lens.get(lens.len() / 2);
        cases.extend(middle.map(|&seq_len| step(seq_len, Checkpointing::Every(1))));
        cases
    })
}

fn case(
    selection: &Selection,
    model: ModelShape,
    (seq_len, dtype): (usize, DType),
    checkpointing: Checkpointing,
) -> Case {
    let folder = Folder::of(selection.folder.as_deref(), model);
    let shape = format!("1 x {seq_len}, rank {RANK}, checkpointing {checkpointing}");
    let name = folder.name();
    let options = Options { dtype, rank: RANK, checkpointing };
    let with_candle =
        selection.all_calls && seq_len <= LONGEST_OF_CANDLE && options.checkpointing == Checkpointing::None;
    let prepare = move |at: &Context<'_>| prepare(at, &folder, (seq_len, with_candle), &options);
    Case::new((OP, "lora"), (&name, shape), dtype, prepare).with_tokens(seq_len)
}

fn prepare(
    context: &Context<'_>,
    folder: &Folder,
    (seq_len, with_candle): (usize, bool),
    options: &Options,
) -> Result<Prepared> {
    let path = folder.written()?;
    let mut training = trainer(path.as_ref(), context.device, options.clone())?;
    let vocab_size = training.model().config().vocab_size;
    let batch = [random_batch(context.device, vocab_size, (1, seq_len))?];
    let device = context.device.clone();
    let path = Rc::new(path);
    let (checked, checked_options) = (Rc::clone(&path), options.clone());
    let check = move || {
        let tokens = seq_len.min(CHECKED);
        let reference = reference((*checked).as_ref(), tokens, &checked_options)?;
        let actual = first_step((*checked).as_ref(), &device, tokens, &checked_options)?;
        let tolerance =
            TOLERANCE.iter().find(|(dtype, _)| *dtype == checked_options.dtype).map_or(0.0, |(_, limit)| *limit);
        for (name, actual, reference) in [("loss", actual[0], reference[0]), ("grad_norm", actual[1], reference[1])] {
            let is_near = (actual - reference).abs() <= tolerance * reference.abs();
            ensure!(is_near, "{OP}: {name} of the first step is {actual}, in f32 on the portable path {reference}");
        }
        Ok(())
    };
    let torch = json!({ "op": OP, "part": "lora", "folder": (*path).as_ref().display().to_string(), "seq_len": seq_len,
        "rank": RANK, "checkpointing": options.checkpointing.keeps_inputs(), "dtype": options.dtype.name() });
    let fits = with_candle && context.with_candle && candle::has(training.model().config());
    let candle =
        fits.then(|| peer(Rc::clone(&path), context.device, training.model(), seq_len, options.dtype)).transpose()?;
    let keep = path;
    let run = Run::call(move || {
        let _folder = &keep;
        training.step(&batch)
    });
    Ok(Prepared::new(check, run).with_candle(candle).with_torch(torch))
}

/// candle's own step. Its copy of the weights is there from the first run on.
fn peer(path: Rc<FolderPath>, device: &Device, model: &Decoder, seq_len: usize, dtype: DType) -> Result<Run> {
    let (start, device) = (candle::start_of(model)?, device.clone());
    let ids = random_ids(model.config().vocab_size, seq_len)?.into_iter().map(i32::cast_unsigned).collect::<Vec<_>>();
    let mut loaded = None;
    Ok(Run::call(move || -> Result<()> {
        let training = match &mut loaded {
            Some(training) => training,
            none => none.insert(candle::Training::new((*path).as_ref(), &device, dtype, &start, ids.clone())?),
        };
        training.step().map(drop)
    }))
}

thread_local! {
    /// The reference of the folder and length that were asked for last: several types and policies share it.
    static REFERENCE: RefCell<Option<(String, usize, [f32; 2])>> = const { RefCell::new(None) };
}

/// Loss and gradient norm of the first step, in f32, by plain instructions.
fn reference(folder: &Path, seq_len: usize, options: &Options) -> Result<[f32; 2]> {
    let config = std::fs::read_to_string(folder.join("config.json"))?;
    let known = REFERENCE.with_borrow(|known| {
        known.as_ref().filter(|known| known.0 == config && known.1 == seq_len).map(|known| known.2)
    });
    if let Some(known) = known {
        return Ok(known);
    }
    let device = Device::new(CpuBackend::new(CpuOptions { isa: Some(Isa::Portable), ..CpuOptions::default() })?);
    let options = Options { dtype: DType::F32, checkpointing: Checkpointing::None, ..*options };
    let found = first_step(folder, &device, seq_len, &options)?;
    REFERENCE.set(Some((config, seq_len, found)));
    Ok(found)
}

fn first_step(folder: &Path, device: &Device, seq_len: usize, options: &Options) -> Result<[f32; 2]> {
    let mut training = trainer(folder, device, options.clone())?;
    let batch = [random_batch(device, training.model().config().vocab_size, (1, seq_len))?];
    training.step(&batch)?;
    let metrics = training.finish()?.context("a step has metrics")?;
    Ok([metrics.loss, metrics.grad_norm])
}
