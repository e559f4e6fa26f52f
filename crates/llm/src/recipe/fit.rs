//! What fits a limit on memory, and what would.
//!
//! Every number comes from a [`plan`]: the run itself on a device that computes nothing.

use std::fmt;

use unsloth_core::{ByteSize, Category, DType, Device};
use unsloth_plan::{PlanBackend, PlanOptions, Target};
use unsloth_train::{Checkpointing, OptimizerConfig, OptimizerKind};

use super::{
    MemoryPlan, Method, Offload, Offloaded, Policy, RunError, TrainConfig, max_seq_len, offload::keeps_something, plan,
};
use crate::{
    Result,
    config::DecoderConfig,
    hub::{self, Parts},
};

/// Lengths of sequences are sought in steps of this many tokens.
const SEQ_STEP: usize = 16;
/// No more sequences of a micro-batch are sought than this.
const MAX_BATCH: usize = 4096;

/// Tokens of a tile that is suggested for feed-forward parts.
const MLP_TILE: usize = 512;

/// Plans runs on devices of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planner {
    /// What would run the operators.
    pub target: Target,
    /// Whether the device computes in bf16, so that it may be suggested.
    pub bf16: bool,
    /// The command whose options a suggestion names.
    pub command: Command,
}

/// A command, which has names of its own for the shape of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `unsloth train`
    Train,
    /// `unsloth plan`
    Plan,
}

/// A run that fits.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    /// Its checkpointing policy.
    pub checkpointing: Checkpointing,
    /// Whether the policy was chosen rather than given.
    pub is_chosen: bool,
    /// What it will hold.
    pub plan: MemoryPlan,
    /// The limit.
    pub budget_bytes: u64,
}

/// A run that does not fit, and what would help.
#[derive(Clone, Debug, PartialEq)]
pub struct OverBudget {
    /// The limit.
    pub budget_bytes: u64,
    /// What the run needs.
    pub needed_bytes: u64,
    /// What it would hold.
    pub plan: MemoryPlan,
    /// What would make it smaller: first what would make it fit.
    pub suggestions: Vec<Suggestion>,
}

/// A change of a run's options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suggestion {
    /// Options as a command line has them.
    pub options: String,
    /// What the run would need with them.
    pub needed_bytes: u64,
    /// Whether that is within the limit.
    pub fits: bool,
}

impl fmt::Display for OverBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { budget_bytes, needed_bytes, plan, suggestions } = self;
        let (needed, budget) = (ByteSize(*needed_bytes), ByteSize(*budget_bytes));
        write!(f, "the run needs {needed}, and {budget} are allowed; at its peak it holds")?;
        let held = Category::ALL.into_iter().map(|category| (category, plan.usage.at_peak(category)));
        for (category, bytes) in held.filter(|(_, bytes)| *bytes > 0) {
            write!(f, "\n  {:<12}{:>12}", category.name(), ByteSize(bytes))?;
        }
        if suggestions.is_empty() {
            return f.write_str("\nnothing that could be changed makes it smaller");
        }
        f.write_str("\nit would need")?;
        for Suggestion { options, needed_bytes, fits } in suggestions {
            let verdict = if *fits { "which fits" } else { "which does not fit" };
            write!(f, "\n  {:>10} with {options}, {verdict}", ByteSize(*needed_bytes))?;
        }
        Ok(())
    }
}

impl Planner {
    /// For runs of `unsloth train` on this device.
    pub fn of(device: &Device) -> Self {
        Self { target: Target::of(device), bf16: device.supports(DType::BF16), command: Command::Train }
    }

    /// What a run holds.
    ///
    /// # Errors
    /// As [`plan()`].
    pub fn plan(&self, config: &TrainConfig) -> Result<MemoryPlan> {
        let options = PlanOptions { target: self.target, budget_bytes: None };
        plan(&Device::new(PlanBackend::new(options)?), config)
    }

    /// What of a plan must be within a limit on the device's memory: what waits in host memory too where that is the device's.
    pub fn needed_bytes(&self, config: &TrainConfig, plan: &MemoryPlan) -> u64 {
        let is_shared = |place| place == Offload::Host && matches!(self.target, Target::Cpu { .. });
        let Offloaded { inputs, optimizer } = plan.elsewhere;
        let stores =
            [inputs.filter(|_| is_shared(config.offload)), optimizer.filter(|_| is_shared(config.offload_optimizer))];
        plan.usage.total_peak_bytes() + stores.iter().flatten().map(|usage| usage.peak_bytes).sum::<u64>()
    }

