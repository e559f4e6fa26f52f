//! `unsloth train`: from a model folder and data files to the folder of an adapter or a model.

mod data;
mod event;
mod run;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use unsloth_core::Device;
use unsloth_train::{Model, NanTrace, Paging, Trainer};

pub use self::event::{End, EvalReport, Event, Prepared, Resumed, Summary};
use self::{data::Data, run::Run};
use super::{
    Best, Damage, EvalRecord, Method, Offloaded, Planner, RunError, Start, TrainOptions,
    checkpoint::{Checkpoints, Progress, Saved, State, VERSION},
    config::TrainConfig,
    metrics::Metrics,
    options::Difference,
    output::OutputFolder,
    plan::{load_shapes, shapes_only},
};
use crate::{
    Error, Result,
    config::DecoderConfig,
    decoder::{Decoder, LoadOptions},
    export, hub,
    packing::{Batches, Position},
    peft, weights,
};

/// Options that a resumed run may have otherwise: they change nothing of what it computes. Model and data files are compared
/// by what is in them.
const MAY_CHANGE: [&str; 13] = [
    "model",
    "output",
    "data",
    "save_every",
    "keep_last",
    "keep_best",
    "eval_every",
    "eval_data",
    "checkpointing",
    "offload",
    "offload_optimizer",
    "memory",
    "trace_nan",
];

/// Trains adapters or a whole model and writes, into the output folder, what [`peft::save`] or [`export::save`] writes, the
/// tokenizer's files, `config.toml` (the options), `metrics.jsonl`, `loss.svg` and, where they are asked for, checkpoints.
///
/// When `stop` becomes true the run ends after the step in flight: a checkpoint and what has been learnt so far are saved, and a
/// run with [`Start::Resume`] goes on as if it had not been interrupted, with the same bits.
///
/// # Errors
/// As [`TrainConfig::validate`]; [`Error::Io`] if the output folder is not writable and [`RunError::HoldsRun`] if it holds
/// another run, found out before the model is loaded; whatever loading model, adapter and data refuses; [`Error::Stopped`] for a
/// step that is not finite, after what the step before it left has been saved; [`RunError::NotSaved`]; [`RunError::OverBudget`], before
/// the model is loaded. With
/// [`Start::Resume`], [`RunError::NoCheckpoint`], [`RunError::AllDamaged`], [`RunError::Checkpoint`] and [`RunError::Changed`].
pub fn train(
    device: &Device,
    config: &TrainConfig,
    on_event: &mut dyn FnMut(Event),
    stop: &AtomicBool,
) -> Result<Summary> {
    config.validate()?;
    let before = device.set_budget(config.memory_bytes);
    let summary = train_within(device, config, on_event, stop);
    device.set_budget(before);
    // Whoever goes on with the device or this process has other sizes to ask for.
    device.trim()?;
    summary
}

/// [`train`] under the device's budget.
fn train_within(
    device: &Device,
    config: &TrainConfig,
    on_event: &mut dyn FnMut(Event),
    stop: &AtomicBool,
) -> Result<Summary> {
    let output = OutputFolder::open(config)?;
    let options = TrainOptions::of(config, &device.name());
    let saved = match config.start {
        Start::Resume => Some(find_checkpoint(config, &options)?),
        Start::New | Start::Overwrite => None,
    };
    let config = &TrainConfig { model: hub::folder(&config.model, config.method.parts())?, ..config.clone() };
    let model_sha256 = weights::identity(&config.model, config.method == Method::Scratch)?;
    if let Some(saved) = &saved {
        require_same_model(saved, &model_sha256)?;
    }
    let data = Data::read(config, &DecoderConfig::load(&config.model)?)?;
    let mut batches = Batches::new(&data.train, data.batching)?;
    let total_steps = config.num_steps(&batches)?;
    let shape = data.largest_micro_batch(batches.clone(), total_steps);
    let config = &fitted(device, config, shape, on_event)?;
    let options = TrainOptions { checkpointing: Some(config.checkpointing.to_string()), ..options };
    let (mut trainer, trace) = begin_training(device, config, total_steps)?;
    if let Some(saved) = &saved {
        saved.restore(&mut trainer)?;
        batches.skip(saved.state.step);
        require_same_data(saved, &data, (batches.position(), total_steps))?;
    }
    on_event(Event::Prepared(prepared(&data, &trainer, total_steps)));
    let progress = saved.as_ref().map_or_else(Progress::default, |saved| saved.state.progress);
    if stop.load(Ordering::Relaxed) {
        return summary(config, &trainer, (progress, None), (None, End::Stopped(None)));
    }
    let metrics = begin(config, &output, saved.as_ref(), on_event)?;
    output.write_config(&options)?;
    let run = Run {
        config,
        options: &options,
        output: &output,
        model_sha256: &model_sha256,
        data: &data,
        batches,
        total_steps,
        trainer,
        trace,
        metrics,
        progress,
        on_event,
        stop,
    };
    finish(run)
}

