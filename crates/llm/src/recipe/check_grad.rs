//! `unsloth check-grad`: every gradient of a checkpoint and a batch, against a device that computes in f64 and against central
//! differences there.

use std::path::PathBuf;

use unsloth_autograd::{GradStore, Parameter, Tape};
use unsloth_core::{DType, Device, Result as CoreResult, Tensor, ops::cross_entropy::LossSpec, rng::Philox};
use unsloth_train::{Batch, Document, Model};

use super::config::invalid;
use crate::{
    Error, Result,
    dataset::{Dataset, ReadOptions},
    decoder::{Decoder, LoadOptions},
    hub::{self, Parts},
    packing::at_least,
    peft,
};

/// Length of the step along a direction of length 1. The loss is known to about 1e-15 of itself, so the quotient to 1e-11, and
/// what its third derivative adds is of the order of 1e-8 times that.
const STEP: f64 = 1e-4;
/// Random directions for each parameter, besides that of its gradient.
const NUM_DIRECTIONS: u32 = 2;
/// Streams of other purposes have other ids: "grad" in ASCII.
const STREAM: u32 = 0x6772_6164;

/// A device whose tensors are kept in f64, and how to reach what an f32 cannot say.
#[derive(Clone, Debug)]
pub struct Reference {
    /// The device; to everyone else its tensors are f32.
    pub device: Device,
    /// The elements of one of its tensors.
    pub values: fn(&Tensor) -> CoreResult<Vec<f64>>,
    /// Overwrites them.
    pub set_values: fn(&mut Tensor, &[f64]) -> CoreResult<()>,
}

/// A check of gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckGradConfig {
    /// Folder with the model as Hugging Face has it, or its name there ([`hub`]).
    pub model: PathBuf,
    /// Folder of an adapter: what it trains is checked. Without, every weight is.
    pub adapter: Option<PathBuf>,
    /// JSONL files whose first examples are the batch. Without any it is of random ids.
    pub data: Vec<PathBuf>,
    /// Tokens of the batch, 2 or more.
    pub num_tokens: usize,
    /// Of random ids and directions.
    pub seed: u64,
    /// Largest difference between the device's gradient and that in f64, relative to the largest element; positive.
    pub tolerance: f64,
    /// Largest difference between the gradient in f64 and a central difference, relative to what a gradient of that length has
    /// along the direction; positive.
    pub numeric_tolerance: f64,
}

impl CheckGradConfig {
    /// The settings that `unsloth check-grad` has without options.
    pub fn new(model: PathBuf) -> Self {
        Self {
            model,
            adapter: None,
            data: Vec::new(),
            num_tokens: 32,
            seed: 0,
            tolerance: 1e-3,
            numeric_tolerance: 1e-4,
        }
    }

    /// # Errors
    /// [`Error::InvalidOption`], naming the field.
    pub fn validate(&self) -> Result<()> {
        at_least("tokens", self.num_tokens, 2)?;
        for (field, value) in [("tolerance", self.tolerance), ("numeric_tolerance", self.numeric_tolerance)] {
            if !(value > 0.0 && value.is_finite()) {
                return invalid(field, value, "above 0 and finite");
            }
        }
        Ok(())
    }
}

/// What was found about one parameter.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CheckedGradient {
    /// Its name in the model.
    pub name: String,
    /// Its elements.
    pub num_elements: usize,
    /// Largest element of its gradient in f64.
    pub largest: f64,
    /// Largest difference of an element on the device, relative to `largest`.
    pub difference: f64,
    /// Where that element is, row-major.
    pub index: usize,
    /// Largest difference of a central difference, relative to what a gradient of that length has along the direction. `None` for
    /// the matrices of layers with trained lengths (DoRA), whose gradient takes a length that they change for a constant.
    pub numeric_difference: Option<f64>,
}

/// What was found about all of them.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct GradientReport {
    /// Loss of the batch on the device.
    pub loss: f64,
    /// Loss of the batch in f64.
    pub exact_loss: f64,
    /// Targets of the batch.
    pub num_targets: usize,
    /// Every parameter, the worst first: by the larger of its two differences over their tolerances.
    pub gradients: Vec<CheckedGradient>,
    /// Those that are beyond a tolerance; they come first.
    pub num_wrong: usize,
}

