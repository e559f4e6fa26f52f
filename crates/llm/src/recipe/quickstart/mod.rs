//! `unsloth quickstart`: a language model from nothing, and an adapter for it, within minutes and without any download.
//!
//! A grammar writes stories and questions about them; a tokenizer is trained on the stories, and a Llama from scratch; then an
//! adapter learns to answer the questions. How many held-out questions the model answers is counted before and after. Both
//! trainings are those of [`super::train`].

mod corpus;
mod draws;
mod exam;
mod grammar;
mod size;
mod tokenizer;
mod words;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::Instant,
};

use serde::Serialize;
use unsloth_core::{DType, Device};

use self::{corpus::Corpus, exam::Speech};
pub use self::{
    exam::{Answered, Score},
    size::{Size, TrainingSize},
};
use super::{AdapterSettings, Event, Method, Summary, TrainConfig, load_model, train};
use crate::{Error, Result, atomic, decoder::Decoder, sampler::Sampling};

/// Folders of a quickstart's output.
const BLUEPRINT: &str = "blueprint";
const MODEL: &str = "model";
const ADAPTER: &str = "adapter";
const DATA: &str = "data";

/// How the sample stories begin.
const BEGINNINGS: [&str; 3] = ["Once there was a girl", "It was a windy day.", "One day"];

/// How many held-out questions are shown as they were answered.
const NUM_SHOWN: usize = 5;

/// A quickstart.
#[derive(Clone, Debug, PartialEq)]
pub struct QuickstartConfig {
    /// Folder for everything that is made; made if it is not there. Files of an earlier quickstart in it are replaced.
    pub output: PathBuf,
    /// Of the stories, the weights, the order of the data and the sample stories.
    pub seed: u64,
    /// How much is made and learnt.
    pub size: Size,
}

impl QuickstartConfig {
    /// The settings that `unsloth quickstart` has without options.
    pub fn new(output: PathBuf) -> Self {
        Self { output, seed: 0, size: Size::FULL }
    }
}

/// What a quickstart tells while it works, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum QuickstartEvent {
    /// Stories, questions and the tokenizer are written.
    Written(Written),
    /// The model is trained.
    Pretraining(Event),
    /// The model wrote stories of its own.
    Stories(Vec<String>),
    /// The model was asked before it had learnt to answer.
    Before(Examined),
    /// The adapter is trained.
    FineTuning(Event),
    /// The model with its adapter was asked the same questions.
    After(Examined),
}

/// What was made to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Stories of the corpus.
    pub num_stories: usize,
    /// Chats about stories to learn from.
    pub num_lessons: usize,
    /// Questions to be asked; their stories are about people that never meet in the others.
    pub num_held_out: usize,
    /// Tokens of the tokenizer.
    pub vocab_size: usize,
    /// The first story.
    pub sample: String,
    /// What always filling in the most frequent word of a kind of question gets right of the held-out questions.
    pub majority: Score,
}

/// An examination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Examined {
    /// How many answers were right.
    pub score: Score,
    /// The first questions with the answers.
    pub answered: Vec<Answered>,
}

/// A quickstart that is done; `report.json` in its folder.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuickstartReport {
    /// Folder with `model`, `adapter` and `data`.
    pub output: PathBuf,
    /// Weights of the model.
    pub num_weights: usize,
    /// Elements of the adapter.
    pub num_adapter_weights: usize,
    /// Training from scratch.
    pub pretraining: Training,
    /// Training of the adapter.
    pub fine_tuning: Training,
    /// Stories by the model.
    pub stories: Vec<String>,
    /// See [`Written::majority`].
    pub majority: Score,
    /// Without the adapter.
    pub before: Examined,
    /// With the adapter.
    pub after: Examined,
    /// Most bytes that the device held at once.
    pub peak_bytes: u64,
    /// From the first story to the last answer.
    pub seconds: f64,
}

/// One of the two trainings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Training {
    /// Optimiser steps.
    pub steps: usize,
    /// Loss of the first step.
    pub first_loss: f32,
    /// Loss of the last step.
    pub last_loss: f32,
    /// Tokens trained on.
    pub tokens: usize,
    /// Tokens over the time of all steps.
    pub tokens_per_second: f64,
    /// Time of all steps.
    pub seconds: f64,
}

impl From<&Summary> for Training {
    fn from(summary: &Summary) -> Self {
        let seconds = summary.elapsed.as_secs_f64();
        Self {
            steps: summary.steps,
            first_loss: summary.first_loss,
            last_loss: summary.last_loss,
            tokens: summary.tokens,
            tokens_per_second: summary.tokens as f64 / seconds.max(1e-9),
            seconds,
        }
    }
}