/// The trainer before its first step, and what looks at its steps if that is wanted.
fn begin_training(
    device: &Device,
    config: &TrainConfig,
    total_steps: usize,
) -> Result<(Trainer<Decoder>, Option<Arc<NanTrace>>)> {
    let trainer = |device| prepare_trainer(prepare_model(device, config, Loading::Weights)?, config, total_steps);
    if !config.trace_nan {
        return Ok((trainer(device)?, None));
    }
    let (trace, device) = NanTrace::of(device);
    let mut trainer = trainer(&device)?;
    trace.name_weights(trainer.model().named_weights());
    trainer.set_trace(trace.clone());
    Ok((trainer, Some(trace)))
}

/// The run with a checkpointing policy under which it stays within its limit on memory, if it has one.
fn fitted(
    device: &Device,
    config: &TrainConfig,
    (seq_len, batch_size): (usize, usize),
    on_event: &mut dyn FnMut(Event),
) -> Result<TrainConfig> {
    let Some(budget_bytes) = config.memory_bytes else { return Ok(config.clone()) };
    let largest = TrainConfig { max_seq_len: Some(seq_len), batch_size, ..config.clone() };
    let fitted = Planner::of(device).fit(&largest, budget_bytes)?;
    let checkpointing = fitted.checkpointing.clone().into();
    on_event(Event::Fitted(Box::new(fitted)));
    Ok(TrainConfig { checkpointing, ..config.clone() })
}

/// The newest whole checkpoint, if it is of a run with these options.
fn find_checkpoint(config: &TrainConfig, options: &TrainOptions) -> Result<Saved> {
    let saved = Checkpoints::new(&config.output, config.keep_last, None).newest()?;
    match options.difference(&saved.options, &MAY_CHANGE)? {
        None => Ok(saved),
        Some(Difference { option, own: now, other }) => {
            Err(RunError::Changed { option, now, saved: other, checkpoint: saved.path }.into())
        }
    }
}

/// Whether the run goes on with the model that it began with, wherever that is now.
fn require_same_model(saved: &Saved, model_sha256: &str) -> Result<()> {
    if saved.state.model_sha256 == model_sha256 {
        return Ok(());
    }
    let shown = |sum: &str| format!("configuration and weights with SHA-256 {}..", sum.get(..16).unwrap_or(sum));
    let (now, before) = (shown(model_sha256), shown(&saved.state.model_sha256));
    let (option, checkpoint) = ("model".to_owned(), saved.path.clone());
    Err(RunError::Changed { option, now, saved: before, checkpoint }.into())
}

