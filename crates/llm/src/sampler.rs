//! Choosing the next token from logits.
//!
//! The filters work one after another in the order of transformers, each on what the one before it left:
//! 1. temperature: the logits are divided by it;
//! 2. top-k: the k largest logits stay, and what equals the smallest of them;
//! 3. top-p: the fewest tokens, most likely first, whose probabilities reach p;            Holtzman et al. 2020, arXiv:1904.09751
//! 4. min-p: tokens at least min-p times as likely as the most likely one.                  Nguyen et al. 2024, arXiv:2407.01082
//!
//! The most likely token always stays. One of those left is drawn by their probabilities with a number that depends on the seed and
//! the position alone.

use unsloth_core::rng::Philox;

use crate::{Error, Result};

/// Stream of the draws, apart from those of the data's order and of new adapters.
const DRAW_STREAM: u32 = 0x6472_6177;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits, 0 or more. 0 is greedy: always the most likely token, the lowest id among equals.
    pub temperature: f64,
    /// How many of the most likely tokens stay, at least 1. `None`: all.
    pub top_k: Option<usize>,
    /// Probability that the tokens which stay have to reach, in `[0, 1]`. `None` and 1: all stay.
    pub top_p: Option<f64>,
    /// Smallest probability relative to that of the most likely token, in `[0, 1]`. `None` and 0: all stay.
    pub min_p: Option<f64>,
    /// Of the draws.
    pub seed: u64,
}

impl Sampling {
    /// The most likely token each time.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: None, top_p: None, min_p: None, seed: 0 };

    /// # Errors
    /// [`Error::InvalidOption`], naming the field.
    pub fn validate(&self) -> Result<()> {
        let invalid = |field, value: f64, rule: &str| {
            Err(Error::InvalidOption { field, value: value.to_string(), rule: rule.to_owned() })
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return invalid("temperature", self.temperature, "0 (greedy) or more, and finite");
        }
        if self.top_k == Some(0) {
            return invalid("top_k", 0.0, "at least 1");
        }
        for (field, share) in [("top_p", self.top_p), ("min_p", self.min_p)] {
            if let Some(share) = share.filter(|share| !(0.0..=1.0).contains(share)) {
                return invalid(field, share, "in [0, 1]");
            }
        }
        Ok(())
    }

    /// Index of the token behind `position` tokens; `None` if the logits are not numbers, or none is finite.
    pub(crate) fn choose(&self, logits: &[f32], position: usize) -> Option<usize> {
        let candidates = self.candidates(logits)?;
        let block = Philox::new(self.seed, DRAW_STREAM).block([position as u32, (position as u64 >> 32) as u32, 0, 0]);
        // As many bits as an f64 holds, so that no token of a large vocabulary is out of reach.
        let bits = (u64::from(block[0]) << 32 | u64::from(block[1])) >> 11;
        let uniform = bits as f64 / (1u64 << 53) as f64;
        let mut reached = 0.0;
        let drawn = candidates.iter().find(|candidate| {
            reached += candidate.probability;
            uniform < reached
        });
        // Rounding may leave the sum a little below 1.
        drawn.or(candidates.last()).map(|candidate| candidate.index)
    }

    /// The tokens that may be drawn with their probabilities, which sum to 1, by index; `None` as for the choice.
    pub fn distribution(&self, logits: &[f32]) -> Option<Vec<(usize, f64)>> {
        let mut candidates = self.candidates(logits)?;
        candidates.sort_unstable_by_key(|candidate| candidate.index);
        Some(candidates.into_iter().map(|Candidate { index, probability, .. }| (index, probability)).collect())
    }

