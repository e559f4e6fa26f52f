//! The loop of a run: gradients of micro-batches, one optimiser step, metrics.
//!
//! Nothing in a step waits for the device. Whether a step may change parameters is decided there; the host reads a step's
//! scalars while the next one is under way. Under loss scaling it reads them before: the scale of a step depends on whether the
//! one before it was finite.

mod state;

use std::sync::Arc;

use unsloth_autograd::{GradStore, Parameter, Tape};
use unsloth_core::{
    Category, DType, Tensor,
    ops::{adamw::StepState, cross_entropy::LossSpec, elementwise, reduce},
};

pub(crate) use self::state::Contents;
pub use self::state::{PARAMETER, RunState, StateTensor};
use crate::{
    Batch, Draw, Error, LossScaleConfig, LossScaler, Model, NanTrace, Optimizer, OptimizerConfig, Paging, Rates,
    Result, Schedule, error::invalid,
};

/// How parameters are changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainerConfig {
    /// The optimiser.
    pub optimizer: OptimizerConfig,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// The full rate of embeddings, table and head, where they have their own; 0 or more.
    pub embedding_learning_rate: Option<f64>,
    /// Full rate of `B` of adapters, and of the vectors trained with them, over that of `A`, positive; `None`: they have one.
    ///                                                                    Hayou, Ghosh & Yu 2024, arXiv:2402.12354
    pub loraplus_lr_ratio: Option<f64>,
    /// Gradients with a larger norm are scaled down to it; positive.
    pub max_grad_norm: Option<f32>,
    /// How the loss is scaled, which gradients in f16 need; `None`: not at all.
    pub loss_scale: Option<LossScaleConfig>,
    /// Whether parameters in bf16 are rounded up or down at random behind a step, instead of to nearest.
    pub stochastic_rounding: bool,
    /// Of what is drawn at random in a step, such as dropout.
    pub seed: u64,
}

/// AdamW over a cosine of one step, clipped to a norm of 1: for what a caller does not say.
impl Default for TrainerConfig {
    fn default() -> Self {
        Self {
            optimizer: OptimizerConfig::default(),
            schedule: Schedule::default(),
            embedding_learning_rate: None,
            loraplus_lr_ratio: None,
            max_grad_norm: Some(1.0),
            loss_scale: None,
            stochastic_rounding: false,
            seed: 0,
        }
    }
}

impl TrainerConfig {
    /// # Errors
    /// [`Error::InvalidConfig`] for a field out of its range.
    pub fn validate(&self) -> Result<()> {
        self.optimizer.validate()?;
        self.schedule.validate()?;
        match self.embedding_learning_rate {
            Some(rate) if !(rate >= 0.0 && (rate as f32).is_finite()) => {
                return invalid("embedding_learning_rate", rate, "0 or more and finite");
            }
            _ => {}
        }
        match self.loraplus_lr_ratio {
            Some(ratio) if !(ratio > 0.0 && (ratio * self.schedule.learning_rate).is_finite()) => {
                return invalid("loraplus_lr_ratio", ratio, "above 0 and finite");
            }
            _ => {}
        }
        self.scaler().map(drop)?;
        match self.max_grad_norm {
            Some(max) if !(max > 0.0 && max.is_finite()) => invalid("max_grad_norm", max, "positive and finite"),
            _ => Ok(()),
        }
    }