/// Whether the run goes on with the documents that it began with, where it was in them.
fn require_same_data(saved: &Saved, data: &Data, place: (Position, usize)) -> Result<()> {
    let State { data_sha256, position, total_steps, .. } = &saved.state;
    let changed = |option: &str, now: String, before: String| {
        let (option, checkpoint) = (option.to_owned(), saved.path.clone());
        Err(RunError::Changed { option, now, saved: before, checkpoint }.into())
    };
    let shown = |sum: &str| format!("examples with SHA-256 {}..", sum.get(..16).unwrap_or(sum));
    if *data_sha256 != data.sha256 {
        return changed("data", shown(&data.sha256), shown(data_sha256));
    }
    if (*position, *total_steps) != place {
        let shown = |(position, steps): (Position, usize)| {
            format!("micro-batch {} of epoch {}, {steps} steps in all", position.micro_batch, position.epoch)
        };
        return changed("place in the data", shown(place), shown((*position, *total_steps)));
    }
    Ok(())
}

fn prepared(data: &Data, trainer: &Trainer<Decoder>, total_steps: usize) -> Prepared {
    Prepared {
        data: data.train.report(),
        eval: data.eval.as_ref().map(|eval| eval.report),
        sample: data.sample.clone(),
        max_seq_len: data.batching.max_seq_len,
        total_steps,
        num_trained: trainer.optimizer().parameters().map(|parameter| parameter.value().num_elements()).sum(),
        unused_tensors: trainer.model().unused_tensors().to_vec(),
    }
}

/// Makes the folder ready for the next step: empty, or as it was behind the step of the checkpoint. The metrics know the best evaluation
/// before it, where that is kept.
fn begin(
    config: &TrainConfig,
    output: &OutputFolder,
    saved: Option<&Saved>,
    on_event: &mut dyn FnMut(Event),
) -> Result<Metrics> {
    let Some(saved) = saved else {
        output.clear()?;
        return Metrics::create(output.metrics());
    };
    let mut metrics = Metrics::resume(output.metrics(), saved.state.step)?;
    // The metrics know of an evaluation behind the checkpoint's own step, the checkpoint of those before it.
    let known = [metrics.best, saved.state.best].into_iter().flatten().max_by_key(|best| best.step);
    let known = known.filter(|_| config.keep_best);
    let damaged_best = Checkpoints::new(output.path(), config.keep_last, known).damage_of_best();
    metrics.best = known.filter(|_| damaged_best.is_none());
    on_event(Event::Resumed(Resumed {
        step: saved.state.step,
        checkpoint: saved.path.clone(),
        damaged: saved.damaged.clone(),
        damaged_best,
        num_missing_records: saved.state.step - metrics.losses.len(),
        other_version: Some(saved.state.version.clone()).filter(|version| version != VERSION),
    }));
    Ok(metrics)
}

/// Trains, and writes what there is at the end.
fn finish(mut run: Run<'_>) -> Result<Summary> {
    let outcome = run.steps();
    let stopped_at = match &outcome {
        Err(Error::Train(unsloth_train::Error::NonFinite { step, .. })) => Some(*step),
        _ => None,
    };
    let damage = if matches!(outcome, Ok(End::Done)) { give_best(&run)? } else { None };
    if outcome.is_ok() || stopped_at.is_some() {
        save(run.config.method, run.output.path(), run.trainer.model())?;
        run.output.copy_tokenizer(&run.config.model)?;
        run.output.draw_curve(&run.metrics)?;
    }
    if let (Some(damage), Some(Best { step, .. })) = (damage, run.metrics.best) {
        return Err(RunError::BestDamaged { step, damage }.into());
    }
    match (outcome, stopped_at) {
        (Err(Error::Train(source)), Some(step)) => {
            let output = run.config.output.clone();
            Err(Error::Stopped { last_good_step: step - 1, output, source: Box::new(source) })
        }
        (outcome, _) => {
            let evaluation = run.metrics.eval_losses.last().map(|&(step, loss)| EvalRecord::new(step, loss));
            let best = run.metrics.best.map(|best| (best, run.checkpoints().path(best.step)));
            outcome.and_then(|end| summary(run.config, &run.trainer, (run.progress, best), (evaluation, end)))
        }
    }
}

