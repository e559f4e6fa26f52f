//! Reference of [`unsloth_core::ops::layer_norm`].

use crate::arith::Arith;

/// What is normalised, and how.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[rows, hidden_size]`
    pub x: &'a [f64],
    /// `[rows, hidden_size]`
    pub residual: Option<&'a [f64]>,
    /// `[hidden_size]`
    pub weight: &'a [f64],
    /// `[hidden_size]`
    pub bias: Option<&'a [f64]>,
    /// Added to the variance.
    pub eps: f64,
}

/// Results of the forward pass.
#[derive(Clone, Debug)]
pub struct Forward {
    /// `[rows, hidden_size]`
    pub out: Vec<f64>,
    /// `[rows, hidden_size]`: `x + residual`.
    pub sum: Vec<f64>,
    /// `[rows]`
    pub mean: Vec<f64>,
    /// `[rows]`
    pub rstd: Vec<f64>,
}

/// `out = (x + residual - mean) * rstd * weight + bias`
pub fn forward<A: Arith>(arith: &A, inputs: Inputs<'_>) -> Forward {
    let hidden_size = inputs.weight.len();
    let mut forward = Forward { out: vec![], sum: vec![], mean: vec![], rstd: vec![] };
    for row in 0..inputs.x.len() / hidden_size {
        let at = row * hidden_size;
        let sum: Vec<f64> = (at..at + hidden_size)
            .map(|i| arith.store(inputs.x[i] + inputs.residual.map_or(0.0, |residual| residual[i])))
            .collect();
        let mean = arith.stat(arith.sum(sum.iter().copied()) / hidden_size as f64);
        let square = |v: &f64| arith.stat(v - mean).powi(2);
        let variance = arith.stat(arith.sum(sum.iter().map(square)) / hidden_size as f64);
        let rstd = arith.stat(1.0 / (variance + inputs.eps).sqrt());
        for i in 0..hidden_size {
            let xhat = arith.store(arith.stat(sum[i] - mean) * rstd);
            let scaled = arith.store(xhat * inputs.weight[i]);
            forward.out.push(arith.store(scaled + inputs.bias.map_or(0.0, |bias| bias[i])));
        }
        forward.sum.extend(sum);
        forward.mean.push(mean);
        forward.rstd.push(rstd);
    }
    forward
}

/// Gradients of the inputs.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// `[rows, hidden_size]`, of `x` and of the residual.
    pub dx: Vec<f64>,
    /// `[hidden_size]`
    pub dweight: Vec<f64>,
    /// `[hidden_size]`
    pub dbias: Vec<f64>,
}

/// Gradients that reach the outputs.
#[derive(Clone, Copy, Debug)]
pub struct OutputGradients<'a> {
    /// `[rows, hidden_size]`
    pub dout: &'a [f64],
    /// `[rows, hidden_size]`, of `sum`.
    pub dsum: Option<&'a [f64]>,
}

/// What the gradients of the parameters are added to, `[hidden_size]` each.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    /// Of the weight.
    pub dweight: &'a [f64],
    /// Of the bias.
    pub dbias: &'a [f64],
}

/// `dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum`, `dweight = start + sum_rows(dout * xhat)`,
/// `dbias = start + sum_rows(dout)`
pub fn backward<A: Arith>(
    arith: &A,
    inputs: Inputs<'_>,
    OutputGradients { dout, dsum }: OutputGradients<'_>,
    start: Start<'_>,
) -> Gradients {
    let hidden_size = inputs.weight.len();
    let Forward { sum, mean, rstd, .. } = forward(arith, inputs);
    let normed = |i: usize| arith.store(arith.stat(sum[i] - mean[i / hidden_size]) * rstd[i / hidden_size]);
    let xhat: Vec<f64> = (0..sum.len()).map(normed).collect();
    let mut dx = vec![];
    for row in 0..rstd.len() {
        let at = row * hidden_size;
        let g: Vec<f64> = (0..hidden_size).map(|i| arith.store(dout[at + i] * inputs.weight[i])).collect();
        let mean = arith.stat(arith.sum(g.iter().copied()) / hidden_size as f64);
        let projection = arith.stat(arith.sum((0..hidden_size).map(|i| g[i] * xhat[at + i])) / hidden_size as f64);
        for i in 0..hidden_size {
            let centred = arith.store(g[i] - mean);
            let through_norm = arith.store(rstd[row] * arith.store(centred - arith.store(xhat[at + i] * projection)));
            dx.push(arith.store(through_norm + dsum.map_or(0.0, |dsum| dsum[at + i])));
        }
    }
    let column = |start: f64, i: usize, term: &dyn Fn(usize) -> f64| {
        let terms = (0..rstd.len()).map(|row| term(row * hidden_size + i));
        arith.stat(arith.sum(std::iter::once(start).chain(terms)))
    };
    let dweight = (0..hidden_size).map(|i| column(start.dweight[i], i, &|at| dout[at] * xhat[at])).collect();
    let dbias = (0..hidden_size).map(|i| column(start.dbias[i], i, &|at| dout[at])).collect();
    Gradients { dx, dweight, dbias }
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

    /// One row by hand: mean 4, variance (9 + 9) / 2 = 9, rstd = 1 / 3; out = (-1, 1) * (2, -1) + (10, 20).
    #[test]
    fn by_hand() {
        let inputs = Inputs {
            x: &[0.0, 5.0],
            residual: Some(&[1.0, 2.0]),
            weight: &[2.0, -1.0],
            bias: Some(&[10.0, 20.0]),
            eps: 0.0,
        };
        let found = forward(&Exact, inputs);
        assert_eq!((found.mean, found.sum), (vec![4.0], vec![1.0, 7.0]));
        assert!((found.rstd[0] - 1.0 / 3.0).abs() < 1e-15);
        assert!((found.out[0] - 8.0).abs() < 1e-14 && (found.out[1] - 19.0).abs() < 1e-14);
    }

    #[test]
    fn gradients() {
        let hidden_size = 5;
        let mut data = Data::new(3);
        let mut draw = |count| data.normal(count, 1.0, DType::F32);
        let (x, residual, dout, dsum) = (draw(15), draw(15), draw(15), draw(15));
        let (weight, bias) = (draw(hidden_size), draw(hidden_size));
        for (residual, bias, dsum) in [(None, None, None), (Some(&residual[..]), Some(&bias[..]), Some(&dsum[..]))] {
            let inputs = Inputs { x: &x, residual, weight: &weight, bias, eps: 0.1 };
            let loss = |inputs: Inputs<'_>| {
                let forward = forward(&Exact, inputs);
                dot(&forward.out, &dout) + dsum.map_or(0.0, |dsum| dot(&forward.sum, dsum))
            };
            let zeros = vec![0.0; hidden_size];
            let start = Start { dweight: &zeros, dbias: &zeros };
            let found = backward(&Exact, inputs, OutputGradients { dout: &dout, dsum }, start);
            gradcheck::check("dx", &x, |x| loss(Inputs { x, ..inputs }), &found.dx).unwrap();
            gradcheck::check("dweight", &weight, |weight| loss(Inputs { weight, ..inputs }), &found.dweight).unwrap();
            if let (Some(residual), Some(bias)) = (residual, bias) {
                let through = |residual: &[f64]| loss(Inputs { residual: Some(residual), ..inputs });
                gradcheck::check("dresidual", residual, through, &found.dx).unwrap();
                gradcheck::check("dbias", bias, |bias| loss(Inputs { bias: Some(bias), ..inputs }), &found.dbias)
                    .unwrap();
            }
        }
    }
}
