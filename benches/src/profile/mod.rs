//! Where the time of a training step goes: every call of the device recorded, by operator and by kind of layer.

mod output;

use std::{collections::HashMap, path::PathBuf, time::Instant};

use anyhow::Result;
use serde::Serialize;
use unsloth_rs::{
    Category, Device,
    autograd::Matrix,
    core::{BufferId, Usage, Weight, ops::Cost},
    llm::decoder::Decoder,
    train::Trainer,
};

pub use output::{tables, write};

use crate::{
    limits::{self, Limits},
    machine::{self, Machine},
    models::ModelShape,
    recorder::{Call, recorded},
    training::{self, Folder, random_batch},
};

/// What is profiled.
#[derive(Clone, Debug)]
pub struct Options {
    /// A Hugging Face folder, or else two layers of this shape.
    pub folder: Option<PathBuf>,
    /// Shape of the model that is written where there is no folder.
    pub shape: ModelShape,
    /// Sequences and tokens of each.
    pub batch: (usize, usize),
    /// Type, adapters, checkpointing.
    pub training: training::Options,
    /// Recorded steps.
    pub steps: usize,
}

/// A recorded step, on average.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// Model, batch and types, for people.
    pub what: String,
    /// What it ran on.
    pub machine: Machine,
    /// What was built.
    pub commit: Option<String>,
    /// The device's limits.
    pub limits: Limits,
    /// Seconds of a step that is not recorded.
    pub step_s: f64,
    /// Tokens of a step over those seconds.
    pub tokens_per_second: f64,
    /// Seconds of a recorded step, in which every call waits for the one before.
    pub recorded_step_s: f64,
    /// By operator, the slowest first.
    pub operators: Vec<Share>,
    /// By kind of layer, the slowest first.
    pub layers: Vec<Share>,
    /// Bytes that each category held when the total was highest.
    pub peak_bytes: Vec<(String, u64)>,
    /// Every call of the last step.
    #[serde(skip)]
    pub calls: Vec<(Call, Place)>,
}

/// A part of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Share {
    /// Operator and part, or kind of layer.
    pub name: String,
    /// Calls in a step.
    pub calls: f64,
    /// Seconds in a step.
    pub seconds: f64,
    /// Percent of the recorded calls' time.
    pub percent: f64,
    /// Least FLOPs in a step.
    pub flops: f64,
    /// Least bytes moved in a step.
    pub bytes: f64,
    /// Least time by the device's limits in percent of the time taken.
    pub percent_of_limit: f64,
}

/// Where in a model a call belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Kind of layer.
    pub kind: &'static str,
    /// Module path of a projection.
    pub module: Option<String>,
}

/// Profiles steps on a device.
///
/// # Errors
/// Whatever loading the folder or a step refuses.
pub fn run(device: &Device, options: &Options) -> Result<Profile> {
    let (recorded, recording) = recorded(device);
    let folder = Folder::of(options.folder.as_deref(), options.shape);
    let path = folder.written()?;
    let mut training = training::trainer(path.as_ref(), &recorded, options.training.clone())?;
    let batch = [random_batch(&recorded, training.model().config().vocab_size, options.batch)?];
    // The pool is full and every page has been touched after two.
    for _ in 0..2 {
        training.step(&batch)?;
    }
    training.finish()?;
    let step_s = timed(&mut training, &batch, options.steps)?;
    let modules = modules(training.model());
    recorded.backend().reset_peak();
    let (mut steps, mut seconds) = (Vec::new(), 0.0);
    for _ in 0..options.steps {
        recording.start();
        seconds += timed(&mut training, &batch, 1)?;
        let calls = recording.stop();
        steps.push(calls.into_iter().map(|call| (place(&call, &modules), call)).map(|(at, call)| (call, at)).collect());
    }
    let usage = recorded.usage();
    let limits = limits(device)?;
    let training::Options { dtype, rank, checkpointing } = &options.training;
    let (batch, seq_len) = options.batch;
    let what = format!("{}, {batch} x {seq_len}, {dtype}, rank {rank}, checkpointing {checkpointing}", folder.name());
    Ok(Profile {
        what,
        machine: Machine::of(device),
        commit: machine::commit(),
        step_s,
        tokens_per_second: (batch * seq_len) as f64 / step_s,
        recorded_step_s: seconds / options.steps as f64,
        operators: shares(&steps, |call, _| call.name.to_owned(), |cost| least(&limits, cost, options)),
        layers: shares(&steps, |_, place| place.kind.to_owned(), |cost| least(&limits, cost, options)),
        peak_bytes: by_category(&usage),
        limits,
        calls: steps.pop().unwrap_or_default(),
    })
}

/// Seconds of a step, with the wait for its results.
fn timed(training: &mut Trainer<Decoder>, batch: &[unsloth_rs::train::Batch; 1], steps: usize) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..steps {
        training.step(batch)?;
    }
    training.finish()?;
    Ok(start.elapsed().as_secs_f64() / steps as f64)
}

fn limits(device: &Device) -> Result<Limits> {
    let time = std::time::Duration::from_millis(400);
    if machine::is_cpu(device) {
        return Ok(limits::cpu(machine::cpus(), time, machine::beyond_caches()).0);
    }
    limits::device(device, time, (2048, 64 << 20))
}

fn least(limits: &Limits, cost: Cost, options: &Options) -> f64 {
    limits.least_time(cost, options.training.dtype).0.as_secs_f64()
}

fn by_category(usage: &Usage) -> Vec<(String, u64)> {
    Category::ALL.iter().map(|&category| (category.name().to_owned(), usage.at_peak(category))).collect()
}

