//! The formulas of [`unsloth_core::ops::cross_entropy`], one row of logits at a time.

use unsloth_core::ops::cross_entropy::{IGNORE_INDEX, LossSpec};

use crate::arith::Arith;

/// Values of the forward results.
#[derive(Clone, Debug)]
pub struct Forward {
    /// One number.
    pub loss: f64,
    /// `[tokens]`; 0 for rows without a target.
    pub lse: Vec<f64>,
}

/// `z = softcap * tanh(logit_scale * logits / softcap)`, or `logit_scale * logits`.
fn z(a: &impl Arith, spec: &LossSpec, row: &[f64]) -> Vec<f64> {
    let capped = |logit: &f64| {
        let scaled = a.store(f64::from(spec.logit_scale) * logit);
        spec.softcap.map_or(scaled, |c| a.store(f64::from(c) * (scaled / f64::from(c)).tanh()))
    };
    row.iter().map(capped).collect()
}

/// Loss of logits `[targets.len(), vocab_size]`, and the LSE of each row. Targets are valid.
pub fn forward(a: &impl Arith, spec: &LossSpec, logits: &[f64], targets: &[i32]) -> Forward {
    let vocab_size = logits.len().checked_div(targets.len()).unwrap_or(0);
    let (smoothing, z_loss) = (f64::from(spec.label_smoothing), f64::from(spec.z_loss));
    let (mut nll, mut all_lse) = (Vec::new(), vec![0.0; targets.len()]);
    for (t, &target) in targets.iter().enumerate() {
        if target == IGNORE_INDEX {
            continue;
        }
        let z = z(a, spec, &logits[t * vocab_size..(t + 1) * vocab_size]);
        let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = a.stat(max + a.sum(z.iter().map(|z| (z - max).exp())).ln());
        let mean = a.stat(a.sum(z.iter().copied()) / vocab_size as f64);
        // A class that was masked out by -inf has no part in a loss without smoothing, where `0 * -inf` would be NaN.
        let smoothed = if smoothing == 0.0 { 0.0 } else { smoothing * mean };
        let picked = (1.0 - smoothing) * z[target as usize];
        nll.push(a.stat(lse - picked - smoothed + z_loss * lse * lse));
        all_lse[t] = lse;
    }
    Forward { loss: a.stat(a.sum(nll) / spec.num_targets as f64), lse: all_lse }
}

/// `dlogits`, with the loss scale; rows without a target get 0.
pub fn backward(a: &impl Arith, spec: &LossSpec, logits: &[f64], targets: &[i32], lse: &[f64]) -> Vec<f64> {
    let vocab_size = logits.len().checked_div(targets.len()).unwrap_or(0);
    let (smoothing, z_loss) = (f64::from(spec.label_smoothing), f64::from(spec.z_loss));
    let per_target = f64::from(spec.loss_scale) / spec.num_targets as f64;
    let mut dlogits = vec![0.0; logits.len()];
    for (t, &target) in targets.iter().enumerate() {
        if target == IGNORE_INDEX {
            continue;
        }
        let z = z(a, spec, &logits[t * vocab_size..(t + 1) * vocab_size]);
        for (c, z) in z.iter().enumerate() {
            let softmax = a.store((z - lse[t]).exp());
            let onehot = if c == target as usize { 1.0 } else { 0.0 };
            let wanted = (1.0 - smoothing) * onehot + smoothing / vocab_size as f64;
            let dz = a.store((softmax * (1.0 + 2.0 * z_loss * lse[t]) - wanted) * per_target);
            let slope = spec.softcap.map_or(1.0, |c| 1.0 - (z / f64::from(c)).powi(2));
            dlogits[t * vocab_size + c] = a.store(dz * f64::from(spec.logit_scale) * slope);
        }
    }
    dlogits
}

#[cfg(test)]
mod tests {
    use unsloth_core::DType;

    use super::*;
    use unsloth_testkit::{data::Data, gradcheck};

    use crate::arith::Exact;

    fn close(actual: f64, expected: f64) {
        assert!((actual - expected).abs() < 1e-11, "{actual}, expected {expected}");
    }

