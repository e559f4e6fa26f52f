//! `metrics.jsonl`: one line for each step and each evaluation, continued when a run is resumed.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, atomic};

/// A line of `metrics.jsonl` about a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step, from 1.
    pub step: usize,
    /// Mean loss over all targets of the step.
    pub loss: f32,
    /// Learning rate.
    pub lr: f32,
    /// Norm of all gradients before clipping. `None`, in the file `null`: a gradient was not finite under its loss scale, and the
    /// step has changed nothing.
    pub grad_norm: Option<f32>,
    /// What the gradients were multiplied by while they were computed; absent without loss scaling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f32>,
    /// Tokens trained on so far, this step included.
    pub tokens: usize,
    /// Tokens of this step over its time.
    pub tokens_per_second: f64,
    /// Most bytes held at once so far, by the ledger of the device.
    pub peak_bytes: u64,
}

/// A line of `metrics.jsonl` about an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// The step behind which the model was evaluated.
    pub step: usize,
    /// Mean loss over all targets of the evaluation data.
    pub eval_loss: f64,
    /// `exp(eval_loss)`
    pub eval_perplexity: f64,
    /// Whether no loss before it was as small, in a run that keeps the best; absent if not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub best: bool,
}

impl EvalRecord {
    pub(super) fn new(step: usize, eval_loss: f64) -> Self {
        Self { step, eval_loss, eval_perplexity: eval_loss.exp(), best: false }
    }
}

/// The evaluation with the smallest loss so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// The step behind which the model was evaluated.
    pub step: usize,
    /// Mean loss over all targets of the evaluation data.
    pub eval_loss: f64,
}

/// Points of a curve: steps and losses.
pub(super) type Points = Vec<(usize, f64)>;

/// The file, open for the next line, and the losses that stand in it.
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
    pub(super) losses: Points,
    pub(super) eval_losses: Points,
    pub(super) best: Option<Best>,
}

impl Metrics {
    /// Starts an empty file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        Ok(Self { path, file, losses: Vec::new(), eval_losses: Vec::new(), best: None })
    }

    /// Keeps the lines up to `step` as they are and goes on behind them. A line of a later step, a repeated one and one that
    /// was cut off are dropped.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn resume(path: PathBuf, step: usize) -> Result<Self> {
        let text = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            bytes => bytes.map_err(Error::io("read", &path))?,
        };
        let (mut kept, mut losses, mut eval_losses, mut best) = (Vec::new(), Points::new(), Points::new(), None);
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            let (points, point, is_best) = match parse(line) {
                Some(Line::Step(record)) => (&mut losses, (record.step, f64::from(record.loss)), false),
                Some(Line::Eval(record)) => (&mut eval_losses, (record.step, record.eval_loss), record.best),
                None => continue,
            };
            let is_next = points.last().is_none_or(|&(last, _)| last < point.0);
            if is_next && point.0 <= step {
                points.push(point);
                best = is_best.then_some(Best { step: point.0, eval_loss: point.1 }).or(best);
                kept.extend_from_slice(line);
            }
        }
        atomic::write(&path, &kept)?;
        let file = File::options().append(true).open(&path).map_err(Error::io("write", &path))?;
        Ok(Self { path, file, losses, eval_losses, best })
    }

    /// Adds a step.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.losses.push((record.step, f64::from(record.loss)));
        self.push(record)
    }

    /// Adds an evaluation.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn evaluation(&mut self, record: &EvalRecord) -> Result<()> {
        self.eval_losses.push((record.step, record.eval_loss));
        if record.best {
            self.best = Some(Best { step: record.step, eval_loss: record.eval_loss });
        }
        self.push(record)
    }

    /// Flushes the file to the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("write", &self.path))
    }

    fn push(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record).map_err(Error::json(&self.path))?;
        line.push(b'\n');
        // One unbuffered write: a reader, or a crash, never sees half a line.
        self.file.write_all(&line).map_err(Error::io("write", &self.path))
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Step(StepRecord),
    Eval(EvalRecord),
}

/// A whole line; one without an end was cut off.
fn parse(line: &[u8]) -> Option<Line> {
    serde_json::from_slice(line.strip_suffix(b"\n")?).ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn record(step: usize) -> StepRecord {
        let loss = 1.0 / step as f32;
        // A skipped step among them.
        let (grad_norm, loss_scale) = if step == 2 { (None, Some(65_536.0)) } else { (Some(2.0), None) };
        StepRecord { step, loss, lr: 0.1, grad_norm, loss_scale, tokens: 3, tokens_per_second: 4.5, peak_bytes: 6 }
    }

    fn eval(step: usize) -> EvalRecord {
        EvalRecord { step, eval_loss: 0.1 * step as f64, eval_perplexity: 2.0, best: step == 2 }
    }

    fn write(path: &Path, steps: std::ops::RangeInclusive<usize>) {
        let mut metrics = Metrics::create(path.to_owned()).unwrap();
        for step in steps {
            metrics.step(&record(step)).unwrap();
            if step % 2 == 0 {
                metrics.evaluation(&eval(step)).unwrap();
            }
        }
    }

    #[test]
    fn a_resumed_file_equals_one_that_was_never_interrupted() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
        write(&whole, 1..=6);
        write(&parts, 1..=5);
        let cut_off = br#"{"step":6,"loss":0.1"#;
        fs::write(&parts, [&fs::read(&parts).unwrap()[..], cut_off].concat()).unwrap();
        let mut metrics = Metrics::resume(parts.clone(), 3).unwrap();
        assert_eq!(3 - metrics.losses.len(), 0);
        for step in 4..=6 {
            metrics.step(&record(step)).unwrap();
            if step % 2 == 0 {
                metrics.evaluation(&eval(step)).unwrap();
            }
        }
        assert_eq!(fs::read_to_string(&parts).unwrap(), fs::read_to_string(&whole).unwrap());
        let again = Metrics::resume(whole, 6).unwrap();
        assert_eq!((metrics.losses, metrics.eval_losses), (again.losses, again.eval_losses));
        assert_eq!([metrics.best, again.best], [Some(Best { step: 2, eval_loss: 0.2 }); 2]);
    }

    #[test]
    fn what_is_missing_is_counted_and_what_is_repeated_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        write(&path, 1..=3);
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        fs::write(&path, format!("{}\nnonsense\n{}\n{}\n", lines[0], lines[0], lines[3])).unwrap();
        let metrics = Metrics::resume(path.clone(), 3).unwrap();
        assert_eq!(3 - metrics.losses.len(), 1);
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n{}\n", lines[0], lines[3]));
        fs::remove_file(&path).unwrap();
        assert_eq!(3 - Metrics::resume(path, 3).unwrap().losses.len(), 3);
    }
}
