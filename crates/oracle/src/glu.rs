//! Reference of [`unsloth_core::ops::glu`].

use std::f64::consts::PI;

use unsloth_core::ops::glu::Activation;

use crate::arith::Arith;

/// The activation and its derivative at `x`.
pub fn activation(activation: Activation, x: f64) -> (f64, f64) {
    match activation {
        Activation::Silu => {
            let sigmoid = 1.0 / (1.0 + (-x).exp());
            (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
        }
        Activation::GeluTanh => {
            let root = (2.0 / PI).sqrt();
            let tanh = (root * (x + 0.044715 * x.powi(3))).tanh();
            let slope = root * (1.0 + 3.0 * 0.044715 * x * x);
            // Where tanh is 1 the slope may be infinite and does not count.
            let bend = if tanh.abs() == 1.0 { 0.0 } else { 0.5 * x * (1.0 - tanh * tanh) * slope };
            (0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + bend)
        }
        Activation::GeluErf => {
            let cumulative = 0.5 * (1.0 + erf(x / 2f64.sqrt()));
            let density = (-0.5 * x * x).exp() / (2.0 * PI).sqrt();
            (x * cumulative, cumulative + if density == 0.0 { 0.0 } else { x * density })
        }
    }
}

/// Error function to about 1e-15: its Taylor series near 0, the continued fraction of its complement (Abramowitz & Stegun
/// 7.1.5 and 7.1.14) elsewhere.
pub fn erf(x: f64) -> f64 {
    if x.abs() < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..100 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        2.0 / PI.sqrt() * sum
    } else {
        let mut fraction = x.abs();
        for n in (1..200).rev() {
            fraction = x.abs() + 0.5 * f64::from(n) / fraction;
        }
        x.signum() * (1.0 - (-x * x).exp() / (PI.sqrt() * fraction))
    }
}

/// `out = act(gate) * up`
pub fn forward<A: Arith>(arith: &A, gate: &[f64], up: &[f64], act: Activation) -> Vec<f64> {
    gate.iter().zip(up).map(|(&gate, &up)| arith.store(arith.store(activation(act, gate).0) * up)).collect()
}

/// Gradients of the two inputs.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Gradient of `gate`.
    pub dgate: Vec<f64>,
    /// Gradient of `up`.
    pub dup: Vec<f64>,
}

/// `dgate = dout * up * act'(gate)`, `dup = dout * act(gate)`
pub fn backward<A: Arith>(arith: &A, dout: &[f64], (gate, up): (&[f64], &[f64]), act: Activation) -> Gradients {
    let mut gradients = Gradients { dgate: vec![], dup: vec![] };
    for i in 0..gate.len() {
        let (value, slope) = activation(act, gate[i]);
        gradients.dgate.push(arith.store(arith.store(dout[i] * up[i]) * arith.store(slope)));
        gradients.dup.push(arith.store(dout[i] * arith.store(value)));
    }
    gradients
}

#[cfg(test)]
mod tests {
    use unsloth_core::DType;

    use super::*;
    use unsloth_testkit::{
        data::Data,
        gradcheck::{self, dot},
    };

    use crate::arith::Exact;

    const ALL: [Activation; 3] = [Activation::Silu, Activation::GeluTanh, Activation::GeluErf];

    /// Values of Python's `math.erf`.
    #[test]
    fn error_function() {
        for (x, value) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.499, 0.999_590_864_244_255_4),
            (2.5, 0.999_593_047_982_555),
            (3.5, 0.999_999_256_901_627_6),
            (6.0, 1.0),
        ] {
            assert!((erf(x) - value).abs() < 4e-15, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
    }

    /// silu(1) = 1 / (1 + e^-1); gelu(1) = Phi(1) = 0.8413447460685429; PyTorch's `gelu(1, approximate="tanh")` in f64.
    #[test]
    fn by_hand() {
        assert!((activation(Activation::Silu, 1.0).0 - 1.0 / (1.0 + (-1f64).exp())).abs() < 1e-15);
        assert!((activation(Activation::GeluErf, 1.0).0 - 0.841_344_746_068_542_9).abs() < 1e-15);
        assert!((activation(Activation::GeluTanh, 1.0).0 - 0.841_191_990_608_276_7).abs() < 1e-12);
    }

    #[test]
    fn gradients() {
        let mut data = Data::new(4);
        let mut draw = |scale| data.normal(17, scale, DType::F32);
        let (gate, up, dout) = (draw(2.0), draw(1.0), draw(1.0));
        for act in ALL {
            let Gradients { dgate, dup } = backward(&Exact, &dout, (&gate, &up), act);
            let loss = |gate: &[f64], up: &[f64]| dot(&forward(&Exact, gate, up, act), &dout);
            gradcheck::check("dgate", &gate, |gate| loss(gate, &up), &dgate).unwrap();
            gradcheck::check("dup", &up, |up| loss(&gate, up), &dup).unwrap();
        }
    }

    #[test]
    fn finite_wherever_f32_is() {
        for act in ALL {
            for (x, value, slope) in [(1e38, 1e38, 1.0), (-1e38, 0.0, 0.0), (0.0, 0.0, 0.5)] {
                assert_eq!(activation(act, x), (value, slope), "{act:?} of {x}");
            }
        }
    }
}