    fn needs(&self, config: &TrainConfig) -> Result<u64> {
        Ok(self.needed_bytes(config, &self.plan(config)?))
    }

    /// Chooses the policy where that is left open, and holds the run to the limit.
    ///
    /// # Errors
    /// [`RunError::OverBudget`] if it does not fit, or under no policy; as [`plan()`].
    pub fn fit(&self, config: &TrainConfig, budget_bytes: u64) -> Result<Fitted> {
        let config = &local(config)?;
        let is_chosen = config.checkpointing == Policy::Auto;
        let checkpointing = match &config.checkpointing {
            Policy::Given(checkpointing) => checkpointing.clone(),
            Policy::Auto => self.choose(config, budget_bytes)?.unwrap_or(Checkpointing::Every(1)),
        };
        let config = &under(config, &checkpointing);
        let plan = self.plan(config)?;
        let needed_bytes = self.needed_bytes(config, &plan);
        if needed_bytes > budget_bytes {
            let suggestions = self.suggestions(config, needed_bytes, budget_bytes)?;
            return Err(
                RunError::OverBudget(Box::new(OverBudget { budget_bytes, needed_bytes, plan, suggestions })).into()
            );
        }
        Ok(Fitted { checkpointing, is_chosen, plan, budget_bytes })
    }

    /// The policy that fits and computes least again: nothing, then cheap operators, then as few layers as it takes.
    fn choose(&self, config: &TrainConfig, budget_bytes: u64) -> Result<Option<Checkpointing>> {
        let fits = |policy: &Checkpointing| -> Result<bool> { Ok(self.needs(&under(config, policy))? <= budget_bytes) };
        if config.offload == Offload::None {
            for policy in [Checkpointing::None, Checkpointing::SELECTIVE] {
                if fits(&policy)? {
                    return Ok(Some(policy));
                }
            }
        }
        if !fits(&Checkpointing::Every(1))? {
            return Ok(None);
        }
        let first = |count: usize| Checkpointing::Layers((0..count).collect());
        // Of all layers it is known to fit.
        let (mut few, mut enough) = (0, DecoderConfig::load(&config.model)?.layers.len());
        let num_layers = enough;
        while enough - few > 1 {
            let count = few + (enough - few) / 2;
            match fits(&first(count))? {
                true => enough = count,
                false => few = count,
            }
        }
        Ok(Some(if enough == num_layers { Checkpointing::Every(1) } else { first(enough) }))
    }

    /// The longest sequences, in multiples of 16 tokens up to the model's limit, with which a run fits; `None` if not even the
    /// shortest do.
    ///
    /// # Errors
    /// As [`plan()`].
    pub fn largest_seq_len(&self, config: &TrainConfig, budget_bytes: u64) -> Result<Option<usize>> {
        let config = &local(config)?;
        let limit = DecoderConfig::load(&config.model)?.max_position_embeddings;
        let of = |seq_len| TrainConfig { max_seq_len: Some(seq_len), ..config.clone() };
        let largest = largest((limit / SEQ_STEP).max(1), budget_bytes, |steps| self.needs(&of(steps * SEQ_STEP)))?;
        Ok(largest.map(|steps| steps * SEQ_STEP))
    }

    /// The most sequences of a micro-batch, up to 4096, with which a run fits; `None` if not even one does.
    ///
    /// # Errors
    /// As [`plan()`].
    pub fn largest_batch_size(&self, config: &TrainConfig, budget_bytes: u64) -> Result<Option<usize>> {
        let config = &local(config)?;
        let seq_len = max_seq_len(config.max_seq_len, &DecoderConfig::load(&config.model)?);
        let most = (i32::MAX as usize / seq_len.max(1)).clamp(1, MAX_BATCH);
        largest(most, budget_bytes, |batch_size| self.needs(&TrainConfig { batch_size, ..config.clone() }))
    }

    /// Changes that make a run that needs `now` smaller, each on its own, or all at once where none is enough.
    fn suggestions(&self, config: &TrainConfig, now: u64, budget_bytes: u64) -> Result<Vec<Suggestion>> {
        let mut found = Vec::new();
        for (options, config) in self.changes(config, budget_bytes)? {
            let needed_bytes = self.needs(&config)?;
            if needed_bytes < now {
                found.push(Suggestion { options, needed_bytes, fits: needed_bytes <= budget_bytes });
            }
        }
        if !found.iter().any(|suggestion| suggestion.fits) {
            found.extend(self.together(config, budget_bytes)?);
        }
        found.sort_by_key(|suggestion| (!suggestion.fits, suggestion.needed_bytes));
        Ok(found)
    }