    /// Logits `(0, ln 3)`, target 0, and an ignored row; two targets in the whole batch, loss scale 8:
    /// - `lse = ln(1 + 3) = ln 4`, `softmax = (1/4, 3/4)`, `nll = ln 4 - 0`, `loss = ln 4 / 2`
    /// - `dlogits = ((1/4 - 1), 3/4) * 8 / 2 = (-3, 3)`
    ///
    /// With `z_loss = 0.5`: `nll = ln 4 + 0.5 * ln^2 4` and `softmax` is multiplied by `1 + ln 4` in the gradient.
    #[test]
    fn worked_by_hand() {
        let (ln3, ln4) = (3f64.ln(), 4f64.ln());
        let (logits, targets) = ([0.0, ln3, 7.0, -5.0], [0, IGNORE_INDEX]);
        let plain = LossSpec { loss_scale: 8.0, ..LossSpec::mean(2) };
        let Forward { loss, lse } = forward(&Exact, &plain, &logits, &targets);
        close(loss, ln4 / 2.0);
        close(lse[0], ln4);
        assert_eq!(lse[1], 0.0);
        let dlogits = backward(&Exact, &plain, &logits, &targets, &lse);
        for (actual, expected) in dlogits.into_iter().zip([-3.0, 3.0, 0.0, 0.0]) {
            close(actual, expected);
        }
        let z_loss = LossSpec { z_loss: 0.5, ..plain };
        close(forward(&Exact, &z_loss, &logits, &targets).loss, (ln4 + 0.5 * ln4 * ln4) / 2.0);
        let dlogits = backward(&Exact, &z_loss, &logits, &targets, &lse);
        close(dlogits[0], 4.0 * ((1.0 + ln4) / 4.0 - 1.0));
        close(dlogits[1], 4.0 * (1.0 + ln4) * 0.75);
    }

    /// `torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)` of PyTorch 2.15 in f64, gradient by autograd.
    #[test]
    fn equals_pytorch() {
        // ((i * 5 + 3) mod 17 - 8) / 4, three rows of five.
        let logits: Vec<f64> = (0..15).map(|i| f64::from((i * 5 + 3) % 17 - 8) / 4.0).collect();
        let targets = [1, IGNORE_INDEX, 4];
        let spec = LossSpec { label_smoothing: 0.1, ..LossSpec::mean(2) };
        let Forward { loss, lse } = forward(&Exact, &spec, &logits, &targets);
        // The smoothing is an f32, PyTorch's is an f64.
        let tolerance = 1e-8;
        assert!((loss - GOLDEN_LOSS).abs() < tolerance, "{loss}");
        let dlogits = backward(&Exact, &spec, &logits, &targets, &lse);
        assert!(dlogits.iter().zip(GOLDEN_DLOGITS).all(|(a, g)| (a - g).abs() < tolerance), "{dlogits:?}");
    }

    #[test]
    fn gradients_equal_central_differences() {
        let plain = LossSpec::mean(7);
        let all = [
            plain,
            LossSpec { loss_scale: 16.0, ..plain },
            LossSpec { logit_scale: 0.25, ..plain },
            LossSpec { softcap: Some(2.0), ..plain },
            LossSpec { label_smoothing: 0.2, ..plain },
            LossSpec { z_loss: 0.3, ..plain },
            LossSpec {
                loss_scale: 4.0,
                logit_scale: 1.5,
                softcap: Some(3.0),
                label_smoothing: 0.1,
                z_loss: 0.05,
                ..plain
            },
        ];
        let targets = [2, IGNORE_INDEX, 0, 4];
        let logits = Data::new(3).normal(20, 1.5, DType::F32);
        for spec in all {
            let lse = forward(&Exact, &spec, &logits, &targets).lse;
            let dlogits = backward(&Exact, &spec, &logits, &targets, &lse);
            let loss = |x: &[f64]| f64::from(spec.loss_scale) * forward(&Exact, &spec, x, &targets).loss;
            gradcheck::check("logits", &logits, loss, &dlogits).unwrap();
        }
    }

    const GOLDEN_LOSS: f64 = 1.985085811141;
    const GOLDEN_DLOGITS: [f64; 15] = [
        0.015778022486,
        -0.370025860758,
        0.304040603256,
        0.005635160985,
        0.044572074031,
        0.000000000000,
        0.000000000000,
        0.000000000000,
        0.000000000000,
        0.000000000000,
        0.015778022486,
        0.079974139242,
        0.304040603256,
        0.005635160985,
        -0.405427925969,
    ];
}
