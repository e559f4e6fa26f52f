//! LoRA linear: many rows, as in training, few, as in generation, even and odd sizes, and sums of more terms than tensor cores add at
//! once; and each kernel that may be measured to be the fastest.

use unsloth_core::{
    DType, Result,
    ops::lora_linear::{self, Adapter, Backward, Dropout, ParameterGradients, RowDropout},
    rng::Philox,
};

use unsloth_cube::{Choosing, product_kernels};

use super::{Caller, dtype_pairs};

/// `rows`, `in_features`, `out_features`, `rank`.
const SIZES: [[usize; 4]; 5] =
    [[512, 4096, 4096, 16], [1, 4096, 4096, 16], [65, 98, 34, 6], [65, 97, 33, 5], [4104, 4104, 4104, 16]];

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for [rows, in_features, out_features, rank] in SIZES {
        for (dtype, weight_dtype) in dtype_pairs() {
            // Adapters are f32, or of the activations' type.
            let adapters = if dtype == DType::F32 { vec![DType::F32] } else { vec![DType::F32, dtype] };
            for adapter_dtype in adapters {
                let weight = caller.tensor(weight_dtype, [out_features, in_features])?;
                let weight = caller.device.prepare_weight(weight)?;
                let bias = caller.tensor(weight_dtype, [out_features])?;
                let x = caller.tensor(dtype, [rows, in_features])?;
                let dy = caller.tensor(dtype, [rows, out_features])?;
                let h = caller.tensor(DType::F32, [rows, rank])?;
                let lora_a = caller.tensor(adapter_dtype, [rank, in_features])?;
                let lora_b = caller.tensor(adapter_dtype, [out_features, rank])?;
                let mut dlora_a = caller.tensor(DType::F32, [rank, in_features])?;
                let mut dlora_b = caller.tensor(DType::F32, [out_features, rank])?;
                let adapter = Adapter { lora_a: &lora_a, lora_b: &lora_b, scale: 2.0, dropout: None };
                let counters = caller.tensor(DType::I32, [rows])?;
                let dropout = Dropout { probability: 0.1, stream: Philox::new(0, 0), step: 0 };
                let dropped = RowDropout { dropout, sequences: &counters, positions: &counters };
                let dropped = Adapter { dropout: Some(dropped), ..adapter };
                let inputs = Backward { dy: &dy, x: &x, h: &h, weight: &weight, adapter, needs_dx: true };
                let gradients = ParameterGradients { dlora_a: Some(&mut dlora_a), dlora_b: Some(&mut dlora_b) };
                let size = format!("{rows} x {in_features} -> {out_features}, rank {rank}");
                let detail =
                    |what: &str| format!("{what} {size} {dtype}, weight {weight_dtype}, adapter {adapter_dtype}");
                caller.call(detail("forward"), || lora_linear::forward(&x, &weight, Some(&bias), adapter));
                caller.call(detail("backward"), || lora_linear::backward(inputs, gradients));
                let inputs = Backward { adapter: dropped, ..inputs };
                let gradients = ParameterGradients { dlora_a: Some(&mut dlora_a), dlora_b: None };
                caller.call(detail("forward with dropout"), || lora_linear::forward(&x, &weight, None, dropped));
                caller.call(detail("backward with dropout"), || lora_linear::backward(inputs, gradients));
            }
        }
    }
    Ok(())
}

/// Products with an update that are measured on a card, by each kernel that takes part.
pub(super) fn every_kernel(caller: &mut Caller) -> Result<()> {
    for kernel in product_kernels() {
        caller.choose(Choosing::Always(kernel.clone()))?;
        // Types that some tensor cores or the portable kernel take alike differ in how they are loaded alone.
        let are_kin = |(a, b): &(DType, DType)| a == b || (*a != DType::F16 && *b != DType::F16);
        for (dtype, weight_dtype) in dtype_pairs().filter(are_kin) {
            plain(caller, &kernel, (dtype, weight_dtype, DType::F32))?;
            if dtype == weight_dtype {
                plain(caller, &kernel, (dtype, weight_dtype, dtype))?;
            }
        }
    }
    caller.choose(Choosing::ByRule)
}

/// A layer without bias and dropout, and its input's gradient.
fn plain(caller: &mut Caller, kernel: &str, (dtype, weight_dtype, adapter_dtype): (DType, DType, DType)) -> Result<()> {
    let [rows, in_features, out_features, rank] = SIZES[0];
    let weight = caller.tensor(weight_dtype, [out_features, in_features])?;
    let weight = caller.device.prepare_weight(weight)?;
    let (x, dy) = (caller.tensor(dtype, [rows, in_features])?, caller.tensor(dtype, [rows, out_features])?);
    let h = caller.tensor(DType::F32, [rows, rank])?;
    let lora_a = caller.tensor(adapter_dtype, [rank, in_features])?;
    let lora_b = caller.tensor(adapter_dtype, [out_features, rank])?;
    let adapter = Adapter { lora_a: &lora_a, lora_b: &lora_b, scale: 2.0, dropout: None };
    let inputs = Backward { dy: &dy, x: &x, h: &h, weight: &weight, adapter, needs_dx: true };
    let size = format!("{rows} x {in_features} -> {out_features}, rank {rank}");
    let detail =
        |what: &str| format!("{kernel}, {what} {size} {dtype}, weight {weight_dtype}, adapter {adapter_dtype}");
    caller.call(detail("forward"), || lora_linear::forward(&x, &weight, None, adapter));
    caller.call(detail("backward"), || lora_linear::backward(inputs, ParameterGradients::default()));
    Ok(())
}
