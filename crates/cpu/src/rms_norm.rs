//! RMSNorm by rows: see [`crate::norm`].

use unsloth_core::{
    Category, DType, Result, Tensor,
    ops::rms_norm::{Backward, Forward, RmsNorm, Spec},
};

use crate::{
    CpuBackend,
    access::{dispatch_float, output, read, write},
    elementwise::Reused,
    norm::{Arguments, Norm, ParameterGradients},
};

const OP: &str = "rms_norm";

fn of_spec<'a>(spec: &Spec, weight: &'a [f32]) -> Norm<'a> {
    let &Spec { rows, hidden_size, eps, .. } = spec;
    Norm { rows, hidden_size, eps, weight: &weight[..hidden_size], bias: None }
}

impl RmsNorm for CpuBackend {
    fn rms_norm_forward(&self, spec: &Spec, x: Tensor, residual: Option<&Tensor>, weight: &Tensor) -> Result<Forward> {
        let mut out = output(&x, spec.dtype, [spec.rows, spec.hidden_size], Category::Activations)?;
        let mut rstd = output(&x, DType::F32, [spec.rows], Category::Activations)?;
        let weight = self.channels(weight, spec.weight_offset)?;
        let (x, sum) = match residual {
            None => (Some(x), None),
            Some(residual) => {
                let mut sum = Reused::new(x)?;
                dispatch_float!(spec.dtype, T => self.add_residual::<T>(OP, &mut sum, residual)?);
                (None, Some(sum.out))
            }
        };
        let statistics = write::<f32>(OP, "rstd", &mut rstd)?;
        if spec.hidden_size == 0 {
            statistics.fill(1.0 / spec.eps.sqrt());
        } else if let Some(x) = x.as_ref().or(sum.as_ref()) {
            dispatch_float!(spec.dtype, T => {
                let out = write::<T>(OP, "out", &mut out)?;
                self.normalise::<T, false>(of_spec(spec, &weight), read::<T>(x), out, (&mut [], statistics));
            });
        }
        Ok(Forward { out, sum, rstd })
    }

    fn rms_norm_backward(&self, spec: &Spec, inputs: Backward<'_>, dweight: Option<&mut Tensor>) -> Result<Tensor> {
        let Backward { dout, dsum, sum, weight, rstd } = inputs;
        let weight = self.channels(weight, spec.weight_offset)?;
        let dweight = dweight.map(|dweight| write::<f32>(OP, "dweight", dweight)).transpose()?;
        let mut dx = Reused::new(dout)?;
        if spec.rows == 0 || spec.hidden_size == 0 {
            return Ok(dx.out);
        }
        dispatch_float!(spec.dtype, T => {
            let (dx, dout_source) = dx.slices::<T>(OP)?;
            let (dsum, sum) = (dsum.map(read::<T>), read::<T>(sum));
            let args = Arguments { dout_source, dsum, sum, mean: &[], rstd: read::<f32>(rstd) };
            self.backward_rows::<T, false>(of_spec(spec, &weight), args, dx, ParameterGradients { dweight, dbias: None })?;
        });
        Ok(dx.out)
    }
}

#[cfg(test)]
mod tests {
    use unsloth_core::{Category, Tensor, ops::rms_norm};

    use crate::simd::BLOCK;

    /// A long row, and more rows than one part holds, against plain f64 loops.
    #[test]
    fn long_rows_and_several_parts() {
        let device = crate::device();
        let (rows, hidden_size) = (67, 2 * BLOCK + 3);
        let values = |salt: usize, len: usize| -> Vec<f32> {
            (0..len).map(|i| ((i * 37 + salt) % 101) as f32 / 50.0 - 1.0).collect()
        };
        let (x, dout, weight) = (values(1, rows * hidden_size), values(5, rows * hidden_size), values(9, hidden_size));
        let tensor = |data: &[f32], shape: &[usize]| -> Tensor {
            device.from_slice(data, unsloth_core::Shape::try_from(shape).unwrap(), Category::Activations).unwrap()
        };
        let (xt, wt) = (tensor(&x, &[rows, hidden_size]), tensor(&weight, &[hidden_size]));
        let forward = rms_norm::forward(xt.clone(), None, &wt, 1e-5, 0.0).unwrap();
        let mut dweight = tensor(&vec![1.0; hidden_size], &[hidden_size]);
        let backward = rms_norm::Backward {
            dout: tensor(&dout, &[rows, hidden_size]),
            dsum: None,
            sum: &xt,
            weight: &wt,
            rstd: &forward.rstd,
        };
        let dx = rms_norm::backward(backward, Some(&mut dweight), 1e-5, 0.0).unwrap().to_vec::<f32>().unwrap();
        let (out, dweight) = (forward.out.to_vec::<f32>().unwrap(), dweight.to_vec::<f32>().unwrap());
        let mut exact_dweight = vec![1.0f64; hidden_size];
        for row in 0..rows {
            let at = |data: &[f32], i: usize| f64::from(data[row * hidden_size + i]);
            let mean_square = (0..hidden_size).map(|i| at(&x, i).powi(2)).sum::<f64>() / hidden_size as f64;
            let rstd = 1.0 / (mean_square + 1e-5).sqrt();
            let g = |i: usize| at(&dout, i) * f64::from(weight[i]);
            let mean = (0..hidden_size).map(|i| g(i) * at(&x, i) * rstd).sum::<f64>() / hidden_size as f64;
            for i in 0..hidden_size {
                let xhat = at(&x, i) * rstd;
                exact_dweight[i] += at(&dout, i) * xhat;
                assert!((at(&out, i) - xhat * f64::from(weight[i])).abs() < 1e-6);
                assert!((at(&dx, i) - rstd * (g(i) - xhat * mean)).abs() < 1e-6);
            }
        }
        for (actual, exact) in dweight.iter().zip(exact_dweight) {
            assert!((f64::from(*actual) - exact).abs() < 1e-4);
        }
    }
}
