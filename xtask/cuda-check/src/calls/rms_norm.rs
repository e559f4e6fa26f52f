//! RMSNorm: rows of the sizes in [`super::ROW_SIZES`].

use unsloth_core::{DType, Result, ops::rms_norm};

use super::{Caller, SUMMED_ROWS, rows};

const ROWS: usize = 512;
const EPS: f32 = 1e-5;

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for (hidden_size, (dtype, weight_dtype)) in rows() {
        let row = [ROWS, hidden_size];
        let detail = |what: &str| format!("{what} [{ROWS}, {hidden_size}] {dtype}, weight {weight_dtype}");
        let weight = caller.tensor(weight_dtype, [hidden_size])?;
        let x = caller.tensor(dtype, row)?;
        caller.call(detail("forward"), || rms_norm::forward(x.clone(), None, &weight, EPS, 0.0));
        let sum = caller.tensor(dtype, row)?;
        caller.call(detail("forward with residual"), || rms_norm::forward(sum, Some(&x), &weight, EPS, 0.0));
        let rstd = caller.tensor(DType::F32, [ROWS])?;
        for dsum in [None, Some(&x)] {
            let dout = caller.tensor(dtype, row)?;
            let mut dweight = caller.tensor(DType::F32, [hidden_size])?;
            let inputs = rms_norm::Backward { dout, dsum, sum: &x, weight: &weight, rstd: &rstd };
            let what = if dsum.is_some() { "backward with dsum" } else { "backward" };
            caller.call(detail(what), || rms_norm::backward(inputs, Some(&mut dweight), EPS, 0.0));
            let inputs =
                rms_norm::Backward { dout: caller.tensor(dtype, row)?, dsum, sum: &x, weight: &weight, rstd: &rstd };
            let frozen = format!("{what}, frozen");
            caller.call(detail(&frozen), || rms_norm::backward(inputs, None, EPS, 0.0));
        }
    }
    for rows in SUMMED_ROWS {
        let (weight, x) = (caller.tensor(DType::F32, [64])?, caller.tensor(DType::F32, [rows, 64])?);
        let (dout, rstd) = (caller.tensor(DType::F32, [rows, 64])?, caller.tensor(DType::F32, [rows])?);
        let mut dweight = caller.tensor(DType::F32, [64])?;
        let inputs = rms_norm::Backward { dout, dsum: None, sum: &x, weight: &weight, rstd: &rstd };
        let detail = format!("backward [{rows}, 64] f32, weight f32");
        caller.call(detail, || rms_norm::backward(inputs, Some(&mut dweight), EPS, 0.0));
    }
    Ok(())
}