/// Computes the gradient of the mean loss of a batch on `device` and on `reference`, compares them element by element, and holds
/// the latter to central differences of the loss in f64: for each parameter along its gradient, and along random directions in
/// which every element takes part. Activations are f32 on `device`; nothing is dropped. `on_checked` is told the number of
/// parameters that are done, and of all.
///
/// # Errors
/// As [`CheckGradConfig::validate`]; whatever loading model, adapter and data refuses; [`Error::NonFiniteLoss`]. That a gradient is
/// wrong is no error, but part of the report.
pub fn check_grad(
    device: &Device,
    reference: &Reference,
    config: &CheckGradConfig,
    on_checked: &mut dyn FnMut(usize, usize),
) -> Result<GradientReport> {
    config.validate()?;
    let config = &CheckGradConfig { model: hub::folder(&config.model, Parts::All)?, ..config.clone() };
    let (model, exact) = (load(device, config)?, load(&reference.device, config)?);
    let documents = documents(config, &model)?;
    let (loss, gradients) = pass(&model, &documents)?;
    let (exact_loss, exact_gradients) = pass(&exact, &documents)?;
    let loss = f64::from(loss.to_f32_vec()?[0]);
    let exact_loss = (reference.values)(&exact_loss)?[0];
    let batch = batch(&exact, &documents)?;
    if !loss.is_finite() || !exact_loss.is_finite() {
        return Err(Error::NonFiniteLoss { num_targets: batch.num_targets, loss });
    }
    let parameters = (model.parameters(), exact.parameters());
    let adapters = model.linears().filter_map(|linear| linear.adapter.as_ref());
    let with_lengths = adapters.filter(|adapter| adapter.magnitude.is_some());
    let constant: Vec<_> = with_lengths.flat_map(|adapter| [adapter.lora_a.id(), adapter.lora_b.id()]).collect();
    let mut checked = Vec::with_capacity(parameters.0.len());
    // Along a parameter that the loss hardly feels, rounding is all there is to see.
    let mut exact_values = Vec::with_capacity(parameters.1.len());
    for parameter in &parameters.1 {
        let gradient = exact_gradients.get(parameter).map_or_else(|| Ok(Vec::new()), |g| (reference.values)(g))?;
        exact_values.push(gradient);
    }
    let noise = NOISE * exact_values.iter().flatten().fold(0.0f64, |most, value| most.max(value.abs()));
    for (index, (own, exact_gradient)) in parameters.0.iter().zip(&exact_values).enumerate() {
        let gradient = gradients.get(own).map_or_else(|| Ok(Vec::new()), Tensor::to_f32_vec)?;
        let mut found = compare(own.name(), &gradient, exact_gradient, noise);
        if !constant.contains(&own.id()) {
            let numeric = Numeric { reference, model: &exact, batch: &batch, parameter: &parameters.1[index] };
            found.numeric_difference = Some(numeric.check(exact_gradient, (config.seed, index as u32), noise)?);
        }
        checked.push(found);
        on_checked(index + 1, parameters.0.len());
    }
    Ok(report(config, checked, (loss, exact_loss, batch.num_targets)))
}

/// Differences are relative to no less than this share of the largest gradient of the model.
const NOISE: f64 = 1e-5;

fn report(
    config: &CheckGradConfig,
    mut gradients: Vec<CheckedGradient>,
    (loss, exact_loss, num_targets): (f64, f64, usize),
) -> GradientReport {
    let excess = |found: &CheckedGradient| {
        let numeric = found.numeric_difference.unwrap_or(0.0);
        let excess = (found.difference / config.tolerance).max(numeric / config.numeric_tolerance);
        // What is not a number is worse than any number.
        if excess.is_nan() { f64::INFINITY } else { excess }
    };
    gradients.sort_by(|a, b| excess(b).total_cmp(&excess(a)));
    let num_wrong = gradients.iter().filter(|found| excess(found) > 1.0).count();
    GradientReport { loss, exact_loss, num_targets, gradients, num_wrong }
}

fn load(device: &Device, config: &CheckGradConfig) -> Result<Decoder> {
    let Some(adapter) = &config.adapter else {
        return Decoder::load(&config.model, device, LoadOptions::trainable(DType::F32));
    };
    let mut model = Decoder::load(&config.model, device, LoadOptions::frozen(DType::F32))?;
    peft::load(adapter, &mut model)?;
    Ok(model)
}

