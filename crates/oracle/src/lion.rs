//! Reference of [`unsloth_core::ops::lion`].

use unsloth_core::{DType, ops::lion::Spec};

use super::adamw::State;
use crate::arith::Arith;

/// One step of a parameter in `dtype`, each operation of the formula on its own.
pub fn step<A: Arith>(
    arith: &A,
    spec: &Spec,
    (param, dtype): (&mut [f64], DType),
    (grad, state): (&[f64], &State),
    m: &mut [f64],
) {
    if state.skip {
        return;
    }
    let [learning_rate, beta1, beta2, weight_decay] =
        [spec.learning_rate, spec.beta1, spec.beta2, spec.weight_decay].map(f64::from);
    for i in 0..grad.len() {
        let g = arith.stat(grad[i] * state.gradient_scale);
        let c = arith.stat(arith.stat(beta1 * m[i]) + arith.stat((1.0 - beta1) * g));
        m[i] = arith.stat(arith.stat(beta2 * m[i]) + arith.stat((1.0 - beta2) * g));
        let sign = if c == 0.0 { 0.0 } else { c.signum() };
        let decayed = arith.store_as(dtype, param[i] * arith.stat(1.0 - learning_rate * weight_decay));
        param[i] = arith.store_as(dtype, decayed - learning_rate * sign);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arith::Exact;

    /// Three steps by hand, rate and betas a half and a quarter, decay a half; all exact in binary.
    /// Step 1, p = 1, g = 2: c = 1 above 0, p = 0.75 - 0.5 = 0.25, m = 1.5.
    /// Step 2, g = -1.5: c = 0, p = 0.1875, m = 0.375 - 1.125 = -0.75. Step 3, g = 0: c below 0, p = 0.140625 + 0.5.
    #[test]
    fn by_hand() {
        let spec = Spec { learning_rate: 0.5, beta1: 0.5, beta2: 0.25, weight_decay: 0.5 };
        let (mut param, mut m) = ([1.0], [0.0]);
        for (grad, expected) in [(2.0, (0.25, 1.5)), (-1.5, (0.1875, -0.75)), (0.0, (0.640625, -0.1875))] {
            step(&Exact, &spec, (&mut param, DType::F32), (&[grad], &State::new(1)), &mut m);
            assert_eq!((param[0], m[0]), expected);
        }
    }
}
