//! Trained lengths of rows: sizes of models, even and odd ones.

use unsloth_core::{
    DType, Result,
    ops::dora::{self, Lengths},
};

use super::{Caller, dtype_pairs};

/// `rows`, `in_features`, `out_features`, `rank`.
const SIZES: [[usize; 4]; 3] = [[512, 4096, 4096, 16], [65, 98, 34, 6], [65, 97, 33, 5]];

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for [rows, in_features, out_features, rank] in SIZES {
        let vector = || caller.tensor(DType::F32, [out_features]);
        let (magnitude, norms, mut dmagnitude) = (vector()?, vector()?, vector()?);
        let lengths = Lengths { magnitude: &magnitude, norms: &norms };
        for weight_dtype in DType::FLOATS {
            let weight = caller.tensor(weight_dtype, [out_features, in_features])?;
            let weight = caller.device.prepare_weight(weight)?;
            let lora_a = caller.tensor(DType::F32, [rank, in_features])?;
            let lora_b = caller.tensor(DType::F32, [out_features, rank])?;
            let detail = format!("norms {in_features} -> {out_features}, rank {rank}, weight {weight_dtype}");
            caller.call(detail, || dora::norms(&weight, &lora_a, &lora_b, 2.0));
        }
        for (dtype, bias_dtype) in dtype_pairs() {
            let (t, dy) = (caller.tensor(dtype, [rows, out_features])?, caller.tensor(dtype, [rows, out_features])?);
            let bias = caller.tensor(bias_dtype, [out_features])?;
            let detail = |what: &str| format!("{what} [{rows}, {out_features}] {dtype}, bias {bias_dtype}");
            caller.call(detail("forward"), || dora::forward(&t, lengths, Some(&bias)));
            caller.call(detail("forward without bias"), || dora::forward(&t, lengths, None));
            caller.call(detail("backward"), || dora::backward(dy, &t, lengths, Some(&mut dmagnitude)));
        }
    }
    Ok(())
}
