//! Reference of [`unsloth_core::ops::adafactor`].

use unsloth_core::{DType, ops::adafactor::Spec};

use super::adamw::State;
use crate::arith::Arith;

/// One step of a parameter in `dtype`, each operation of the formula on its own. `averages` are those of the rows and of the
/// columns of a matrix with so many columns, or of each element.
pub fn step<A: Arith>(
    arith: &A,
    spec: &Spec,
    (param, dtype): (&mut [f64], DType),
    (grad, state): (&[f64], &State),
    (averages, columns): (&mut [Vec<f64>], Option<usize>),
) {
    if state.skip || grad.is_empty() {
        return;
    }
    let [learning_rate, decay_rate, eps, threshold, weight_decay] =
        [spec.learning_rate, spec.decay_rate, spec.eps, spec.clip_threshold, spec.weight_decay].map(f64::from);
    let g: Vec<f64> = grad.iter().map(|grad| arith.stat(grad * state.gradient_scale)).collect();
    let squares: Vec<f64> = g.iter().map(|g| arith.stat(arith.stat(g * g) + eps)).collect();
    let rest = arith.stat(f64::from(state.steps).powf(decay_rate));
    let average = |old: f64, new: f64| arith.stat(arith.stat((1.0 - rest) * old) + arith.stat(rest * new));
    let mean = |terms: &[f64]| arith.stat(arith.sum(terms.iter().copied()) / terms.len() as f64);
    let mut u = g.clone();
    match columns {
        None => {
            for i in 0..g.len() {
                averages[0][i] = average(averages[0][i], squares[i]);
                u[i] = arith.stat(g[i] / arith.stat(averages[0][i].sqrt()));
            }
        }
        Some(columns) => {
            let rows = g.len() / columns;
            for i in 0..rows {
                averages[0][i] = average(averages[0][i], mean(&squares[i * columns..(i + 1) * columns]));
            }
            for j in 0..columns {
                let column: Vec<f64> = (0..rows).map(|i| squares[i * columns + j]).collect();
                averages[1][j] = average(averages[1][j], mean(&column));
            }
            let of_rows = mean(&averages[0]);
            for i in 0..g.len() {
                let row = arith.stat(arith.stat(averages[0][i / columns] / of_rows).sqrt());
                let col = arith.stat(averages[1][i % columns].sqrt());
                u[i] = arith.stat(arith.stat(g[i] / row) / col);
            }
        }
    }
    let u_squares: Vec<f64> = u.iter().map(|u| u * u).collect();
    let rms = arith.stat(mean(&u_squares).sqrt());
    let alpha = spec.parameter_scale.map_or(learning_rate, |least| {
        let squares: Vec<f64> = param.iter().map(|param| param * param).collect();
        arith.stat(learning_rate * arith.stat(mean(&squares).sqrt()).max(f64::from(least)))
    });
    let size = arith.stat(alpha / arith.stat(rms / threshold).max(1.0));
    for i in 0..g.len() {
        let decayed = arith.store_as(dtype, param[i] * arith.stat(1.0 - learning_rate * weight_decay));
        param[i] = arith.store_as(dtype, decayed - arith.stat(size * u[i]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arith::Exact;

    /// The first step by hand: beta is 0. Squares 1, 4 | 9, 16: rows 2.5 and 12.5 with mean 7.5, columns 5 and 10.
    /// u = 1 / sqrt(1 / 3 * 5), 2 / sqrt(1 / 3 * 10) | 3 / sqrt(5 / 3 * 5), 4 / sqrt(5 / 3 * 10) = .7746, 1.0954 | 1.0392, .9798,
    /// whose mean square is (.6 + 1.2 + 1.08 + .96) / 4 = .96, below 1: nothing is scaled down.
    #[test]
    fn by_hand() {
        let spec = Spec {
            learning_rate: 0.5,
            decay_rate: -0.8,
            eps: 1e-30,
            clip_threshold: 1.0,
            parameter_scale: None,
            weight_decay: 0.0,
        };
        let (mut param, mut averages) = ([0.0; 4], [vec![0.0; 2], vec![0.0; 2]]);
        let grad = [1.0, 2.0, 3.0, 4.0];
        step(&Exact, &spec, (&mut param, DType::F32), (&grad, &State::new(1)), (&mut averages, Some(2)));
        assert_eq!(averages, [vec![2.5, 12.5], vec![5.0, 10.0]]);
        for (param, square) in param.iter().zip([0.6f64, 1.2, 1.08, 0.96]) {
            assert!((param + 0.5 * square.sqrt()).abs() < 1e-12, "{param}");
        }
        // A threshold of a half: everything is scaled down by 2 sqrt(.96).
        let (mut half, mut averages) = ([0.0; 4], [vec![0.0; 2], vec![0.0; 2]]);
        let spec = Spec { clip_threshold: 0.5, ..spec };
        step(&Exact, &spec, (&mut half, DType::F32), (&grad, &State::new(1)), (&mut averages, Some(2)));
        assert!((half[0] * 2.0 * 0.96f64.sqrt() - param[0]).abs() < 1e-12);
        // A root mean square of 5 makes steps five times as large.
        let (mut large, mut averages) = ([1.0, 7.0, -1.0, 7.0], [vec![0.0; 2], vec![0.0; 2]]);
        let spec = Spec { clip_threshold: 1.0, parameter_scale: Some(1e-3), ..spec };
        step(&Exact, &spec, (&mut large, DType::F32), (&grad, &State::new(1)), (&mut averages, Some(2)));
        assert!((large[0] - 1.0 - 5.0 * param[0]).abs() < 1e-12);
    }
}
