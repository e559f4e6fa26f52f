//! LayerNorm: rows of the sizes in [`super::ROW_SIZES`].

use unsloth_core::{
    DType, Result,
    ops::layer_norm::{self, Affine, Backward, ParameterGradients},
};

use super::{Caller, SUMMED_ROWS, rows};

const ROWS: usize = 512;
const EPS: f32 = 1e-5;

/// Whether there is a second gradient, and whether those of weight and bias are wanted.
const WANTED: [(bool, [bool; 2]); 8] = [
    (false, [true, true]),
    (false, [true, false]),
    (false, [false, true]),
    (false, [false, false]),
    (true, [true, true]),
    (true, [true, false]),
    (true, [false, true]),
    (true, [false, false]),
];

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for (hidden_size, (dtype, weight_dtype)) in rows() {
        let row = [ROWS, hidden_size];
        let detail = |what: &str| format!("{what} [{ROWS}, {hidden_size}] {dtype}, weight {weight_dtype}");
        let (weight, x) = (caller.tensor(weight_dtype, [hidden_size])?, caller.tensor(dtype, row)?);
        let (sum, statistic) = (caller.tensor(dtype, row)?, caller.tensor(DType::F32, [ROWS])?);
        let (plain, affine) = (Affine { weight: &weight, bias: None }, Affine { weight: &weight, bias: Some(&weight) });
        caller.call(detail("forward"), || layer_norm::forward(x.clone(), None, affine, EPS));
        caller.call(detail("forward without bias"), || layer_norm::forward(x.clone(), None, plain, EPS));
        caller.call(detail("forward with residual"), || layer_norm::forward(sum, Some(&x), affine, EPS));
        let mut gradients = [caller.tensor(DType::F32, [hidden_size])?, caller.tensor(DType::F32, [hidden_size])?];
        for (dsum, is_wanted) in WANTED {
            let (dout, mean, rstd) = (caller.tensor(dtype, row)?, &statistic, &statistic);
            let inputs = Backward { dout, dsum: dsum.then_some(&x), sum: &x, weight: &weight, mean, rstd };
            let [dweight, dbias] = gradients.each_mut();
            let wanted =
                ParameterGradients { dweight: is_wanted[0].then_some(dweight), dbias: is_wanted[1].then_some(dbias) };
            let of = match is_wanted {
                [true, true] => "",
                [true, false] => " of the weight",
                [false, true] => " of the bias",
                [false, false] => ", frozen",
            };
            let what = if dsum { "backward with dsum" } else { "backward" };
            caller.call(detail(&format!("{what}{of}")), || layer_norm::backward(inputs, wanted, EPS));
        }
    }
    for rows in SUMMED_ROWS {
        let (weight, x) = (caller.tensor(DType::F32, [64])?, caller.tensor(DType::F32, [rows, 64])?);
        let (dout, statistic) = (caller.tensor(DType::F32, [rows, 64])?, caller.tensor(DType::F32, [rows])?);
        let mut gradients = [caller.tensor(DType::F32, [64])?, caller.tensor(DType::F32, [64])?];
        let [dweight, dbias] = gradients.each_mut();
        let wanted = ParameterGradients { dweight: Some(dweight), dbias: Some(dbias) };
        let inputs = Backward { dout, dsum: None, sum: &x, weight: &weight, mean: &statistic, rstd: &statistic };
        let detail = format!("backward [{rows}, 64] f32, weight f32");
        caller.call(detail, || layer_norm::backward(inputs, wanted, EPS));
    }
    Ok(())
}
