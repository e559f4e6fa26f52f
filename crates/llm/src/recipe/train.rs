//! `unsloth train`: from a model folder and data files to the folder of an adapter or a model.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Serialize;
use unsloth_core::Device;
use unsloth_train::{Batch, Document, StepMetrics, Trainer};

use super::{
    Method,
    config::{TrainConfig, invalid},
    max_seq_len,
    output::{JsonLines, OutputFolder},
};
use crate::{
    Error, Result,
    dataset::{Dataset, ReadOptions, Report, Sample},
    decoder::{Decoder, LoadOptions, Targets},
    export,
    packing::{Batches, Step},
    peft,
    tokenizer::Tokenizer,
};

/// What a run tells while it works.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Model and data are loaded; training begins.
    Prepared(Prepared),
    /// A step is done.
    Step(StepRecord),
}

/// A run before its first step.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// What was read.
    pub data: Report,
    /// The beginning of the first example; `None` for a model without a tokenizer.
    pub sample: Option<Sample>,
    /// Limit that examples were cut to, in tokens.
    pub max_seq_len: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Elements of all trained tensors.
    pub num_trained: usize,
    /// Tensors of the checkpoint that the model has no place for.
    pub unused_tensors: Vec<String>,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepRecord {
    /// The step, from 1.
    pub step: usize,
    /// Mean loss over all targets of the step.
    pub loss: f32,
    /// Learning rate.
    pub lr: f32,
    /// Norm of all gradients before clipping.
    pub grad_norm: f32,
    /// Tokens trained on so far, this step included.
    pub tokens: usize,
    /// Tokens of this step over its time.
    pub tokens_per_second: f64,
    /// Most bytes held at once so far, by the ledger of the device.
    pub peak_bytes: u64,
}

/// A run that is done.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Steps taken.
    pub steps: usize,
    /// Loss of the first step.
    pub first_loss: f32,
    /// Loss of the last step.
    pub last_loss: f32,
    /// Tokens trained on.
    pub tokens: usize,
    /// Time of all steps.
    pub elapsed: Duration,
    /// Most bytes held at once, by the ledger of the device.
    pub peak_bytes: u64,
    /// Folder of the adapter or the model.
    pub output: PathBuf,
}

/// Trains adapters or a whole model and writes what [`peft::save`] or [`export::save`] writes, the tokenizer's files and
/// `metrics.jsonl`.
///
/// # Errors
/// As [`TrainConfig::validate`]; [`Error::InvalidOption`] if a model would be written into its own folder; [`Error::Io`] if the output folder is not writable, found out before the model is loaded;
/// whatever loading model, adapter and data refuses; [`Error::Stopped`] for a step that is not finite, after what the step
/// before it left has been saved.
pub fn train(device: &Device, config: &TrainConfig, on_event: &mut dyn FnMut(Event)) -> Result<Summary> {
    config.validate()?;
    let output = OutputFolder::open(&config.output)?;
    if config.method != Method::Lora {
        output.check_apart(&config.model)?;
    }
    let model = prepare_model(device, config)?;
    let max_seq_len = max_seq_len(config.max_seq_len, &model);
    let options = ReadOptions {
        model: &config.model,
        vocab_size: model.config().vocab_size,
        max_seq_len,
        train_on: config.train_on,
    };
    let dataset = Dataset::read(&config.data, options)?;
    let tokenizer = Tokenizer::exists(&config.model).then(|| Tokenizer::load(&config.model)).transpose()?;
    let sample = tokenizer.map(|tokenizer| dataset.sample(&tokenizer)).transpose()?;
    let mut batches = Batches::new(&dataset, config.batch_options(max_seq_len))?;
    let total_steps = config.num_steps(&batches)?;
    let trainer = Trainer::new(model, config.trainer(total_steps))?;
    let num_trained = trainer.optimizer().parameters().map(|parameter| parameter.value().num_elements()).sum();
    let (data, unused_tensors) = (dataset.report(), trainer.model().unused_tensors().to_vec());
    on_event(Event::Prepared(Prepared { data, sample, max_seq_len, total_steps, num_trained, unused_tensors }));

    let metrics = JsonLines::create(output.path().join("metrics.jsonl"))?;
    let mut run = Run { device, trainer, metrics, on_event, records: Records::default() };
    let outcome = run.steps(&dataset, &mut batches, total_steps);
    let stopped_at = match &outcome {
        Err(Error::Train(unsloth_train::Error::NonFinite { step, .. })) => Some(*step),
        _ => None,
    };
    if outcome.is_ok() || stopped_at.is_some() {
        save(config.method, output.path(), run.trainer.model())?;
        output.copy_tokenizer(&config.model)?;
    }
    match (outcome, stopped_at) {
        (Err(Error::Train(source)), Some(step)) => {
            Err(Error::Stopped { last_good_step: step - 1, output: config.output.clone(), source: Box::new(source) })
        }
        (Err(error), _) => Err(error),
        (Ok(()), _) => Ok(run.records.summary(config.output.clone())),
    }
}