/// Makes everything and writes it into the output folder: `data/` (`stories.jsonl`, `questions.jsonl`, `held-out.jsonl`),
/// `blueprint/` (configuration and tokenizer of the model), `model/`, `adapter/` and `report.json`.
///
/// # Errors
/// As [`Size::validate`]; [`Error::Io`]; whatever training, loading and generation refuse.
pub fn quickstart(
    device: &Device,
    config: &QuickstartConfig,
    on_event: &mut dyn FnMut(QuickstartEvent),
) -> Result<QuickstartReport> {
    let start = Instant::now();
    let QuickstartConfig { output, seed, size } = config;
    size.validate()?;
    fs::create_dir_all(output).map_err(Error::io("create", output))?;
    let path = |name: &str| output.join(name);
    // A few minutes need no way to go on later: a signal ends them.
    let never = AtomicBool::new(false);

    let corpus = Corpus::draw(*seed, size);
    corpus.write(&path(DATA))?;
    let vocab_size = tokenizer::write_blueprint(&path(BLUEPRINT), &corpus.stories, size)?;
    let majority = exam::majority(&corpus.lessons, &corpus.held_out);
    on_event(QuickstartEvent::Written(Written {
        num_stories: corpus.stories.len(),
        num_lessons: corpus.lessons.len(),
        num_held_out: corpus.held_out.len(),
        vocab_size,
        sample: corpus.stories[0].clone(),
        majority: majority.clone(),
    }));

    let mut num_weights = 0;
    let mut on_pretraining = |event| {
        count_trained(&event, &mut num_weights);
        on_event(QuickstartEvent::Pretraining(event));
    };
    let pretraining = train(device, &pretraining(config), &mut on_pretraining, &never)?;
    let speech = Speech::load(&path(MODEL))?;
    let examine = |adapter: Option<&Path>| {
        let model = load_model(device, &path(MODEL), adapter, DType::F32)?;
        let (score, answered) = exam::examine(&model, &speech, &corpus.held_out, NUM_SHOWN)?;
        Ok::<_, Error>((model, Examined { score, answered }))
    };
    let (model, before) = examine(None)?;
    let stories = tell(&model, &speech, *seed)?;
    drop(model);
    on_event(QuickstartEvent::Stories(stories.clone()));
    on_event(QuickstartEvent::Before(before.clone()));

    let mut num_adapter_weights = 0;
    let mut on_fine_tuning = |event| {
        count_trained(&event, &mut num_adapter_weights);
        on_event(QuickstartEvent::FineTuning(event));
    };
    let fine_tuning = train(device, &fine_tuning(config), &mut on_fine_tuning, &never)?;
    let (_, after) = examine(Some(&path(ADAPTER)))?;
    on_event(QuickstartEvent::After(after.clone()));

    let report = QuickstartReport {
        output: output.clone(),
        num_weights,
        num_adapter_weights,
        pretraining: Training::from(&pretraining),
        fine_tuning: Training::from(&fine_tuning),
        stories,
        majority,
        before,
        after,
        peak_bytes: device.usage().total_peak_bytes(),
        seconds: start.elapsed().as_secs_f64(),
    };
    atomic::write_json(&path("report.json"), &report)?;
    Ok(report)
}

fn count_trained(event: &Event, count: &mut usize) {
    if let Event::Prepared(prepared) = event {
        *count = prepared.num_trained;
    }
}

fn pretraining(config: &QuickstartConfig) -> TrainConfig {
    let path = |name: &str| config.output.join(name);
    TrainConfig {
        method: Method::Scratch,
        ..config.size.pretraining.config(config, [path(BLUEPRINT), path(DATA).join(corpus::STORIES), path(MODEL)])
    }
}

fn fine_tuning(config: &QuickstartConfig) -> TrainConfig {
    let path = |name: &str| config.output.join(name);
    TrainConfig {
        adapters: AdapterSettings {
            rank: Some(config.size.rank),
            alpha: Some(2.0 * config.size.rank as f32),
            ..AdapterSettings::default()
        },
        ..config.size.fine_tuning.config(config, [path(MODEL), path(DATA).join(corpus::QUESTIONS), path(ADAPTER)])
    }
}

fn tell(model: &Decoder, speech: &Speech, seed: u64) -> Result<Vec<String>> {
    let sampling = Sampling { temperature: 0.5, ..Sampling::GREEDY };
    let stories = BEGINNINGS.iter().zip(seed..);
    stories.map(|(beginning, seed)| speech.story(model, beginning, Sampling { seed, ..sampling })).collect()
}
