//! Reference of [`unsloth_core::ops::sgd`].

use unsloth_core::{DType, ops::sgd::Spec};

use super::adamw::State;
use crate::arith::Arith;

/// One step of a parameter in `dtype`, each operation of the formula on its own.
pub fn step<A: Arith>(
    arith: &A,
    spec: &Spec,
    (param, dtype): (&mut [f64], DType),
    (grad, state): (&[f64], &State),
    mut buf: Option<&mut [f64]>,
) {
    if state.skip {
        return;
    }
    let [learning_rate, momentum, weight_decay] = [spec.learning_rate, spec.momentum, spec.weight_decay].map(f64::from);
    for i in 0..grad.len() {
        let decay = arith.stat(weight_decay * param[i]);
        let g = arith.stat(arith.stat(grad[i] * state.gradient_scale) + decay);
        let step = match &mut buf {
            None => g,
            Some(buf) => {
                buf[i] = arith.stat(arith.stat(momentum * buf[i]) + g);
                if spec.nesterov { arith.stat(g + arith.stat(momentum * buf[i])) } else { buf[i] }
            }
        };
        param[i] = arith.store_as(dtype, param[i] - arith.stat(learning_rate * step));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arith::Exact;

    /// Two steps of p = 2 by hand, rate and momentum a half, decay a quarter, all exact in binary.
    /// Step 1, g = 1: g + 0.5 = 1.5 = buf; Nesterov: 1.5 + 0.75 = 2.25, p = 2 - 1.125 = 0.875. Plain: p = 2 - 0.75 = 1.25.
    /// Step 2, g = -1, plain: -1 + 0.3125 = -0.6875, buf = 0.75 - 0.6875 = 0.0625, p = 1.25 - 0.03125 = 1.21875.
    #[test]
    fn by_hand() {
        let spec = Spec { learning_rate: 0.5, momentum: 0.5, nesterov: true, weight_decay: 0.25 };
        let state = State::new(1);
        let (mut param, mut buf) = ([2.0], [0.0]);
        step(&Exact, &spec, (&mut param, DType::F32), (&[1.0], &state), Some(&mut buf));
        assert_eq!((param, buf), ([0.875], [1.5]));
        let spec = Spec { nesterov: false, ..spec };
        let (mut param, mut buf) = ([2.0], [0.0]);
        step(&Exact, &spec, (&mut param, DType::F32), (&[1.0], &state), Some(&mut buf));
        assert_eq!((param, buf), ([1.25], [1.5]));
        step(&Exact, &spec, (&mut param, DType::F32), (&[-1.0], &state), Some(&mut buf));
        assert_eq!((param, buf), ([1.21875], [0.0625]));
    }
}