    fn changes(&self, config: &TrainConfig, budget_bytes: u64) -> Result<Vec<(String, TrainConfig)>> {
        let mut changes = Vec::new();
        let chosen = self.choose(&TrainConfig { offload: Offload::None, ..config.clone() }, budget_bytes)?;
        let policy = chosen.clone().unwrap_or(Checkpointing::Every(1));
        let kept = TrainConfig { offload: Offload::None, ..under(config, &policy) };
        changes.push((checkpointing_options(&kept)?, kept));
        if chosen.is_none() {
            let moved = TrainConfig { offload: self.place(), ..under(config, &Checkpointing::Every(1)) };
            changes.push((checkpointing_options(&moved)?, moved));
        }
        if config.batch_size > 1 {
            let most = self.largest_batch_size(config, budget_bytes)?.unwrap_or(1);
            changes.push(self.with_batch_size(config, most));
        }
        if let Some(seq_len) = self.largest_seq_len(config, budget_bytes)? {
            changes.push((self.seq_option(seq_len), TrainConfig { max_seq_len: Some(seq_len), ..config.clone() }));
        }
        if config.mlp_tile.is_none() {
            changes
                .push((format!("--mlp-tile {MLP_TILE}"), TrainConfig { mlp_tile: Some(MLP_TILE), ..config.clone() }));
        }
        if self.bf16 && config.dtype == DType::F32 {
            changes.push(("--dtype bf16".to_owned(), TrainConfig { dtype: DType::BF16, ..config.clone() }));
        }
        if let OptimizerConfig::AdamW(adamw) = config.optimizer {
            let optimizer = OptimizerConfig::AdamW8bit(adamw);
            changes.push((
                format!("--optimizer {}", OptimizerKind::AdamW8bit),
                TrainConfig { optimizer, ..config.clone() },
            ));
        }
        if config.dtype == DType::BF16 && config.method != Method::Lora && !config.stochastic_rounding {
            let pure = TrainConfig { stochastic_rounding: true, ..config.clone() };
            changes.push(("--stochastic-rounding".to_owned(), pure));
        }
        if let Some((option, moved)) = self.with_optimizer_elsewhere(config) {
            changes.push((option, moved));
        }
        if config.method == Method::Full {
            let options = if config.stochastic_rounding {
                "--method lora without --stochastic-rounding"
            } else {
                "--method lora"
            };
            let lora = TrainConfig { method: Method::Lora, stochastic_rounding: false, ..config.clone() };
            changes.push((options.to_owned(), lora));
        }
        Ok(changes)
    }

    /// Everything that changes no result but its rounding, and sequences as short as it then takes.
    fn together(&self, config: &TrainConfig, budget_bytes: u64) -> Result<Option<Suggestion>> {
        let moved = TrainConfig { offload: self.place(), ..under(config, &Checkpointing::Every(1)) };
        let mut options = checkpointing_options(&moved)?;
        let (batch, mut config) = self.with_batch_size(&moved, 1);
        if moved.batch_size > 1 {
            options = format!("{options} {batch}");
        }
        if self.bf16 && config.dtype == DType::F32 {
            config.dtype = DType::BF16;
            options += " --dtype bf16";
        }
        let tiled = TrainConfig { mlp_tile: Some(MLP_TILE), ..config.clone() };
        if config.mlp_tile.is_none() && self.needs(&tiled)? < self.needs(&config)? {
            options += &format!(" --mlp-tile {MLP_TILE}");
            config = tiled;
        }
        if let Some((option, moved)) = self.with_optimizer_elsewhere(&config)
            && self.needs(&config)? > budget_bytes
        {
            options = format!("{options} {option}");
            config = moved;
        }
        if self.needs(&config)? > budget_bytes {
            let Some(seq_len) = self.largest_seq_len(&config, budget_bytes)? else { return Ok(None) };
            options = format!("{options} {}", self.seq_option(seq_len));
            config.max_seq_len = Some(seq_len);
        }
        Ok(Some(Suggestion { options, needed_bytes: self.needs(&config)?, fits: true }))
    }

