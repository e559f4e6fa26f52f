//! Reference of [`unsloth_core::ops::muon`].

use unsloth_core::{
    DType,
    ops::muon::{COEFFICIENTS, ITERATIONS, Spec},
};

use super::adamw::State;
use crate::arith::Arith;

/// `a b`, where `b` has so many columns and `a` so many as `b` has rows.
fn product<A: Arith>(arith: &A, a: &[f64], b: &[f64], columns: usize) -> Vec<f64> {
    let inner = b.len() / columns;
    let element = |i: usize| {
        let (row, column) = (i / columns, i % columns);
        arith.stat(arith.sum((0..inner).map(|k| a[row * inner + k] * b[k * columns + column])))
    };
    (0..a.len() / inner * columns).map(element).collect()
}

fn transposed(x: &[f64], columns: usize) -> Vec<f64> {
    let rows = x.len() / columns;
    (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect()
}

/// The iteration on a matrix with no more rows than columns.
fn iterate<A: Arith>(arith: &A, mut x: Vec<f64>, columns: usize) -> Vec<f64> {
    let rows = x.len() / columns;
    let [a, b, c] = COEFFICIENTS.map(f64::from);
    for _ in 0..ITERATIONS {
        let gram = product(arith, &x, &transposed(&x, columns), rows);
        let square = product(arith, &gram, &gram, rows);
        let term = |(gram, square): (&f64, &f64)| arith.stat(arith.stat(b * gram) + arith.stat(c * square));
        let polynomial: Vec<f64> = gram.iter().zip(&square).map(term).collect();
        let change = product(arith, &polynomial, &x, columns);
        x = x.iter().zip(change).map(|(x, change)| arith.stat(arith.stat(a * x) + change)).collect();
    }
    x
}

/// One step of a matrix in `dtype` with so many columns, each operation of the formula on its own.
pub fn step<A: Arith>(
    arith: &A,
    spec: &Spec,
    (param, dtype): (&mut [f64], DType),
    (grad, state): (&[f64], &State),
    (buf, columns): (&mut [f64], usize),
) {
    if state.skip || grad.is_empty() {
        return;
    }
    let [momentum, eps, weight_decay] = [spec.momentum, spec.eps, spec.weight_decay].map(f64::from);
    let [learning_rate, adjustment] = [spec.learning_rate, spec.adjustment].map(f64::from);
    let mut x = vec![0.0; grad.len()];
    for i in 0..grad.len() {
        let g = arith.stat(grad[i] * state.gradient_scale);
        buf[i] = arith.stat(arith.stat(momentum * buf[i]) + arith.stat((1.0 - momentum) * g));
        let ahead = arith.stat(arith.stat((1.0 - momentum) * g) + arith.stat(momentum * buf[i]));
        x[i] = if spec.nesterov { ahead } else { buf[i] };
    }
    let norm = arith.stat(arith.sum(x.iter().map(|x| x * x)).sqrt()).max(eps);
    let x: Vec<f64> = x.iter().map(|x| arith.stat(x / norm)).collect();
    let rows = grad.len() / columns;
    let x = match rows <= columns {
        true => iterate(arith, x, columns),
        false => transposed(&iterate(arith, transposed(&x, columns), rows), rows),
    };
    for i in 0..param.len() {
        let decayed = arith.stat(param[i] * arith.stat(1.0 - learning_rate * weight_decay));
        param[i] = arith.store_as(dtype, decayed - arith.stat(arith.stat(learning_rate * adjustment) * x[i]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arith::Exact;

    const SPEC: Spec =
        Spec { learning_rate: 1.0, adjustment: 2.0, momentum: 0.5, nesterov: false, eps: 1e-7, weight_decay: 0.0 };

    /// Of a matrix with one row the iteration is one of its length: from 1, five times `y = 3.4445 y - 4.775 y^3 + 2.0315 y^5`.
    #[test]
    fn by_hand() {
        let mut length = 1.0f64;
        for _ in 0..5 {
            length = 3.4445 * length - 4.775 * length.powi(3) + 2.0315 * length.powi(5);
        }
        for columns in [2, 1] {
            let (mut param, mut buf) = ([0.0; 2], [0.0; 2]);
            step(&Exact, &SPEC, (&mut param, DType::F32), (&[3.0, -4.0], &State::new(1)), (&mut buf, columns));
            assert_eq!(buf, [1.5, -2.0]);
            for (param, share) in param.iter().zip([0.6, -0.8]) {
                // Coefficients are f32.
                assert!((param + 2.0 * length * share).abs() < 1e-6, "{param}, {length}");
            }
        }
    }

    /// Whatever singular values a matrix has, they are between 0.6 and 1.3 behind the iteration: here those of a diagonal matrix.
    #[test]
    fn singular_values_come_near_one() {
        let mut grad = [0.0; 9];
        (grad[0], grad[4], grad[8]) = (5.0, -0.5, 0.05);
        let (mut param, mut buf) = ([0.0; 9], [0.0; 9]);
        step(&Exact, &SPEC, (&mut param, DType::F32), (&grad, &State::new(1)), (&mut buf, 3));
        for (i, value) in param.iter().enumerate() {
            let expected = if i % 4 == 0 { -grad[i].signum() } else { 0.0 };
            assert!((value / 2.0 - expected).abs() < 0.4, "{i}: {value}");
        }
    }
}
