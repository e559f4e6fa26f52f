//! Reference of [`unsloth_core::ops::dora`].

use unsloth_core::DType;

use crate::arith::Arith;

/// An adapted matrix, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Adapted<'a> {
    /// `[out_features, in_features]`
    pub weight: &'a [f64],
    /// `[rank, in_features]`
    pub lora_a: &'a [f64],
    /// `[out_features, rank]`
    pub lora_b: &'a [f64],
    /// Columns of the matrix.
    pub in_features: usize,
    /// Factor of the update.
    pub scale: f64,
}

/// `norm[j] = |W[j] + scale * (B A)[j]|`; what is added to the matrix is f32, as the adapter is.
pub fn norms<A: Arith>(arith: &A, matrix: Adapted<'_>) -> Vec<f64> {
    let Adapted { weight, lora_a, lora_b, in_features, scale } = matrix;
    let rank = lora_a.len() / in_features;
    let norm = |j: usize| {
        let square = |i: usize| {
            let update = arith.sum((0..rank).map(|r| lora_b[j * rank + r] * lora_a[r * in_features + i]));
            arith.store_as(DType::F32, weight[j * in_features + i] + arith.stat(scale * update)).powi(2)
        };
        arith.stat(arith.sum((0..in_features).map(square)).sqrt())
    };
    (0..lora_b.len() / rank).map(norm).collect()
}

/// `y = magnitude / norm * t + bias`
pub fn forward<A: Arith>(arith: &A, t: &[f64], (magnitude, norms): (&[f64], &[f64]), bias: &[f64]) -> Vec<f64> {
    let width = magnitude.len();
    let y = |(i, t): (usize, &f64)| {
        let j = i % width;
        arith.store(arith.store(arith.stat(magnitude[j] / norms[j]) * t) + bias[j])
    };
    t.iter().enumerate().map(y).collect()
}

/// Gradients of `t` and of the magnitudes.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Gradient of `t`.
    pub dt: Vec<f64>,
    /// Gradient of the magnitudes.
    pub dmagnitude: Vec<f64>,
}

/// `dt = magnitude / norm * dy`, `dmagnitude = sum_rows(dy * t) / norm`
pub fn backward<A: Arith>(arith: &A, dy: &[f64], t: &[f64], (magnitude, norms): (&[f64], &[f64])) -> Gradients {
    let width = magnitude.len();
    let dt = dy.iter().enumerate().map(|(i, dy)| arith.store(arith.stat(magnitude[i % width] / norms[i % width]) * dy));
    let column = |j: usize| {
        let products = (j..dy.len()).step_by(width).map(|i| dy[i] * t[i]);
        arith.stat(arith.sum(products) / norms[j])
    };
    Gradients { dt: dt.collect(), dmagnitude: (0..width).map(column).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unsloth_testkit::{
        data::Data,
        gradcheck::{self, dot},
    };

    use crate::arith::Exact;

    /// W = (3 0), B A = (0 2), scale 2: (3 4) has length 5. A magnitude of 10 doubles the row.
    #[test]
    fn hand_worked() {
        let matrix = Adapted { weight: &[3.0, 0.0], lora_a: &[0.0, 1.0], lora_b: &[2.0], in_features: 2, scale: 2.0 };
        assert_eq!(norms(&Exact, matrix), [5.0]);
        assert_eq!(forward(&Exact, &[7.0, -1.0], (&[10.0], &[5.0]), &[0.5]), [14.5, -1.5]);
        let gradients = backward(&Exact, &[1.0, 2.0], &[7.0, -1.0], (&[10.0], &[5.0]));
        assert_eq!((gradients.dt, gradients.dmagnitude), (vec![2.0, 4.0], vec![1.0]));
    }

    #[test]
    fn gradients_equal_central_differences() {
        let mut data = Data::new(91);
        let mut draw = |count| data.normal(count, 1.0, DType::F32);
        let (t, dy, magnitude, bias) = (draw(12), draw(12), draw(3), draw(3));
        let norms: Vec<f64> = draw(3).iter().map(|value| 1.0 + value * value).collect();
        let gradients = backward(&Exact, &dy, &t, (&magnitude, &norms));
        let loss = |t: &[f64], magnitude: &[f64]| dot(&forward(&Exact, t, (magnitude, &norms), &bias), &dy);
        gradcheck::check("t", &t, |t| loss(t, &magnitude), &gradients.dt).unwrap();
        gradcheck::check("magnitude", &magnitude, |magnitude| loss(&t, magnitude), &gradients.dmagnitude).unwrap();
    }
}
