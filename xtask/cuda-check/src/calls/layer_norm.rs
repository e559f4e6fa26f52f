//! LayerNorm: rows of the sizes in [`super::ROW_SIZES`].

use unsloth_core::{
    DType, Result,
    ops::layer_norm::{self, Affine, Backward, ParameterGradients},
};

use super::{Caller, rows};

const ROWS: usize = 512;
const EPS: f32 = 1e-5;

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
        for dsum in [None, Some(&x)] {
            let (dout, mean, rstd) = (caller.tensor(dtype, row)?, &statistic, &statistic);
            let inputs = Backward { dout, dsum, sum: &x, weight: &weight, mean, rstd };
            let what = if dsum.is_some() { "backward with dsum" } else { "backward" };
            let [dweight, dbias] = gradients.each_mut();
            let wanted = ParameterGradients { dweight: Some(dweight), dbias: dsum.is_none().then_some(dbias) };
            caller.call(detail(what), || layer_norm::backward(inputs, wanted, EPS));
        }
    }
    Ok(())
}
