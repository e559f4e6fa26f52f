//! The formulas of [`unsloth_core::ops::linear`].

use crate::arith::Arith;

/// Sizes of one product.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of `x` and `y`.
    pub rows: usize,
    /// Columns of `x`.
    pub in_features: usize,
    /// Columns of `y`.
    pub out_features: usize,
}

/// `y = x W^T + bias`: `[rows, out_features]`.
pub fn forward(a: &impl Arith, dims: Dims, x: &[f64], weight: &[f64], bias: Option<&[f64]>) -> Vec<f64> {
    let mut y = vec![0.0; dims.rows * dims.out_features];
    for t in 0..dims.rows {
        for o in 0..dims.out_features {
            let x = &x[t * dims.in_features..(t + 1) * dims.in_features];
            let weight = &weight[o * dims.in_features..(o + 1) * dims.in_features];
            let product = a.sum(x.iter().zip(weight).map(|(x, w)| x * w));
            y[t * dims.out_features + o] = a.store(product + bias.map_or(0.0, |bias| bias[o]));
        }
    }
    y
}

/// `dx = dy W`: `[rows, in_features]`.
pub fn input_gradient(a: &impl Arith, dims: Dims, dy: &[f64], weight: &[f64]) -> Vec<f64> {
    let mut dx = vec![0.0; dims.rows * dims.in_features];
    for i in 0..dims.in_features {
        // Read once for all rows: its elements lie far apart.
        let column: Vec<f64> = weight.iter().skip(i).step_by(dims.in_features).copied().collect();
        for t in 0..dims.rows {
            let dy = &dy[t * dims.out_features..(t + 1) * dims.out_features];
            let terms = dy.iter().zip(&column).map(|(dy, weight)| dy * weight);
            dx[t * dims.in_features + i] = a.store(a.sum(terms));
        }
    }
    dx
}

/// `dweight += dy^T x`: `[out_features, in_features]`, from what it held before.
pub fn weight_gradient(a: &impl Arith, dims: Dims, dy: &[f64], x: &[f64], before: &[f64]) -> Vec<f64> {
    let mut dweight = before.to_vec();
    for o in 0..dims.out_features {
        for i in 0..dims.in_features {
            let terms = (0..dims.rows).map(|t| dy[t * dims.out_features + o] * x[t * dims.in_features + i]);
            let value = &mut dweight[o * dims.in_features + i];
            *value = a.stat(*value + a.sum(terms));
        }
    }
    dweight
}

/// `dbias += sum_rows(dy)`: `[out_features]`, from what it held before.
pub fn bias_gradient(a: &impl Arith, dims: Dims, dy: &[f64], before: &[f64]) -> Vec<f64> {
    let column = |o: usize| a.sum((0..dims.rows).map(|t| dy[t * dims.out_features + o]));
    before.iter().enumerate().map(|(o, before)| a.stat(before + column(o))).collect()
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

    /// `x = (1, 2)`, `W = [(3, 4), (5, 6), (7, 8)]`, `bias = (0.5, 0, -1)`, `dy = (1, 10, 100)`:
    /// - `y = (1*3 + 2*4 + 0.5, 1*5 + 2*6, 1*7 + 2*8 - 1) = (11.5, 17, 22)`
    /// - `dx = (1*3 + 10*5 + 100*7, 1*4 + 10*6 + 100*8) = (753, 864)`
    /// - `dweight = 1 + [(1, 2), (10, 20), (100, 200)]`, `dbias = -1 + (1, 10, 100)`
    #[test]
    fn worked_by_hand() {
        let dims = Dims { rows: 1, in_features: 2, out_features: 3 };
        let (x, weight, dy) = ([1.0, 2.0], [3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [1.0, 10.0, 100.0]);
        assert_eq!(forward(&Exact, dims, &x, &weight, Some(&[0.5, 0.0, -1.0])), [11.5, 17.0, 22.0]);
        assert_eq!(input_gradient(&Exact, dims, &dy, &weight), [753.0, 864.0]);
        assert_eq!(weight_gradient(&Exact, dims, &dy, &x, &[1.0; 6]), [2.0, 3.0, 11.0, 21.0, 101.0, 201.0]);
        assert_eq!(bias_gradient(&Exact, dims, &dy, &[-1.0; 3]), [0.0, 9.0, 99.0]);
    }

    #[test]
    fn gradients_equal_central_differences() {
        let dims = Dims { rows: 3, in_features: 4, out_features: 5 };
        let mut data = Data::new(1);
        let mut draw = |count: usize| data.normal(count, 1.0, DType::F32);
        let (x, weight, bias, dy) = (draw(12), draw(20), draw(5), draw(15));
        let loss = |x: &[f64], weight: &[f64], bias: &[f64]| dot(&forward(&Exact, dims, x, weight, Some(bias)), &dy);
        let dx = input_gradient(&Exact, dims, &dy, &weight);
        let dweight = weight_gradient(&Exact, dims, &dy, &x, &[0.0; 20]);
        let dbias = bias_gradient(&Exact, dims, &dy, &[0.0; 5]);
        gradcheck::check("x", &x, |x| loss(x, &weight, &bias), &dx).unwrap();
        gradcheck::check("weight", &weight, |weight| loss(&x, weight, &bias), &dweight).unwrap();
        gradcheck::check("bias", &bias, |bias| loss(&x, &weight, bias), &dbias).unwrap();
    }
}
