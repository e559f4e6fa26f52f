//! Timing of contenders in turn: one sample each, round by round, so that all see the same moods of the machine.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use unsloth_rs::Device;

use crate::{case::Run, machine};

/// How long is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// At least so many samples of each contender.
    pub min_samples: usize,
    /// At most so many.
    pub max_samples: usize,
    /// More than the fewest samples only while less than this has passed; three are enough where they take several times as long.
    pub time: Duration,
}

impl Effort {
    /// For a first impression.
    pub const QUICK: Self = Self { min_samples: 3, max_samples: 9, time: Duration::from_millis(150) };
    /// For numbers to keep.
    pub const FULL: Self = Self { min_samples: 5, max_samples: 50, time: Duration::from_millis(1500) };
    /// For numbers to keep of a device that others leave alone: its times vary little, and a sample is many calls.
    pub const DEVICE: Self = Self { min_samples: 5, max_samples: 50, time: Duration::from_millis(400) };
}

/// Times of the samples of one contender.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Seconds; half of the samples are faster.
    pub median_s: f64,
    /// Seconds; nine of ten samples are faster.
    pub p90_s: f64,
    /// Seconds of the fastest.
    pub min_s: f64,
    /// How many there are.
    pub samples: usize,
}

impl Timing {
    /// `None` for no samples.
    pub fn of(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_by(f64::total_cmp);
        let (&min_s, samples) = (seconds.first()?, seconds.len());
        let median_s = (seconds[(samples - 1) / 2] + seconds[samples / 2]) / 2.0;
        let p90_s = seconds[(samples * 9).div_ceil(10) - 1];
        Some(Self { median_s, p90_s, min_s, samples })
    }
}

/// Somebody whose times are compared.
pub trait Contender {
    /// Seconds of one run.
    ///
    /// # Errors
    /// Whatever the run refuses.
    fn sample(&mut self) -> Result<f64>;
}

/// A [`Run`] of this process.
pub struct InProcess<'a> {
    run: Run,
    /// What to wait for after a call.
    device: Option<&'a Device>,
    /// Put between the runs, so that each finds its inputs in memory rather than in a cache.
    eviction: Option<&'a Eviction>,
    /// Calls of one sample.
    repeat: u32,
}

impl<'a> InProcess<'a> {
    /// On the processor.
    pub fn on_cpu(run: Run, eviction: &'a Eviction) -> Self {
        Self { run, device: None, eviction: Some(eviction), repeat: 1 }
    }

    /// On a device that works on its own: so many calls are sent to it that waiting for it does not count, but at most for
    /// about 10 ms.
    ///
    /// # Errors
    /// Whatever the run refuses.
    pub fn on_device(run: Run, device: &'a Device) -> Result<Self> {
        let mut contender = Self { run, device: Some(device), eviction: None, repeat: 1 };
        contender.sample()?;
        let once = contender.sample()?;
        contender.repeat = (0.01 / once.max(1e-9)).clamp(1.0, 100.0) as u32;
        Ok(contender)
    }
}

impl Contender for InProcess<'_> {
    fn sample(&mut self) -> Result<f64> {
        if let Some(eviction) = self.eviction {
            eviction.evict();
        }
        let call = match &mut self.run {
            Run::Clocked(run) => return Ok(run()?.as_secs_f64()),
            Run::Call(call) => call,
        };
        let start = Instant::now();
        for _ in 0..self.repeat {
            call()?;
        }
        self.device.map_or(Ok(()), Device::synchronize)?;
        Ok(start.elapsed().as_secs_f64() / f64::from(self.repeat))
    }
}

/// Times all contenders, who have run once before.
///
/// # Errors
/// The first failure of a run.
pub fn in_turn(contenders: &mut [Box<dyn Contender + '_>], effort: Effort) -> Result<Vec<Timing>> {
    let start = Instant::now();
    let mut seconds = vec![Vec::new(); contenders.len()];
    for round in 0..effort.max_samples {
        let (is_over, is_long) = (start.elapsed() > effort.time, start.elapsed() > 5 * effort.time);
        if round >= effort.min_samples && is_over || round >= 3 && is_long {
            break;
        }
        for (contender, seconds) in contenders.iter_mut().zip(&mut seconds) {
            seconds.push(contender.sample()?);
        }
    }
    let timing = |seconds| Timing::of(seconds).ok_or_else(|| anyhow::anyhow!("no samples were asked for"));
    seconds.into_iter().map(timing).collect()
}

/// A buffer larger than the caches, read on all threads to drive out what is in them.
pub struct Eviction(Vec<u64>);

impl Eviction {
    /// As large as it takes on this machine.
    pub fn new() -> Self {
        Self(vec![1; machine::beyond_caches() / size_of::<u64>()])
    }

    fn evict(&self) {
        use rayon::prelude::*;
        // One word of each cache line brings all of it.
        let words = self.0.par_chunks(1 << 16).map(|chunk| chunk.iter().step_by(64 / size_of::<u64>()).sum::<u64>());
        let sum: u64 = words.sum();
        std::hint::black_box(sum);
    }
}

impl Default for Eviction {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_statistics_by_hand() {
        assert_eq!(Timing::of(vec![]), None);
        let one = Timing { median_s: 2.0, p90_s: 2.0, min_s: 2.0, samples: 1 };
        assert_eq!(Timing::of(vec![2.0]), Some(one));
        let ten = Timing { median_s: 5.5, p90_s: 9.0, min_s: 1.0, samples: 10 };
        assert_eq!(Timing::of((1..=10).rev().map(f64::from).collect()), Some(ten));
    }

    struct Logged<'a>(&'static str, &'a std::cell::RefCell<Vec<&'static str>>);

    impl Contender for Logged<'_> {
        fn sample(&mut self) -> Result<f64> {
            self.1.borrow_mut().push(self.0);
            Ok(1.0)
        }
    }

    #[test]
    fn contenders_take_turns() {
        let log = std::cell::RefCell::default();
        let mut both: [Box<dyn Contender + '_>; 2] = [Box::new(Logged("a", &log)), Box::new(Logged("b", &log))];
        let effort = Effort { min_samples: 2, max_samples: 2, time: Duration::ZERO };
        let timings = in_turn(&mut both, effort).unwrap();
        drop(both);
        assert_eq!(timings.iter().map(|timing| timing.samples).collect::<Vec<_>>(), [2, 2]);
        assert_eq!(log.into_inner(), ["a", "b", "a", "b"]);
    }
}