    fn scaler(&self) -> Result<LossScaler> {
        let disabled = LossScaleConfig { enabled: false, ..LossScaleConfig::default() };
        LossScaler::new(self.loss_scale.unwrap_or(disabled))
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepMetrics {
    /// The step, from 1.
    pub step: usize,
    /// Mean loss over all targets of the step, before its change of the parameters.
    pub loss: f32,
    /// Learning rate.
    pub learning_rate: f32,
    /// Norm of all gradients, before clipping; not finite where the step was skipped.
    pub grad_norm: f32,
    /// What its gradients were multiplied by while they were computed; 1 without loss scaling.
    pub loss_scale: f32,
    /// Whether it changed nothing, because a gradient was not finite under its loss scale.
    pub skipped: bool,
    /// Tokens of the step.
    pub num_tokens: usize,
    /// Tokens that have a target.
    pub num_targets: usize,
}

/// The trainer's one optimiser, as its loss scaler counts them.
const OPTIMIZER: usize = 0;

/// Gradients that are not finite under a smaller scale than this are not so because of it: the smallest normal number in f16.
const MIN_LOSS_SCALE: f32 = 1.0 / 16_384.0;

/// Metrics of a step whose scalars the host has not read yet.
struct Pending {
    /// All but `loss`, `grad_norm` and `skipped`, which are still on the device.
    metrics: StepMetrics,
    loss: Tensor,
    /// Copy of the [`StepState`], which the next step overwrites.
    state: Tensor,
}

/// Trains the parameters of a model.
pub struct Trainer<M: Model> {
    model: M,
    config: TrainerConfig,
    gradients: GradStore,
    optimizer: Optimizer,
    scaler: LossScaler,
    /// Steps begun.
    num_steps: usize,
    /// Of these, the ones that changed nothing.
    num_skipped: usize,
    pending: Option<Pending>,
    /// The step that failed.
    stopped: Option<usize>,
    trace: Option<Arc<NanTrace>>,
}

impl<M: Model> Trainer<M> {
    /// A trainer before its first step. Gradients and moments of all parameters are allocated now.
    ///
    /// # Errors
    /// As [`TrainerConfig::validate`]; [`Error::InvalidConfig`] if the model has no parameter to train;
    /// [`unsloth_core::Error::OutOfMemory`].
    pub fn new(model: M, config: TrainerConfig) -> Result<Self> {
        Self::with_paging(model, config, None)
    }

    /// The same with an optimiser of [`Optimizer::with_paging`].
    ///
    /// # Errors
    /// As [`Trainer::new`]; as [`Optimizer::with_paging`].
    pub fn with_paging(model: M, config: TrainerConfig, paging: Option<Paging>) -> Result<Self> {
        config.validate()?;
        let with_role = |parameter: Parameter| {
            let role = model.role(&parameter);
            (parameter, role)
        };
        let parameters: Vec<_> = model.parameters().into_iter().map(with_role).collect();
        let mut optimizer = Optimizer::with_paging(model.device(), &parameters, config.optimizer, paging)?;
        if config.stochastic_rounding {
            optimizer.round_stochastically(config.seed)?;
        }
        let parameters: Vec<_> = optimizer.parameters().cloned().collect();
        if parameters.is_empty() {
            return invalid("parameters", 0, "at least one parameter to train");
        }
        let gradients = GradStore::new(&parameters)?;
        let scaler = config.scaler()?;
        let (num_steps, num_skipped, pending, stopped, trace) = (0, 0, None, None, None);
        Ok(Self { model, config, gradients, optimizer, scaler, num_steps, num_skipped, pending, stopped, trace })
    }

    /// Has a trace look at every step: that of the device which the model is on.
    pub fn set_trace(&mut self, trace: Arc<NanTrace>) {
        self.trace = Some(trace);
    }

    /// One optimiser step over micro-batches, whose losses are divided by the number of targets of all of them, and whose
    /// sequences are counted through for what is drawn at random: however a batch is split, the step is the same up to
    /// rounding. Returns the metrics of the step before.
    ///
    /// Under loss scaling a step whose gradients are not finite changes nothing, which its metrics tell; the rate of the
    /// schedule goes on.
    ///
    /// # Errors
    /// [`Error::NoTargets`], after which the trainer can go on. All others stop it, and later calls give
    /// [`Error::Stopped`]: [`Error::NonFinite`] if the step *before* this one was not finite, in which case neither it nor
    /// this one has changed a parameter; under loss scaling, if its loss was not, or its gradients under a scale below
    /// 2^-14; [`Error::Step`] if an operator failed.
    pub fn step(&mut self, micro_batches: &[Batch]) -> Result<Option<StepMetrics>> {
        self.check_running()?;
        let step = self.num_steps + 1;
        let num_targets: usize = micro_batches.iter().map(|batch| batch.num_targets).sum();
        if num_targets == 0 {
            return Err(Error::NoTargets { step });
        }
        let before = if self.scaler.is_enabled() { self.pending.take() } else { None };
        let early = self.read(before)?;
        self.num_steps = step;
        let metrics = StepMetrics {
            step,
            loss: f32::NAN,
            learning_rate: self.config.schedule.rate(step - 1),
            grad_norm: f32::NAN,
            loss_scale: self.scaler.scale(),
            skipped: false,
            num_tokens: micro_batches.iter().map(Batch::num_tokens).sum(),
            num_targets,
        };
        self.trace.iter().for_each(|trace| trace.begin(step));
        let launched = self.launch(micro_batches, metrics);
        self.trace.iter().for_each(|trace| trace.end());
        let launched = launched.map_err(|error| self.stop(step, error))?;
        let before = self.pending.replace(launched);
        Ok(early.or(self.read(before)?))
    }

    /// Waits for the last step and returns its metrics, unless they have been returned. Parameters are then final.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if the last step was not finite; [`Error::Stopped`] if there is nothing to wait for because an
    /// earlier call failed.
    pub fn finish(&mut self) -> Result<Option<StepMetrics>> {
        match self.pending.take() {
            None => self.check_running().map(|()| None),
            last => self.read(last),
        }
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// Gives the model back.
    pub fn into_model(self) -> M {
        self.model
    }

    /// Gradients of the latest step, before clipping, and multiplied by [`StepMetrics::loss_scale`].
    pub fn gradients(&self) -> &GradStore {
        &self.gradients
    }

    /// The optimiser and its moments.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Steps begun so far.
    pub fn num_steps(&self) -> usize {
        self.num_steps
    }

    fn check_running(&self) -> Result<()> {
        match self.stopped {
            Some(step) => Err(Error::Stopped { step }),
            None => Ok(()),
        }
    }

    /// Takes no more steps after this error of a step.
    fn stop(&mut self, step: usize, error: Error) -> Error {
        self.stopped = Some(step);
        match error {
            Error::Core(source) => Error::Step { step, source },
            other => other,
        }
    }

    /// Everything of a step that runs on the device.
    fn launch(&mut self, micro_batches: &[Batch], metrics: StepMetrics) -> Result<Pending> {
        self.gradients.zero()?;
        let spec = self.scaler.scale_loss(LossSpec::mean(metrics.num_targets));
        let mut loss = self.model.device().zeros([1], DType::F32, Category::Activations)?;
        let mut draw = Draw { seed: self.config.seed, step: metrics.step as u32 - 1, first_sequence: 0 };
        for batch in micro_batches {
            let tape = Tape::new();
            let part = self.model.loss(&tape, &Batch { draw: Some(draw), ..batch.clone() }, spec)?;
            draw.first_sequence += batch.sequences.num_seqs() as u32;
            tape.backward(&part, &mut self.gradients)?;
            loss = elementwise::add(loss, part.tensor())?;
        }
        let Self { scaler, optimizer, gradients, config, .. } = self;
        let norm = reduce::grad_norm(&gradients.tensors())?;
        // The loss may be infinite where gradients are cut off. Where one of them is not finite, their norm is not either.
        let checked = [&loss, &norm];
        let index = metrics.step - 1;
        let weight = metrics.learning_rate;
        let of = |full: Option<f64>| full.map_or(weight, |full| config.schedule.rate_of(full, index));
        let lora_b = config.loraplus_lr_ratio.map(|ratio| ratio * config.schedule.learning_rate);
        let rates = Rates { weight, embedding: of(config.embedding_learning_rate), lora_b: of(lora_b) };
        scaler.step(OPTIMIZER, &checked, |unscaled| {
            optimizer.control(unscaled, (&norm, &checked), config.max_grad_norm)?;
            optimizer.step(gradients, rates, index as u32)
        })?;
        Ok(Pending { metrics, loss, state: elementwise::copy(self.optimizer.state().tensor())? })
    }

    fn read(&mut self, pending: Option<Pending>) -> Result<Option<StepMetrics>> {
        let Some(Pending { mut metrics, loss, state }) = pending else {
            return Ok(None);
        };
        let step = metrics.step;
        let read = || Ok((loss.to_vec::<f32>()?, state.to_vec::<f32>()?));
        let (loss, state) = read().map_err(|source| self.stop(step, Error::Core(source)))?;
        self.scaler.update().map_err(|error| self.stop(step, error))?;
        (metrics.loss, metrics.grad_norm) = (loss[0], state[StepState::GRAD_NORM]);
        metrics.skipped = state[StepState::SKIP] != 0.0;
        // No scale would have made a loss finite, nor gradients that are not under one of the smallest.
        let was_scaled = self.scaler.is_enabled() && metrics.loss.is_finite() && metrics.loss_scale >= MIN_LOSS_SCALE;
        if metrics.skipped && !was_scaled {
            self.stopped = Some(step);
            // Without scaling the step after it was skipped too, and has no metrics of its own worth reporting.
            self.pending = None;
            let origin = self.trace.as_ref().and_then(|trace| trace.take_origin(step)).map(Box::new);
            return Err(Error::NonFinite { step, loss: metrics.loss, grad_norm: metrics.grad_norm, origin });
        }
        self.num_skipped += usize::from(metrics.skipped);
        Ok(Some(metrics))
    }
}
