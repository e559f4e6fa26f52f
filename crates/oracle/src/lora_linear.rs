//! The formulas of [`unsloth_core::ops::lora_linear`].

use super::linear::Dims;
use crate::arith::Arith;

/// Values of one adapted layer.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Sizes of the base product.
    pub dims: Dims,
    /// `[out_features, in_features]`
    pub weight: &'a [f64],
    /// `[out_features]`
    pub bias: Option<&'a [f64]>,
    /// `[rank, in_features]`
    pub lora_a: &'a [f64],
    /// `[out_features, rank]`
    pub lora_b: &'a [f64],
    /// Inner dimension.
    pub rank: usize,
    /// Factor of the update.
    pub scale: f64,
    /// Dropout: `[rows, in_features]`, each element 0 or `1 / (1 - probability)`.
    pub keep: Option<&'a [f64]>,
}

impl Layer<'_> {
    /// `drop(values)`, a tensor of the type of activations.
    fn drop(&self, a: &impl Arith, values: &[f64]) -> Vec<f64> {
        match self.keep {
            None => values.to_vec(),
            Some(keep) => values.iter().zip(keep).map(|(value, keep)| a.store(value * keep)).collect(),
        }
    }
}

/// Values of the forward results.
#[derive(Clone, Debug)]
pub struct Forward {
    /// `[rows, out_features]`
    pub y: Vec<f64>,
    /// `[rows, rank]`
    pub h: Vec<f64>,
}

/// Values of the gradients. The parameters' are what they held before plus the contribution of this call.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// `[rows, in_features]`
    pub dx: Vec<f64>,
    /// `[rank, in_features]`
    pub dlora_a: Vec<f64>,
    /// `[out_features, rank]`
    pub dlora_b: Vec<f64>,
}

/// `h = drop(x) A^T`.
pub fn hidden(a: &impl Arith, layer: Layer<'_>, x: &[f64]) -> Vec<f64> {
    let Dims { rows, in_features, .. } = layer.dims;
    let rank = layer.rank;
    let mut h = vec![0.0; rows * rank];
    let dropped = layer.drop(a, x);
    for t in 0..rows {
        for r in 0..rank {
            let terms = (0..in_features).map(|i| dropped[t * in_features + i] * layer.lora_a[r * in_features + i]);
            h[t * rank + r] = a.stat(a.sum(terms));
        }
    }
    h
}

/// `y = x W^T + bias + scale * (drop(x) A^T) B^T` and `h = drop(x) A^T`.
pub fn forward(a: &impl Arith, layer: Layer<'_>, x: &[f64]) -> Forward {
    let Dims { rows, out_features, .. } = layer.dims;
    let rank = layer.rank;
    let h = hidden(a, layer, x);
    let mut y = super::linear::forward(a, layer.dims, x, layer.weight, layer.bias);
    for t in 0..rows {
        for o in 0..out_features {
            let terms = (0..rank).map(|r| h[t * rank + r] * layer.lora_b[o * rank + r]);
            let update = a.store(layer.scale * a.sum(terms));
            y[t * out_features + o] = a.store(y[t * out_features + o] + update);
        }
    }
    Forward { y, h }
}

