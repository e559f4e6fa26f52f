//! Linear layers: many rows, as in training, few, as in generation, odd sizes, and sums of more terms than tensor cores add at once.

use unsloth_core::{DType, Result, ops::linear};
use unsloth_cube::{Choosing, product_kernels};

use super::{Caller, dtype_pairs};

/// `rows`, `in_features`, `out_features`.
const SIZES: [[usize; 3]; 6] =
    [[512, 4096, 4096], [1, 4096, 4096], [65, 97, 33], [1, 97, 33], [4104, 4104, 4104], [16, 4104, 4104]];

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for [rows, in_features, out_features] in SIZES {
        let size = format!("{rows} x {in_features} -> {out_features}");
        for (dtype, weight_dtype) in dtype_pairs() {
            let weight = caller.tensor(weight_dtype, [out_features, in_features])?;
            let weight = caller.device.prepare_weight(weight)?;
            let x = caller.tensor(dtype, [rows, in_features])?;
            let dy = caller.tensor(dtype, [rows, out_features])?;
            let bias = caller.tensor(weight_dtype, [out_features])?;
            let detail = |what: &str| format!("{what} {size} {dtype}, weight {weight_dtype}");
            caller.call(detail("forward"), || linear::forward(&x, &weight, None));
            caller.call(detail("forward with bias"), || linear::forward(&x, &weight, Some(&bias)));
            caller.call(detail("input gradient"), || linear::input_gradient(&dy, &weight));
        }
        for dtype in DType::FLOATS {
            let x = caller.tensor(dtype, [rows, in_features])?;
            let dy = caller.tensor(dtype, [rows, out_features])?;
            let mut dweight = caller.tensor(DType::F32, [out_features, in_features])?;
            let mut dbias = caller.tensor(DType::F32, [out_features])?;
            let detail = |what: &str| format!("{what} {size} {dtype}");
            caller.call(detail("weight gradient"), || linear::weight_gradient(&dy, &x, &mut dweight));
            caller.call(detail("bias gradient"), || linear::bias_gradient(&dy, &mut dbias));
        }
    }
    Ok(())
}

/// Products that are measured on a card, by each kernel that takes part: forward and backward, in whole and in odd sizes.
pub(super) fn every_kernel(caller: &mut Caller) -> Result<()> {
    for kernel in product_kernels() {
        caller.choose(Choosing::Always(kernel.clone()))?;
        for [rows, in_features, out_features] in [[512, 4096, 4096], [200, 896, 4864]] {
            for dtype in DType::FLOATS {
                let weight = caller.tensor(dtype, [out_features, in_features])?;
                let weight = caller.device.prepare_weight(weight)?;
                let x = caller.tensor(dtype, [rows, in_features])?;
                let dy = caller.tensor(dtype, [rows, out_features])?;
                let detail = |what: &str| format!("{kernel}, {what} {rows} x {in_features} -> {out_features} {dtype}");
                caller.call(detail("forward"), || linear::forward(&x, &weight, None));
                caller.call(detail("input gradient"), || linear::input_gradient(&dy, &weight));
            }
        }
    }
    caller.choose(Choosing::ByRule)
}