/// Writes what a run has trained.
fn save(method: Method, folder: &Path, model: &Decoder) -> Result<()> {
    match method {
        Method::Lora => peft::save(folder, model),
        Method::Full | Method::Scratch => export::save(folder, model),
    }
}

fn prepare_model(device: &Device, config: &TrainConfig) -> Result<Decoder> {
    let mut model = match config.method {
        Method::Lora => adapted_model(device, config)?,
        Method::Full => Decoder::load(&config.model, device, LoadOptions::trainable(config.dtype))?,
        Method::Scratch => Decoder::random(&config.model, device, config.dtype, config.seed)?,
    };
    model.set_checkpointing(config.checkpointing);
    Ok(model)
}

fn adapted_model(device: &Device, config: &TrainConfig) -> Result<Decoder> {
    let mut model = Decoder::load(&config.model, device, LoadOptions::frozen(config.dtype))?;
    let Some(folder) = &config.adapter else {
        let targets = config.targets.as_ref().unwrap_or(&Targets::AllLinear);
        model.add_adapters(&config.new_adapter(), targets, config.seed)?;
        return Ok(model);
    };
    let loaded = peft::load(folder, &mut model)?;
    let rule = |value: String| format!("{value}, as the adapter in `{}` has it", folder.display());
    if let Some(rank) = config.rank.filter(|&rank| rank != loaded.rank) {
        return invalid("rank", rank, &rule(loaded.rank.to_string()));
    }
    if let Some(alpha) = config.alpha.filter(|&alpha| alpha != loaded.alpha) {
        return invalid("alpha", alpha, &rule(loaded.alpha.to_string()));
    }
    if let Some(targets) = &config.targets {
        let selected = model.select(targets)?;
        if let Some((linear, _)) = model.linears().zip(selected).find(|(linear, on)| linear.adapter.is_some() != *on) {
            let differs =
                format!("the layers that the adapter in `{}` has; `{}` differs", folder.display(), linear.name);
            return invalid("targets", targets, &differs);
        }
    }
    Ok(model)
}

/// What the steps so far add up to.
#[derive(Clone, Copy, Debug, Default)]
struct Records {
    first: Option<StepRecord>,
    last: Option<StepRecord>,
    elapsed: Duration,
}

impl Records {
    fn summary(self, output: PathBuf) -> Summary {
        let loss = |record: Option<StepRecord>| record.map_or(f32::NAN, |record| record.loss);
        Summary {
            steps: self.last.map_or(0, |record| record.step),
            first_loss: loss(self.first),
            last_loss: loss(self.last),
            tokens: self.last.map_or(0, |record| record.tokens),
            elapsed: self.elapsed,
            peak_bytes: self.last.map_or(0, |record| record.peak_bytes),
            output,
        }
    }
}

struct Run<'a> {
    device: &'a Device,
    trainer: Trainer<Decoder>,
    metrics: JsonLines,
    on_event: &'a mut dyn FnMut(Event),
    records: Records,
}

impl Run<'_> {
    fn steps(&mut self, dataset: &Dataset, batches: &mut Batches, total_steps: usize) -> Result<()> {
        // The trainer hands out the metrics of a step while it works on the next one.
        let mut time_of_last = Duration::ZERO;
        for _ in 0..total_steps {
            let start = Instant::now();
            let micro_batches = self.micro_batches(dataset, batches.next_step())?;
            let metrics = self.trainer.step(&micro_batches)?;
            self.record(metrics, time_of_last)?;
            time_of_last = start.elapsed();
        }
        let metrics = self.trainer.finish()?;
        self.record(metrics, time_of_last)
    }

    fn micro_batches(&self, dataset: &Dataset, step: Step) -> Result<Vec<Batch>> {
        let batch = |documents: Vec<usize>| {
            let documents: Vec<Document<'_>> = documents.into_iter().map(|index| dataset.document(index)).collect();
            Ok(Batch::new(self.device, &documents)?)
        };
        step.into_iter().map(batch).collect()
    }

    fn record(&mut self, metrics: Option<StepMetrics>, time: Duration) -> Result<()> {
        let Some(metrics) = metrics else { return Ok(()) };
        let record = StepRecord {
            step: metrics.step,
            loss: metrics.loss,
            lr: metrics.learning_rate,
            grad_norm: metrics.grad_norm,
            tokens: self.records.last.map_or(0, |last| last.tokens) + metrics.num_tokens,
            // A clock may stand still between two readings; JSON has no infinity.
            tokens_per_second: metrics.num_tokens as f64 / time.as_secs_f64().max(1e-9),
            peak_bytes: self.device.usage().total_peak_bytes(),
        };
        self.records.first.get_or_insert(record);
        self.records.last = Some(record);
        self.records.elapsed += time;
        self.metrics.push(&record)?;
        (self.on_event)(Event::Step(record));
        Ok(())
    }
}
