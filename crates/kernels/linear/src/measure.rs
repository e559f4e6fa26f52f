//! The fastest of several strategies, on the device and the operands at hand.
//!
//! A strategy takes part if its output is that of the rule's, which the tests hold to the oracle: on samples, up to what the order of
//! sums may change. Everything is written into the product's own output; nothing is allocated.

use std::time::Instant;

use cubecl::{
    ir::{ElemType, FloatKind, StorageType},
    prelude::*,
};
use unsloth_common::{Launch, LaunchError};

use crate::{
    product::{Job, Matrix},
    strategy::Strategy,
};

/// Times that each strategy is timed, in turn.
const ROUNDS: usize = 3;
/// Launches that are timed together, so that waiting for the device does not count.
const LAUNCHES: u32 = 4;
/// By how much another strategy has to be faster than the rule's: timings vary, and the rule's is the better known one.
const MARGIN: f64 = 0.97;

/// The strategy that takes the least time. `None` where nothing can be told apart: an output of zeros, or one that is not finite.
///
/// # Errors
/// [`LaunchError::Earlier`] for what was launched before and has failed; that of the rule's launch.
pub(crate) fn fastest<R: Runtime>(
    launch: &Launch<'_, R>,
    job: &Job,
    rule: Strategy,
    others: &[Strategy],
) -> Result<Option<Strategy>, LaunchError> {
    synchronize(launch)?;
    rule.launch(launch, job, job.args.scale)?;
    let Some(expected) = Samples::of(launch, &job.args.out).filter(Samples::tell_apart) else {
        return Ok(None);
    };
    let mut contenders = vec![(rule, f64::INFINITY)];
    for &other in others {
        // With the opposite sign in place: what is not written is seen.
        rule.launch(launch, job, -job.args.scale)?;
        let launched = other.launch(launch, job, job.args.scale).is_ok();
        let actual = Samples::of(launch, &job.args.out);
        if launched && actual.is_some_and(|actual| expected.agree(&actual)) {
            contenders.push((other, f64::INFINITY));
        }
    }
    for _ in 0..ROUNDS {
        for (strategy, least) in &mut contenders {
            *least = least.min(seconds(launch, job, *strategy)?);
        }
    }
    let [(_, of_rule), ..] = contenders[..] else { return Ok(None) };
    let faster = contenders.into_iter().filter(|(_, seconds)| *seconds < MARGIN * of_rule);
    Ok(Some(faster.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(rule, |(strategy, _)| strategy)))
}

/// Waits for the device.
///
/// # Errors
/// [`LaunchError::Earlier`] if something launched has failed.
fn synchronize<R: Runtime>(launch: &Launch<'_, R>) -> Result<(), LaunchError> {
    cubecl::future::block_on(launch.client().sync())
        .map_err(|error| LaunchError::Earlier { kernel: launch.kernel(), message: error.to_string() })
}

/// Seconds of a launch.
fn seconds<R: Runtime>(launch: &Launch<'_, R>, job: &Job, strategy: Strategy) -> Result<f64, LaunchError> {
    synchronize(launch)?;
    let start = Instant::now();
    for _ in 0..LAUNCHES {
        strategy.launch(launch, job, job.args.scale)?;
    }
    synchronize(launch)?;
    Ok(start.elapsed().as_secs_f64() / f64::from(LAUNCHES))
}

/// Elements at the beginning, in the middle and at the end of an output.
struct Samples {
    values: Vec<f32>,
    /// Relative error of rounding to the output's type.
    epsilon: f32,
}

impl Samples {
    /// Of each of the three.
    const LEN: usize = 4096;
    /// Where samples may start: devices copy whole words.
    const ALIGN: usize = 64;

    /// `None` if the device cannot be read, which is how it reports a kernel that has failed.
    fn of<R: Runtime>(launch: &Launch<'_, R>, out: &Matrix) -> Option<Self> {
        let size = out.element.size();
        let len = Self::LEN.min(out.len);
        let mut values = Vec::new();
        for start in [0, (out.len - len) / 2, out.len - len] {
            let start = start / Self::ALIGN * Self::ALIGN;
            let end = out.handle.size_in_used() - ((start + len) * size) as u64;
            let handle = out.handle.clone().offset_start((start * size) as u64).offset_end(end);
            let bytes = launch.client().read_one(handle).ok()?;
            values.extend(bytes.chunks_exact(size).map(|bytes| value(bytes, out.element)));
        }
        let epsilon = match size {
            2 if out.element == ElemType::Float(FloatKind::BF16).into() => f32::powi(2.0, -8),
            2 => f32::powi(2.0, -11),
            _ => 0.0,
        };
        Some(Self { values, epsilon })
    }

    fn largest(&self) -> f32 {
        self.values.iter().fold(0.0, |largest, value| value.abs().max(largest))
    }

    fn tell_apart(&self) -> bool {
        self.values.iter().all(|value| value.is_finite()) && self.largest() > 0.0
    }

    /// Whether others differ by no more than two roundings and another order of the sums, of which each element is as large as the
    /// largest one. Products of tf32, as libraries may make of f32, differ by more.
    fn agree(&self, others: &Self) -> bool {
        const ORDER: f32 = 1.5e-5;
        let order = ORDER * self.largest();
        let pairs = self.values.iter().zip(&others.values);
        self.values.len() == others.values.len()
            && pairs.into_iter().all(|(a, b)| (a - b).abs() <= order + 2.0 * self.epsilon * a.abs())
    }
}

fn value(bytes: &[u8], element: StorageType) -> f32 {
    match *bytes {
        [a, b] if element == ElemType::Float(FloatKind::BF16).into() => half::bf16::from_ne_bytes([a, b]).to_f32(),
        [a, b] => half::f16::from_ne_bytes([a, b]).to_f32(),
        [a, b, c, d] => f32::from_ne_bytes([a, b, c, d]),
        _ => f32::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::Samples;

    fn samples(values: &[f32], epsilon: f32) -> Samples {
        Samples { values: values.to_vec(), epsilon }
    }

    #[test]
    fn only_another_order_of_sums_agrees() {
        let exact = samples(&[100.0, -0.5, 0.0], 0.0);
        assert!(exact.agree(&samples(&[100.0005, -0.5003, 0.0007], 0.0)));
        // The tenth bit of a mantissa, as tf32 has them.
        assert!(!exact.agree(&samples(&[100.05, -0.5, 0.0], 0.0)));
        assert!(!exact.agree(&samples(&[100.0, -0.5, f32::NAN], 0.0)));
        assert!(!exact.agree(&samples(&[100.0, -0.5], 0.0)));
        assert!(!exact.agree(&samples(&[-100.0, 0.5, 0.0], 0.0)));
        let rounded = samples(&[100.0, -0.5, 0.0], f32::powi(2.0, -8));
        assert!(rounded.agree(&samples(&[100.5, -0.502, 0.0], 0.0)));
        assert!(!rounded.agree(&samples(&[101.0, -0.5, 0.0], 0.0)));
    }

    #[test]
    fn zeros_and_infinities_tell_nothing() {
        assert!(samples(&[0.0, 1.0], 0.0).tell_apart());
        assert!(!samples(&[0.0, 0.0], 0.0).tell_apart());
        assert!(!samples(&[f32::INFINITY, 1.0], 0.0).tell_apart());
        assert!(!samples(&[f32::NAN, 1.0], 0.0).tell_apart());
    }
}