    /// What the filters leave. Never empty.
    fn candidates(&self, logits: &[f32]) -> Option<Vec<Candidate>> {
        let best = most_likely(logits)?;
        let largest = f64::from(logits[best]);
        if self.temperature == 0.0 {
            return Some(vec![Candidate { index: best, logit: largest, probability: 1.0 }]);
        }
        if !largest.is_finite() {
            return None;
        }
        // Relative to the largest, so that no exponential overflows; a softmax does not change by it.
        let scaled = |(index, &logit)| Candidate {
            index,
            logit: (f64::from(logit) - largest) / self.temperature,
            probability: 0.0,
        };
        let mut candidates: Vec<Candidate> = logits.iter().enumerate().map(scaled).collect();
        if let Some(top_k) = self.top_k.filter(|&top_k| top_k < candidates.len()) {
            let (_, least, _) = candidates.select_nth_unstable_by(top_k - 1, Candidate::likelier);
            let least = least.logit;
            candidates.retain(|candidate| candidate.logit >= least);
        }
        normalise(&mut candidates);
        if let Some(top_p) = self.top_p.filter(|&top_p| top_p < 1.0) {
            candidates.sort_unstable_by(Candidate::likelier);
            keep_nucleus(&mut candidates, top_p);
            normalise(&mut candidates);
        }
        if let Some(min_p) = self.min_p {
            // Probabilities relate as exponentials do, and that of the largest logit, 0, is 1.
            candidates.retain(|candidate| candidate.logit.exp() >= min_p);
            normalise(&mut candidates);
        }
        Some(candidates)
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    index: usize,
    /// Over the temperature, less the largest: at most 0.
    logit: f64,
    probability: f64,
}

impl Candidate {
    /// Most likely first, lower indices first among equals. Logits are not NaN.
    fn likelier(&self, other: &Self) -> std::cmp::Ordering {
        other.logit.total_cmp(&self.logit).then(self.index.cmp(&other.index))
    }
}

/// Makes the probabilities a softmax over the candidates.
fn normalise(candidates: &mut [Candidate]) {
    let sum: f64 = candidates.iter().map(|candidate| candidate.logit.exp()).sum();
    candidates.iter_mut().for_each(|candidate| candidate.probability = candidate.logit.exp() / sum);
}

/// Drops, of sorted candidates, those behind which `1 - top_p` or less is left, themselves included. The sum runs from the least
/// likely one, as in transformers: from the other end, rounding would decide differently.
fn keep_nucleus(candidates: &mut Vec<Candidate>, top_p: f64) {
    let mut tail = 0.0;
    let is_dropped = |candidate: &&Candidate| {
        tail += candidate.probability;
        tail <= 1.0 - top_p
    };
    let num_dropped = candidates.iter().rev().take_while(is_dropped).count();
    candidates.truncate((candidates.len() - num_dropped).max(1));
}

/// Position of the largest logit, the first among equals; `None` if there is a NaN, which compares with nothing, or no logit.
fn most_likely(logits: &[f32]) -> Option<usize> {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if logit > logits[best] {
            best = id;
        }
    }
    (!logits.is_empty()).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };

    /// Logits of these probabilities.
    fn logits(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|probability| probability.ln()).collect()
    }

    #[track_caller]
    fn leaves(sampling: Sampling, probabilities: &[f32], expected: &[(usize, f64)]) {
        let found = sampling.distribution(&logits(probabilities)).unwrap();
        let close = |(found, expected): (&(usize, f64), &(usize, f64))| {
            found.0 == expected.0 && (found.1 - expected.1).abs() < 1e-6
        };
        assert!(found.len() == expected.len() && found.iter().zip(expected).all(close), "{found:?}");
    }

    /// Each of these can be worked out on paper.
    #[test]
    fn each_filter() {
        let p = [0.1, 0.4, 0.2, 0.3];
        leaves(PLAIN, &p, &[(0, 0.1), (1, 0.4), (2, 0.2), (3, 0.3)]);
        // exp(logit / 0.5) squares each: 0.01, 0.16, 0.04, 0.09 over their sum 0.30.
        let squared = [(0, 0.01 / 0.3), (1, 0.16 / 0.3), (2, 0.04 / 0.3), (3, 0.09 / 0.3)];
        leaves(Sampling { temperature: 0.5, ..PLAIN }, &p, &squared);
        leaves(Sampling { top_k: Some(2), ..PLAIN }, &p, &[(1, 4.0 / 7.0), (3, 3.0 / 7.0)]);
        leaves(Sampling { top_k: Some(9), ..PLAIN }, &p, &[(0, 0.1), (1, 0.4), (2, 0.2), (3, 0.3)]);
        // 0.4 is not 0.65, nor is 0.4 + 0.3; with 0.2 it is reached.
        leaves(Sampling { top_p: Some(0.75), ..PLAIN }, &p, &[(1, 4.0 / 9.0), (2, 2.0 / 9.0), (3, 3.0 / 9.0)]);
        leaves(Sampling { top_p: Some(0.65), ..PLAIN }, &p, &[(1, 4.0 / 7.0), (3, 3.0 / 7.0)]);
        leaves(Sampling { top_p: Some(0.0), ..PLAIN }, &p, &[(1, 1.0)]);
        // 0.6 * 0.4 is above 0.2 and below 0.3.
        leaves(Sampling { min_p: Some(0.6), ..PLAIN }, &p, &[(1, 4.0 / 7.0), (3, 3.0 / 7.0)]);
        leaves(Sampling { min_p: Some(1.0), ..PLAIN }, &p, &[(1, 1.0)]);
        leaves(Sampling::GREEDY, &p, &[(1, 1.0)]);
    }

    #[test]
    fn a_filter_works_on_what_the_one_before_it_left() {
        let p = [0.1, 0.4, 0.2, 0.3];
        // Top-k leaves 4/9, 3/9, 2/9: 0.75 is reached by the first two. Without top-k it is not.
        let both = Sampling { top_k: Some(3), top_p: Some(0.75), ..PLAIN };
        leaves(both, &p, &[(1, 4.0 / 7.0), (3, 3.0 / 7.0)]);
        // At temperature 0.5 the shares are 16, 9, 4 and 1 of 30: min-p 0.5 keeps 9, though 0.7 would keep 0.3 of 0.4 untempered.
        leaves(Sampling { temperature: 0.5, min_p: Some(0.7), ..PLAIN }, &p, &[(1, 1.0)]);
        leaves(Sampling { min_p: Some(0.7), ..PLAIN }, &p, &[(1, 4.0 / 7.0), (3, 3.0 / 7.0)]);
    }

    #[test]
    fn equals() {
        // Top-k keeps all that equal its smallest, top-p takes lower ids first, greedy the lowest.
        let p = [0.2, 0.3, 0.2, 0.3];
        leaves(Sampling { top_k: Some(1), ..PLAIN }, &p, &[(1, 0.5), (3, 0.5)]);
        leaves(Sampling { top_p: Some(0.2), ..PLAIN }, &p, &[(1, 1.0)]);
        leaves(Sampling { top_p: Some(0.7), ..PLAIN }, &p, &[(0, 0.25), (1, 0.375), (3, 0.375)]);
        leaves(Sampling::GREEDY, &p, &[(1, 1.0)]);
    }

    #[test]
    fn extreme_logits() {
        let infinite = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY];
        assert_eq!(PLAIN.distribution(&infinite).unwrap(), [(0, 0.0), (1, 1.0), (2, 0.0)]);
        assert_eq!((0..100).map(|position| PLAIN.choose(&infinite, position)).max(), Some(Some(1)));
        assert_eq!(PLAIN.distribution(&[3e38, -3e38]).unwrap(), [(0, 1.0), (1, 0.0)]);
        let cold = Sampling { temperature: 1e-300, ..PLAIN };
        assert_eq!(cold.distribution(&[1.0, 1.5]).unwrap(), [(0, 0.0), (1, 1.0)]);
        for bad in [&[f32::NAN, 1.0][..], &[f32::NEG_INFINITY; 2], &[f32::INFINITY, 0.0], &[]] {
            assert_eq!(PLAIN.choose(bad, 0), None, "{bad:?}");
        }
        assert_eq!(Sampling::GREEDY.choose(&[0.0, f32::NAN], 0), None);
        assert_eq!(Sampling::GREEDY.choose(&[0.0, f32::INFINITY], 0), Some(1));
    }

    /// Shares of 100000 draws. The chi-square statistic with 3 degrees of freedom is below 16.27 with probability 0.999.
    #[test]
    fn draws_follow_the_distribution() {
        let probabilities = [0.05, 0.5, 0.15, 0.3];
        let logits = logits(&probabilities);
        for seed in [0, 1, u64::MAX] {
            let sampling = Sampling { seed, ..PLAIN };
            let mut counts = [0u32; 4];
            (0..100_000).for_each(|position| counts[sampling.choose(&logits, position).unwrap()] += 1);
            let terms = counts.iter().zip(probabilities).map(|(&count, probability)| {
                let expected = 100_000.0 * f64::from(probability);
                (f64::from(count) - expected).powi(2) / expected
            });
            let chi_square: f64 = terms.sum();
            assert!(chi_square < 16.27, "seed {seed}: {chi_square}, {counts:?}");
        }
    }

    #[test]
    fn draws_depend_on_seed_and_position_alone() {
        let logits = vec![0.0; 1000];
        let draws = |seed, from: usize| -> Vec<_> {
            let sampling = Sampling { seed, ..PLAIN };
            (from..from + 50).map(|position| sampling.choose(&logits, position).unwrap()).collect()
        };
        assert_eq!(draws(7, 0), draws(7, 0));
        assert_eq!(draws(7, 0)[10..], draws(7, 10)[..40]);
        assert_ne!(draws(7, 0), draws(8, 0));
        assert_ne!(draws(7, 0), draws(7 + (1 << 40), 0));
    }

    #[test]
    fn every_field_is_checked() {
        let cases = [
            ("temperature = -1, must be 0 (greedy) or more", Sampling { temperature: -1.0, ..PLAIN }),
            ("temperature = NaN", Sampling { temperature: f64::NAN, ..PLAIN }),
            ("temperature = inf", Sampling { temperature: f64::INFINITY, ..PLAIN }),
            ("top_k = 0, must be at least 1", Sampling { top_k: Some(0), ..PLAIN }),
            ("top_p = 1.5, must be in [0, 1]", Sampling { top_p: Some(1.5), ..PLAIN }),
            ("top_p = NaN", Sampling { top_p: Some(f64::NAN), ..PLAIN }),
            ("min_p = -0.1, must be in [0, 1]", Sampling { min_p: Some(-0.1), ..PLAIN }),
        ];
        for (message, sampling) in cases {
            let found = sampling.validate().unwrap_err().to_string();
            assert!(found.starts_with(message), "{found}");
        }
        Sampling { top_k: Some(1), top_p: Some(0.0), min_p: Some(1.0), ..PLAIN }.validate().unwrap();
    }
}