/// Ids and targets of each document of the batch.
fn documents(config: &CheckGradConfig, model: &Decoder) -> Result<Vec<(Vec<i32>, Vec<i32>)>> {
    let vocab_size = model.config().vocab_size;
    if config.data.is_empty() {
        let stream = Philox::new(config.seed, STREAM);
        let id = |index: usize| stream.below([1, index as u32, 0, 0], vocab_size as u32) as i32;
        let ids: Vec<i32> = (0..config.num_tokens).map(id).collect();
        let mut targets = ids[1..].to_vec();
        targets.push(unsloth_core::ops::cross_entropy::IGNORE_INDEX);
        return Ok(vec![(ids, targets)]);
    }
    let max_seq_len = config.num_tokens.min(model.config().max_position_embeddings);
    let options = ReadOptions { model: &config.model, vocab_size, max_seq_len, train_on: None };
    let dataset = Dataset::read(&config.data, options)?;
    let (mut found, mut num_tokens) = (Vec::new(), 0);
    for index in 0..dataset.num_documents() {
        let document = dataset.document(index);
        num_tokens += document.ids.len();
        if num_tokens > config.num_tokens && !found.is_empty() {
            break;
        }
        found.push((document.ids.to_vec(), document.targets.to_vec()));
    }
    Ok(found)
}

fn batch(model: &Decoder, documents: &[(Vec<i32>, Vec<i32>)]) -> Result<Batch> {
    let documents: Vec<Document<'_>> = documents.iter().map(|(ids, targets)| Document { ids, targets }).collect();
    Ok(Batch::new(model.device(), &documents)?)
}

fn pass(model: &Decoder, documents: &[(Vec<i32>, Vec<i32>)]) -> Result<(Tensor, GradStore)> {
    let batch = batch(model, documents)?;
    let mut store = GradStore::new(&model.parameters())?;
    let tape = Tape::new();
    let loss = model.loss(&tape, &batch, LossSpec::mean(batch.num_targets))?;
    let value = loss.tensor().clone();
    tape.backward(&loss, &mut store)?;
    Ok((value, store))
}

fn compare(name: &str, gradient: &[f32], exact: &[f64], noise: f64) -> CheckedGradient {
    let largest = exact.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    let scale = largest.max(noise);
    // A gradient that is not there is wrong, not equal.
    let missing = gradient.len() != exact.len();
    let (mut difference, mut worst) = (if missing { f64::INFINITY } else { 0.0 }, 0);
    for (index, (gradient, exact)) in gradient.iter().zip(exact).enumerate() {
        let found = (f64::from(*gradient) - exact).abs() / scale;
        if found.is_nan() || found > difference {
            (difference, worst) = (if found.is_nan() { f64::INFINITY } else { found }, index);
        }
    }
    let name = name.to_owned();
    CheckedGradient { name, num_elements: exact.len(), largest, difference, index: worst, numeric_difference: None }
}

/// Central differences of the loss in one parameter.
struct Numeric<'a> {
    reference: &'a Reference,
    model: &'a Decoder,
    batch: &'a Batch,
    parameter: &'a Parameter,
}

impl Numeric<'_> {
    /// The largest difference over all directions.
    fn check(&self, gradient: &[f64], (seed, index): (u64, u32), noise: f64) -> Result<f64> {
        let length = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let (norm, root) = (length(gradient), (gradient.len() as f64).sqrt());
        let mut directions = Vec::new();
        if norm > 0.0 {
            directions.push((gradient.iter().map(|value| value / norm).collect::<Vec<f64>>(), norm));
        }
        let stream = Philox::new(seed, STREAM.wrapping_add(1));
        for direction in 0..NUM_DIRECTIONS {
            let sign = |element: usize| {
                let counter = [index, direction, element as u32, (element >> 32) as u32];
                if stream.below(counter, 2) == 0 { -1.0 / root } else { 1.0 / root }
            };
            // A gradient of this length has about this much along a direction that knows nothing of it.
            directions.push(((0..gradient.len()).map(sign).collect(), norm / root));
        }
        let start = (self.reference.values)(&self.parameter.value())?;
        let mut worst = 0.0f64;
        for (direction, scale) in directions {
            let expected: f64 = direction.iter().zip(gradient).map(|(d, g)| d * g).sum();
            let numeric = (self.loss(&start, &direction, STEP)? - self.loss(&start, &direction, -STEP)?) / (2.0 * STEP);
            let difference = (numeric - expected).abs() / scale.max(noise);
            worst = if difference.is_nan() { f64::INFINITY } else { worst.max(difference) };
        }
        self.set(&start)?;
        Ok(worst)
    }

    /// The loss that far along a direction.
    fn loss(&self, start: &[f64], direction: &[f64], step: f64) -> Result<f64> {
        let moved: Vec<f64> = start.iter().zip(direction).map(|(start, direction)| start + step * direction).collect();
        self.set(&moved)?;
        let loss = self.model.loss(&Tape::inference(), self.batch, LossSpec::mean(self.batch.num_targets))?;
        Ok((self.reference.values)(loss.tensor())?[0])
    }

    fn set(&self, values: &[f64]) -> Result<()> {
        Ok(self.parameter.update(|tensor| (self.reference.set_values)(tensor, values))?)
    }
}