/// `dh = scale * dy B`, `dx = dy W + drop(dh A)`, `dA += dh^T drop(x)`, `dB += scale * dy^T h`, from what `before = (dA, dB)`
/// held.
pub fn backward(
    a: &impl Arith,
    layer: Layer<'_>,
    (x, h, dy): (&[f64], &[f64], &[f64]),
    before: (&[f64], &[f64]),
) -> Gradients {
    let Dims { rows, in_features, out_features } = layer.dims;
    let rank = layer.rank;
    let mut dh = vec![0.0; rows * rank];
    for t in 0..rows {
        for r in 0..rank {
            let terms = (0..out_features).map(|o| dy[t * out_features + o] * layer.lora_b[o * rank + r]);
            dh[t * rank + r] = a.stat(layer.scale * a.sum(terms));
        }
    }
    let mut update = vec![0.0; rows * in_features];
    for t in 0..rows {
        for i in 0..in_features {
            let terms = (0..rank).map(|r| dh[t * rank + r] * layer.lora_a[r * in_features + i]);
            update[t * in_features + i] = a.store(a.sum(terms));
        }
    }
    let dx = super::linear::input_gradient(a, layer.dims, dy, layer.weight);
    let dx = dx.iter().zip(layer.drop(a, &update)).map(|(dx, update)| a.store(dx + update)).collect();
    let dropped = layer.drop(a, x);
    let (mut dlora_a, mut dlora_b) = (before.0.to_vec(), before.1.to_vec());
    for r in 0..rank {
        for i in 0..in_features {
            let terms = (0..rows).map(|t| dh[t * rank + r] * dropped[t * in_features + i]);
            let value = &mut dlora_a[r * in_features + i];
            *value = a.stat(*value + a.sum(terms));
        }
    }
    for o in 0..out_features {
        for r in 0..rank {
            let terms = (0..rows).map(|t| dy[t * out_features + o] * h[t * rank + r]);
            let value = &mut dlora_b[o * rank + r];
            *value = a.stat(*value + a.stat(layer.scale * a.sum(terms)));
        }
    }
    Gradients { dx, dlora_a, dlora_b }
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

    /// `x = (1, 2)`, `W = [(1, 0), (0, 1)]`, `bias = (10, 20)`, `A = (3, 4)`, `B = (1, -1)`, `scale = 0.5`, `dy = (2, 6)`:
    /// - `h = 1*3 + 2*4 = 11`, `y = (1 + 10 + 0.5*11*1, 2 + 20 + 0.5*11*-1) = (16.5, 16.5)`
    /// - `dh = 0.5 * (2*1 - 6*1) = -2`, `dx = (2, 6) - 2 * (3, 4) = (-4, -2)`
    /// - `dA = 1 - 2 * (1, 2) = (-1, -3)`, `dB = 1 + 0.5 * 11 * (2, 6) = (12, 34)`
    #[test]
    fn worked_by_hand() {
        let layer = Layer {
            dims: Dims { rows: 1, in_features: 2, out_features: 2 },
            weight: &[1.0, 0.0, 0.0, 1.0],
            bias: Some(&[10.0, 20.0]),
            lora_a: &[3.0, 4.0],
            lora_b: &[1.0, -1.0],
            rank: 1,
            scale: 0.5,
            keep: None,
        };
        let x = [1.0, 2.0];
        let Forward { y, h } = forward(&Exact, layer, &x);
        assert_eq!((y, h.clone()), (vec![16.5, 16.5], vec![11.0]));
        let gradients = backward(&Exact, layer, (&x, &h, &[2.0, 6.0]), (&[1.0; 2], &[1.0; 2]));
        assert_eq!(gradients.dx, [-4.0, -2.0]);
        assert_eq!(gradients.dlora_a, [-1.0, -3.0]);
        assert_eq!(gradients.dlora_b, [12.0, 34.0]);

        // Half of the elements dropped, which here is the first:
        // `h = 2*2*4 = 16`, `y = (11 + 8, 22 - 8)`, `dx = (2, 6) - 2 * (0, 2*4)`, `dA = 1 - 2 * (0, 2*2)`,
        // `dB = 1 + 0.5 * 16 * (2, 6)`
        let layer = Layer { keep: Some(&[0.0, 2.0]), ..layer };
        let Forward { y, h } = forward(&Exact, layer, &x);
        assert_eq!((y, h.clone()), (vec![19.0, 14.0], vec![16.0]));
        let gradients = backward(&Exact, layer, (&x, &h, &[2.0, 6.0]), (&[1.0; 2], &[1.0; 2]));
        assert_eq!(gradients.dx, [2.0, -10.0]);
        assert_eq!(gradients.dlora_a, [1.0, -7.0]);
        assert_eq!(gradients.dlora_b, [17.0, 49.0]);
    }

    #[test]
    fn gradients_equal_central_differences() {
        let mut data = Data::new(2);
        let mut draw = |count: usize| data.normal(count, 1.0, DType::F32);
        let (x, dy, weight, lora_a, lora_b) = (draw(12), draw(15), draw(20), draw(8), draw(10));
        let layer = Layer {
            dims: Dims { rows: 3, in_features: 4, out_features: 5 },
            weight: &weight,
            bias: None,
            lora_a: &lora_a,
            lora_b: &lora_b,
            rank: 2,
            scale: -1.75,
            keep: None,
        };
        let loss = |layer: Layer<'_>, x: &[f64]| dot(&forward(&Exact, layer, x).y, &dy);
        let keep: Vec<f64> = (0..12).map(|i| if i % 3 == 0 { 0.0 } else { 1.5 }).collect();
        for layer in [layer, Layer { keep: Some(&keep), ..layer }] {
            let h = forward(&Exact, layer, &x).h;
            let found = backward(&Exact, layer, (&x, &h, &dy), (&[0.0; 8], &[0.0; 10]));
            gradcheck::check("x", &x, |x| loss(layer, x), &found.dx).unwrap();
            gradcheck::check("lora_a", &lora_a, |lora_a| loss(Layer { lora_a, ..layer }, &x), &found.dlora_a).unwrap();
            gradcheck::check("lora_b", &lora_b, |lora_b| loss(Layer { lora_b, ..layer }, &x), &found.dlora_b).unwrap();
        }
    }
}
