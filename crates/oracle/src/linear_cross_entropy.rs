//! [`unsloth_core::ops::linear_cross_entropy`] as what it stands for: a linear layer, a cross entropy, and their gradients.

use unsloth_core::ops::cross_entropy::LossSpec;

use super::{
    cross_entropy,
    linear::{self, Dims},
};
use crate::arith::Arith;

/// Values of the results.
#[derive(Clone, Debug)]
pub struct Forward {
    /// One number, without the loss scale.
    pub loss: f64,
    /// `[tokens, hidden_size]`, with the loss scale.
    pub dx: Vec<f64>,
    /// `[vocab_size, hidden_size]`: what it held before plus the contribution of this call, with the loss scale.
    pub dweight: Vec<f64>,
}

/// Loss and gradients of logits `x W^T`, where `dims` is `tokens x hidden_size x vocab_size`.
pub fn forward(
    a: &impl Arith,
    (spec, dims): (&LossSpec, Dims),
    (x, weight, targets): (&[f64], &[f64], &[i32]),
    dweight_before: &[f64],
) -> Forward {
    let logits = linear::forward(a, dims, x, weight, None);
    let cross_entropy::Forward { loss, lse } = cross_entropy::forward(a, spec, &logits, targets);
    let dlogits = cross_entropy::backward(a, spec, &logits, targets, &lse);
    let dx = linear::input_gradient(a, dims, &dlogits, weight);
    let dweight = linear::weight_gradient(a, dims, &dlogits, x, dweight_before);
    Forward { loss, dx, dweight }
}

#[cfg(test)]
mod tests {
    use unsloth_core::{DType, ops::cross_entropy::IGNORE_INDEX};

    use super::*;
    use unsloth_testkit::{data::Data, gradcheck};

    use crate::arith::Exact;

    /// One token `x = 2`, `W = (0, ln(3) / 2)`, so logits `(0, ln 3)`, target 0, loss scale 4: `loss = ln 4`,
    /// `dlogits = (-3, 3)`, `dx = 3 ln(3) / 2`, `dweight = 1 + (-6, 6)`.
    #[test]
    fn worked_by_hand() {
        let dims = Dims { rows: 1, in_features: 1, out_features: 2 };
        let spec = LossSpec { loss_scale: 4.0, ..LossSpec::mean(1) };
        let half_ln3 = 3f64.ln() / 2.0;
        let results = forward(&Exact, (&spec, dims), (&[2.0], &[0.0, half_ln3], &[0]), &[1.0, 1.0]);
        let expected = [(results.loss, 4f64.ln()), (results.dx[0], 3.0 * half_ln3)];
        let dweight = results.dweight.into_iter().zip([-5.0, 7.0]);
        for (actual, expected) in expected.into_iter().chain(dweight) {
            assert!((actual - expected).abs() < 1e-14, "{actual}, expected {expected}");
        }
    }

    #[test]
    fn gradients_equal_central_differences() {
        let dims = Dims { rows: 4, in_features: 3, out_features: 5 };
        let spec = LossSpec {
            num_targets: 3,
            loss_scale: 2.0,
            logit_scale: 0.5,
            softcap: Some(4.0),
            label_smoothing: 0.1,
            z_loss: 0.02,
        };
        let mut data = Data::new(4);
        let (x, weight) = (data.normal(12, 1.0, DType::F32), data.normal(15, 1.0, DType::F32));
        let targets = [1, IGNORE_INDEX, 4, 0];
        let run = |x: &[f64], weight: &[f64]| forward(&Exact, (&spec, dims), (x, weight, &targets), &[0.0; 15]);
        let Forward { dx, dweight, .. } = run(&x, &weight);
        gradcheck::check("x", &x, |x| 2.0 * run(x, &weight).loss, &dx).unwrap();
        gradcheck::check("weight", &weight, |weight| 2.0 * run(&x, weight).loss, &dweight).unwrap();
    }
}