    /// What the optimiser keeps outside the device's memory, if it is not already and there is anything.
    fn with_optimizer_elsewhere(&self, config: &TrainConfig) -> Option<(String, TrainConfig)> {
        let offload_optimizer = self.place();
        let is_here = config.offload_optimizer == Offload::None && keeps_something(&config.optimizer);
        is_here.then(|| {
            (format!("--offload-optimizer {offload_optimizer}"), TrainConfig { offload_optimizer, ..config.clone() })
        })
    }

    /// Where something can wait outside the device's memory.
    fn place(&self) -> Offload {
        match self.target {
            Target::Cpu { .. } => Offload::Disk,
            Target::Kernels { .. } => Offload::Host,
        }
    }

    fn seq_option(&self, seq_len: usize) -> String {
        match self.command {
            Command::Train => format!("--max-seq-len {seq_len}"),
            Command::Plan => format!("--seq {seq_len}"),
        }
    }

    /// The same step in more micro-batches, of at most so many sequences.
    fn with_batch_size(&self, config: &TrainConfig, most: usize) -> (String, TrainConfig) {
        let divides = |size: &usize| config.batch_size.is_multiple_of(*size);
        let batch_size = (1..=most.min(config.batch_size)).rev().find(divides).unwrap_or(1);
        let grad_accum = config.grad_accum * (config.batch_size / batch_size);
        let options = match self.command {
            Command::Train => format!("--batch-size {batch_size} --grad-accum {grad_accum}"),
            Command::Plan => format!("--batch {batch_size}"),
        };
        (options, TrainConfig { batch_size, grad_accum, ..config.clone() })
    }
}

/// The run with its model in a folder of this machine.
fn local(config: &TrainConfig) -> Result<TrainConfig> {
    Ok(TrainConfig { model: hub::folder(&config.model, Parts::WithoutWeights)?, ..config.clone() })
}

fn under(config: &TrainConfig, policy: &Checkpointing) -> TrainConfig {
    TrainConfig { checkpointing: Policy::Given(policy.clone()), ..config.clone() }
}

fn checkpointing_options(config: &TrainConfig) -> Result<String> {
    let policy = config.checkpointing.given()?;
    Ok(match config.offload {
        Offload::None => format!("--checkpointing {policy}"),
        offload => format!("--checkpointing {policy} --offload {offload}"),
    })
}

/// The largest of `1 ..= most` that needs no more than `budget`, for a need that grows with it, about in proportion.
fn largest(most: usize, budget: u64, needs: impl Fn(usize) -> Result<u64>) -> Result<Option<usize>> {
    let mut below = (1, needs(1)?);
    if below.1 > budget {
        return Ok(None);
    }
    // The point that a line is drawn through besides the last one that fits, and the first that is known not to fit.
    let (mut other, mut exceeds) = (None, most + 1);
    for round in 0.. {
        let (fits, need) = below;
        if exceeds - fits <= 1 {
            break;
        }
        let guess = match other {
            // From below, so that a limit far beyond what fits is not looked at.
            None => 16,
            // Halves end what a line through two points would creep along.
            Some(_) if round % 4 == 3 && exceeds <= most => fits + (exceeds - fits) / 2,
            Some((count, other_need)) => {
                let slope = need.abs_diff(other_need) as f64 / fits.abs_diff(count) as f64;
                fits.saturating_add(((budget - need) as f64 / slope.max(1.0)) as usize)
            }
        };
        let guess = guess.clamp(fits + 1, exceeds - 1);
        let found = (guess, needs(guess)?);
        if found.1 <= budget {
            (other, below) = (Some(other.filter(|_| exceeds <= most).unwrap_or(below)), found);
        } else {
            (other, exceeds) = (Some(found), guess);
        }
    }
    Ok(Some(below.0))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::largest;

    #[test]
    fn finds_the_largest_with_few_looks() {
        for most in [1, 5, 100, 8192] {
            for budget in [0, 999, 1000, 1010, 1234, 5000, 82_000, 1 << 40] {
                for bend in [0, 3] {
                    let looks = Cell::new(0);
                    // Steps of ten bytes, and something that grows faster.
                    let need = |count: usize| 990 + 10 * count as u64 + bend * (count as u64).pow(2) / 1000;
                    let found = largest(most, budget, |count| {
                        looks.set(looks.get() + 1);
                        Ok(need(count))
                    });
                    let expected = (1..=most).rev().find(|&count| need(count) <= budget);
                    assert_eq!(found.unwrap(), expected, "{most} {budget} {bend}");
                    assert!(looks.get() <= 20, "{most} {budget} {bend}: {}", looks.get());
                }
            }
        }
    }
}
