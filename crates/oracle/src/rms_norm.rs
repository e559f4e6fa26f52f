//! Reference of [`unsloth_core::ops::rms_norm`].

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
    /// Added to the mean square.
    pub eps: f64,
    /// Added to every weight.
    pub weight_offset: f64,
}

/// Results of the forward pass.
#[derive(Clone, Debug)]
pub struct Forward {
    /// `[rows, hidden_size]`
    pub out: Vec<f64>,
    /// `[rows, hidden_size]`: `x + residual`.
    pub sum: Vec<f64>,
    /// `[rows]`
    pub rstd: Vec<f64>,
}

/// `out = (x + residual) * rstd * (weight + weight_offset)`
pub fn forward<A: Arith>(arith: &A, inputs: Inputs<'_>) -> Forward {
    let hidden_size = inputs.weight.len();
    let mut forward = Forward { out: vec![], sum: vec![], rstd: vec![] };
    for row in 0..inputs.x.len() / hidden_size {
        let at = row * hidden_size;
        let sum: Vec<f64> = (at..at + hidden_size)
            .map(|i| arith.store(inputs.x[i] + inputs.residual.map_or(0.0, |residual| residual[i])))
            .collect();
        let mean_square = arith.stat(arith.sum(sum.iter().map(|v| v * v)) / hidden_size as f64);
        let rstd = arith.stat(1.0 / (mean_square + inputs.eps).sqrt());
        for i in 0..hidden_size {
            let xhat = arith.store(sum[i] * rstd);
            forward.out.push(arith.store(xhat * (inputs.weight[i] + inputs.weight_offset)));
        }
        forward.sum.extend(sum);
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
}

/// Gradients that reach the outputs.
#[derive(Clone, Copy, Debug)]
pub struct OutputGradients<'a> {
    /// `[rows, hidden_size]`
    pub dout: &'a [f64],
    /// `[rows, hidden_size]`, of `sum`.
    pub dsum: Option<&'a [f64]>,
}

/// `dx = rstd * (g - xhat * mean(g * xhat)) + dsum`, `dweight = start + sum_rows(dout * xhat)`
pub fn backward<A: Arith>(arith: &A, inputs: Inputs<'_>, gradients: OutputGradients<'_>, start: &[f64]) -> Gradients {
    let hidden_size = inputs.weight.len();
    let Forward { sum, rstd, .. } = forward(arith, inputs);
    let xhat: Vec<f64> = (0..sum.len()).map(|i| arith.store(sum[i] * rstd[i / hidden_size])).collect();
    let mut dx = vec![];
    for row in 0..rstd.len() {
        let at = row * hidden_size;
        let g: Vec<f64> = (0..hidden_size)
            .map(|i| arith.store(gradients.dout[at + i] * (inputs.weight[i] + inputs.weight_offset)))
            .collect();
        let mean = arith.stat(arith.sum((0..hidden_size).map(|i| g[i] * xhat[at + i])) / hidden_size as f64);
        for i in 0..hidden_size {
            let through_norm = arith.store(rstd[row] * arith.store(g[i] - arith.store(xhat[at + i] * mean)));
            dx.push(arith.store(through_norm + gradients.dsum.map_or(0.0, |dsum| dsum[at + i])));
        }
    }
    let rows = rstd.len();
    let column =
        |i: usize| (0..rows).map(|row| row * hidden_size + i).map(|at| gradients.dout[at] * xhat[at]).collect();
    let dweight = (0..hidden_size)
        .map(|i| {
            let terms: Vec<f64> = column(i);
            arith.stat(arith.sum(std::iter::once(start[i]).chain(terms)))
        })
        .collect();
    Gradients { dx, dweight }
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

    /// One row by hand: mean(9, 16) + 0 = 12.5, rstd = 1 / sqrt(12.5); out = (3, 4) * rstd * (2, -1).
    #[test]
    fn by_hand() {
        let inputs = Inputs { x: &[3.0, 4.0], residual: None, weight: &[2.0, -1.0], eps: 0.0, weight_offset: 0.0 };
        let out = forward(&Exact, inputs).out;
        assert!((out[0] - 6.0 / 12.5f64.sqrt()).abs() < 1e-15);
        assert!((out[1] + 4.0 / 12.5f64.sqrt()).abs() < 1e-15);
    }

    #[test]
    fn gradients() {
        let (rows, hidden_size) = (3, 5);
        let mut data = Data::new(2);
        let mut draw = |count| data.normal(count, 1.0, DType::F32);
        let (x, residual, dout, dsum) = (draw(15), draw(15), draw(15), draw(15));
        let weight = draw(hidden_size);
        for (residual, dsum, weight_offset) in [(None, None, 0.0), (Some(&residual[..]), Some(&dsum[..]), 1.0)] {
            let inputs = Inputs { x: &x, residual, weight: &weight, eps: 0.1, weight_offset };
            let loss = |inputs: Inputs<'_>| {
                let forward = forward(&Exact, inputs);
                assert_eq!(forward.rstd.len(), rows);
                dot(&forward.out, &dout) + dsum.map_or(0.0, |dsum| dot(&forward.sum, dsum))
            };
            let outputs = OutputGradients { dout: &dout, dsum };
            let Gradients { dx, dweight } = backward(&Exact, inputs, outputs, &vec![0.0; hidden_size]);
            gradcheck::check("dx", &x, |x| loss(Inputs { x, ..inputs }), &dx).unwrap();
            gradcheck::check("dweight", &weight, |weight| loss(Inputs { weight, ..inputs }), &dweight).unwrap();
            if let Some(residual) = residual {
                let through = |residual: &[f64]| loss(Inputs { residual: Some(residual), ..inputs });
                gradcheck::check("dresidual", residual, through, &dx).unwrap();
            }
        }
    }
}
