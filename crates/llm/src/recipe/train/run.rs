//! The steps of a run, and what is written between them.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use unsloth_train::{Model, NanTrace, StepMetrics, Trainer};

use super::{Data, End, Event};
use crate::{
    Result,
    decoder::Decoder,
    packing::Batches,
    recipe::{
        EvalRecord, StepRecord, TrainConfig, TrainOptions,
        checkpoint::{Checkpoints, Progress, State},
        evaluate::MeanLoss,
        metrics::Metrics,
        output::OutputFolder,
    },
};

/// A run between two steps.
pub(super) struct Run<'a> {
    pub(super) config: &'a TrainConfig,
    pub(super) options: &'a TrainOptions,
    pub(super) output: &'a OutputFolder,
    /// Of the model that the run began with.
    pub(super) model_sha256: &'a str,
    pub(super) data: &'a Data,
    pub(super) batches: Batches,
    pub(super) total_steps: usize,
    pub(super) trainer: Trainer<Decoder>,
    pub(super) trace: Option<Arc<NanTrace>>,
    pub(super) metrics: Metrics,
    pub(super) progress: Progress,
    pub(super) on_event: &'a mut dyn FnMut(Event),
    pub(super) stop: &'a AtomicBool,
}

impl Run<'_> {
    /// Trains up to the last step, or up to the one during which the run is stopped.
    pub(super) fn steps(&mut self) -> Result<End> {
        // A run that was stopped may have saved a step without the evaluation that is due behind it.
        if self.trainer.num_steps() > 0 {
            let saved = self.checkpoints().path(self.trainer.num_steps());
            self.evaluate_if_due(&mut Some(saved))?;
        }
        // The trainer hands out the metrics of a step while it works on the next one.
        let mut time_of_last = Duration::ZERO;
        while self.trainer.num_steps() < self.total_steps {
            let start = Instant::now();
            let micro_batches = self.data.micro_batches(self.trainer.model(), self.batches.next_step())?;
            let before = self.trainer.step(&micro_batches)?;
            self.record(before, time_of_last)?;
            if self.is_stopped() || self.is_save_due() || self.is_evaluation_due() {
                let last = self.trainer.finish()?;
                self.record(last, start.elapsed())?;
                if let Some(end) = self.between_steps()? {
                    return Ok(end);
                }
            }
            time_of_last = start.elapsed();
        }
        Ok(End::Done)
    }

    /// Saves and evaluates where that is due, and ends the run where it is stopped with something left to do.
    fn between_steps(&mut self) -> Result<Option<End>> {
        let is_last = self.trainer.num_steps() == self.total_steps;
        let mut saved = if self.is_save_due() && !is_last { Some(self.save()?) } else { None };
        let is_evaluated = self.evaluate_if_due(&mut saved)?;
        if self.is_stopped() && !(is_last && is_evaluated) {
            let saved = saved.map_or_else(|| self.save(), Ok)?;
            return Ok(Some(End::Stopped(Some(saved))));
        }
        Ok(None)
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn is_save_due(&self) -> bool {
        self.config.save_every.is_some_and(|every| self.trainer.num_steps().is_multiple_of(every))
    }

    fn is_evaluation_due(&self) -> bool {
        let step = self.trainer.num_steps();
        let is_due = |every: usize| step.is_multiple_of(every);
        step == self.total_steps || self.config.eval_every.is_some_and(is_due)
    }

    /// Evaluates, unless that has been done behind this step; `false` if it is due and the run was stopped meanwhile. What is best so
    /// far is saved, unless that has been done.
    fn evaluate_if_due(&mut self, saved: &mut Option<PathBuf>) -> Result<bool> {
        let step = self.trainer.num_steps();
        let is_done = self.metrics.eval_losses.last().is_some_and(|&(last, _)| last == step);
        let Some(eval) = self.data.eval.as_ref().filter(|_| self.is_evaluation_due() && !is_done) else {
            return Ok(true);
        };
        let mut loss = MeanLoss::default();
        for group in &eval.groups {
            if self.is_stopped() {
                return Ok(false);
            }
            loss.add(self.trainer.model(), &eval.dataset, group.iter().copied())?;
        }
        let eval_loss = loss.mean();
        let best = self.config.keep_best && eval_loss < self.metrics.best.map_or(f64::INFINITY, |best| best.eval_loss);
        let record = EvalRecord { best, ..EvalRecord::new(step, eval_loss) };
        self.metrics.evaluation(&record)?;
        (self.on_event)(Event::Evaluated(record));
        if best {
            match saved {
                // The one that was the best before is so no longer.
                Some(_) => self.checkpoints().prune(step)?,
                None => *saved = Some(self.save()?),
            }
        }
        Ok(true)
    }

    pub(super) fn checkpoints(&self) -> Checkpoints {
        Checkpoints::new(self.output.path(), self.config.keep_last, self.metrics.best)
    }

    /// Saves a checkpoint behind a step whose metrics have been read.
    fn save(&mut self) -> Result<PathBuf> {
        // Metrics first: a checkpoint must not know of steps that the file does not.
        self.metrics.sync()?;
        let trained = (self.trainer.run_state(), self.total_steps);
        let (sums, so_far) = ((self.model_sha256, &*self.data.sha256), (self.progress, self.metrics.best));
        let state = State::new(trained, self.batches.position(), sums, so_far);
        let saved = self.checkpoints().save(&self.trainer, &state, self.options)?;
        self.output.draw_curve(&self.metrics)?;
        (self.on_event)(Event::Saved(saved.clone()));
        Ok(saved)
    }

    fn record(&mut self, metrics: Option<StepMetrics>, time: Duration) -> Result<()> {
        let Some(metrics) = metrics else { return Ok(()) };
        let progress = &mut self.progress;
        if metrics.step == 1 {
            progress.first_loss = metrics.loss;
        }
        progress.last_loss = metrics.loss;
        progress.tokens += metrics.num_tokens;
        progress.seconds += time.as_secs_f64();
        let record = StepRecord {
            step: metrics.step,
            loss: metrics.loss,
            lr: metrics.learning_rate,
            grad_norm: (!metrics.skipped).then_some(metrics.grad_norm),
            loss_scale: self.trainer.run_state().loss_scale.map(|_| metrics.loss_scale),
            tokens: progress.tokens,
            // A clock may stand still between two readings; JSON has no infinity.
            tokens_per_second: metrics.num_tokens as f64 / time.as_secs_f64().max(1e-9),
            peak_bytes: self.trainer.model().device().usage().total_peak_bytes(),
        };
        self.metrics.step(&record)?;
        if let Some(origin) = self.trace.as_ref().and_then(|trace| trace.take_origin(metrics.step)) {
            (self.on_event)(Event::Overflow(origin));
        }
        (self.on_event)(Event::Step(record));
        Ok(())
    }
}
