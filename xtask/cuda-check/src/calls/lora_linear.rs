//! LoRA linear: many rows, as in training, few, as in generation, and odd sizes.

use unsloth_core::{
    DType, Result,
    ops::lora_linear::{self, Adapter, Backward, Dropout, ParameterGradients, RowDropout},
    rng::Philox,
};

use super::{Caller, dtype_pairs};

/// `rows`, `in_features`, `out_features`, `rank`.
const SIZES: [[usize; 4]; 3] = [[512, 4096, 4096, 16], [1, 4096, 4096, 16], [65, 97, 33, 5]];

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