/// Module paths by the storage of their adapter and of their matrix.
fn modules(model: &Decoder) -> HashMap<BufferId, String> {
    let mut modules = HashMap::new();
    for linear in model.linears() {
        if let Some(adapter) = &linear.adapter {
            modules.insert(adapter.lora_a.value().buffer_id(), linear.name.clone());
        }
        if let Matrix::Frozen(weight) = &linear.weight
            && let Weight::Dense(tensor) = weight
        {
            modules.insert(tensor.buffer_id(), linear.name.clone());
        }
    }
    modules
}

/// Projections by their name in Hugging Face's modules, other operators by what they are for.
fn place(call: &Call, modules: &HashMap<BufferId, String>) -> Place {
    let module = call.subject.and_then(|subject| modules.get(&subject)).cloned();
    let projection = module.as_deref().and_then(|module| module.rsplit('.').next());
    let operator = call.name.split(' ').next().unwrap_or(call.name);
    let kind = match (projection, operator) {
        (Some("gate_proj" | "up_proj" | "down_proj"), _) => "feed-forward projections",
        (Some(_), _) => "attention projections",
        (None, "attention" | "kv_append") => "attention",
        (None, "rope") => "rotary embedding",
        (None, "rms_norm" | "layer_norm") => "norms",
        (None, "glu") => "feed-forward activation",
        (None, "embedding") => "embedding",
        (None, "linear_cross_entropy" | "cross_entropy") => "head and loss",
        (None, "adamw" | "step_control" | "grad_norm" | "all_finite" | "fill_zero") => "optimiser",
        (None, _) => "residuals, sums and copies",
    };
    Place { kind, module }
}

/// Sums over steps by name, per step.
fn shares(
    steps: &[Vec<(Call, Place)>],
    name: impl Fn(&Call, &Place) -> String,
    least: impl Fn(Cost) -> f64,
) -> Vec<Share> {
    let mut shares: Vec<Share> = Vec::new();
    let mut least_seconds: HashMap<String, f64> = HashMap::new();
    for (call, place) in steps.iter().flatten() {
        let name = name(call, place);
        *least_seconds.entry(name.clone()).or_default() += least(call.cost);
        let index = shares.iter().position(|share| share.name == name).unwrap_or_else(|| {
            let (calls, seconds, percent, flops, bytes, percent_of_limit) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
            shares.push(Share { name, calls, seconds, percent, flops, bytes, percent_of_limit });
            shares.len() - 1
        });
        let share = &mut shares[index];
        share.calls += 1.0;
        share.seconds += call.elapsed.as_secs_f64();
        share.flops += call.cost.flops as f64;
        share.bytes += call.cost.bytes() as f64;
    }
    let total: f64 = shares.iter().map(|share| share.seconds).sum();
    for share in &mut shares {
        let least = least_seconds.get(&share.name).copied().unwrap_or(0.0);
        share.percent = 100.0 * share.seconds / total;
        share.percent_of_limit = 100.0 * least / share.seconds;
        for value in [&mut share.calls, &mut share.seconds, &mut share.flops, &mut share.bytes] {
            *value /= steps.len() as f64;
        }
    }
    shares.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    shares
}

#[cfg(test)]
mod tests {
    use unsloth_rs::{DType, device, train::Checkpointing};

    use super::*;
    use crate::models::TINY;

    fn tiny(checkpointing: Checkpointing) -> Profile {
        let training = training::Options { dtype: DType::F32, rank: 4, checkpointing };
        let options = Options { folder: None, shape: TINY, batch: (2, 16), training, steps: 2 };
        run(&device("cpu").unwrap(), &options).unwrap()
    }

    fn calls(profile: &Profile, name: &str) -> f64 {
        profile.operators.iter().find(|share| share.name == name).map_or(0.0, |share| share.calls)
    }

    #[test]
    fn every_call_of_a_step_is_there_and_in_its_place() {
        let profile = tiny(Checkpointing::None);
        // Two layers of seven projections; two norms each and one at the end.
        assert_eq!(calls(&profile, "lora_linear forward"), 14.0);
        assert_eq!(calls(&profile, "lora_linear backward"), 14.0);
        assert_eq!(calls(&profile, "attention backward"), 2.0);
        assert_eq!(calls(&profile, "rms_norm forward"), 5.0);
        assert_eq!(calls(&profile, "linear_cross_entropy"), 1.0);
        let kinds: Vec<&str> = profile.layers.iter().map(|share| share.name.as_str()).collect();
        for kind in ["feed-forward projections", "attention projections", "attention", "head and loss", "optimiser"] {
            assert!(kinds.contains(&kind), "{kind} is not among {kinds:?}");
        }
        let projections = profile.calls.iter().filter(|(call, _)| call.name.starts_with("lora_linear"));
        assert!(projections.clone().all(|(_, place)| place.module.is_some()), "a projection without its module");
        for shares in [&profile.operators, &profile.layers] {
            assert!((shares.iter().map(|share| share.percent).sum::<f64>() - 100.0).abs() < 1e-6);
        }
        // 2 * 32 tokens * 64 * 96 FLOPs for one of three products of a feed-forward part, without adapters.
        let flops: f64 = profile.operators.iter().map(|share| share.flops).sum();
        assert!(flops > 2.0 * 2.0 * 3.0 * f64::from(2 * 32 * 64 * 96), "{flops}");
        assert!(profile.peak_bytes.iter().any(|(category, bytes)| category == "activations" && *bytes > 0));
    }

    #[test]
    fn checkpointing_runs_the_forward_pass_of_the_layers_again() {
        let profile = tiny(Checkpointing::Every(1));
        assert_eq!(calls(&profile, "attention forward"), 4.0);
        assert_eq!(calls(&profile, "attention backward"), 2.0);
    }
}