/// Puts the best model in the place of the last one, where that is kept; what is wrong with its checkpoint if that is damaged, and the
/// last one stays.
fn give_best(run: &Run<'_>) -> Result<Option<Damage>> {
    if run.metrics.best.is_none_or(|best| best.step == run.trainer.num_steps()) {
        return Ok(None);
    }
    let damage = run.checkpoints().damage_of_best();
    if damage.is_none() {
        run.checkpoints().put_best(run.trainer.model())?;
    }
    Ok(damage)
}

fn summary(
    config: &TrainConfig,
    trainer: &Trainer<Decoder>,
    (progress, best): (Progress, Option<(Best, PathBuf)>),
    (evaluation, end): (Option<EvalRecord>, End),
) -> Result<Summary> {
    let device = trainer.model().device();
    Ok(Summary {
        steps: trainer.num_steps(),
        first_loss: progress.first_loss,
        last_loss: progress.last_loss,
        evaluation,
        best,
        tokens: progress.tokens,
        elapsed: Duration::from_secs_f64(progress.seconds),
        peak_bytes: device.usage().total_peak_bytes(),
        reserved_bytes: device.pool_usage()?.reserved_bytes,
        offloaded: Offloaded::of(trainer).total(),
        output: config.output.clone(),
        end,
    })
}

/// Writes what a run has trained.
fn save(method: Method, folder: &Path, model: &Decoder) -> Result<()> {
    match method {
        Method::Lora => peft::save(folder, model),
        Method::Full | Method::Scratch => export::save(folder, model),
    }
}

/// Where the contents of a model come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loading {
    /// The model's folder, or random numbers.
    Weights,
    /// Nowhere: the device does not look at them.
    Shapes,
}

impl Loading {
    fn load(self, device: &Device, config: &TrainConfig, options: LoadOptions) -> Result<Decoder> {
        match self {
            Loading::Weights => Decoder::load(&config.model, device, options),
            Loading::Shapes => load_shapes(&config.model, device, options),
        }
    }

    fn random(self, device: &Device, config: &TrainConfig, options: LoadOptions) -> Result<Decoder> {
        match self {
            Loading::Weights => Decoder::random(&config.model, device, options, config.seed),
            Loading::Shapes => shapes_only(&config.model, device, options),
        }
    }
}

/// The model with what is trained of it, as the run has it.
pub(super) fn prepare_model(device: &Device, config: &TrainConfig, loading: Loading) -> Result<Decoder> {
    let trained = LoadOptions { precision: config.precision()?, trainable: true };
    let mut model = match config.method {
        Method::Lora => adapted_model(device, config, loading)?,
        Method::Full => loading.load(device, config, trained)?,
        Method::Scratch => loading.random(device, config, trained)?,
    };
    model.set_checkpointing(config.checkpointing.given()?.clone())?;
    model.set_mlp_tile(config.mlp_tile)?;
    model.set_offload(config.offload.open(device, &config.output)?);
    Ok(model)
}

/// The trainer of a model that [`prepare_model`] gave.
pub(super) fn prepare_trainer(model: Decoder, config: &TrainConfig, total_steps: usize) -> Result<Trainer<Decoder>> {
    let store = config.offload_optimizer.open(model.device(), &config.output)?;
    Ok(Trainer::with_paging(model, config.trainer(total_steps)?, store.map(Paging::new))?)
}

fn adapted_model(device: &Device, config: &TrainConfig, loading: Loading) -> Result<Decoder> {
    let mut model = loading.load(device, config, LoadOptions { precision: config.precision()?, trainable: false })?;
    let Some(folder) = &config.adapter else {
        model.add_adapters(&config.adapters.new_adapter(), config.seed)?;
        return Ok(model);
    };
    let loaded = peft::load(folder, &mut model)?;
    config.adapters.check_loaded(&model, &loaded, folder)?;
    // What is dropped in training is no part of what the adapter computes: it may be chosen anew.
    if let Some(dropout) = config.adapters.dropout {
        model.set_dropout(dropout)?;
    }
    Ok(model)
}
