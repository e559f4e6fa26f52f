//! Embedding: hidden sizes that vectors divide, and an odd one.

use unsloth_core::{DType, Result, ops::embedding};

use super::{Caller, dtype_pairs};

const HIDDEN_SIZES: [usize; 2] = [4096, 65];
const VOCAB_SIZE: usize = 1024;
const TOKENS: usize = 512;

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for hidden_size in HIDDEN_SIZES {
        let ids = caller.tensor(DType::I32, [TOKENS])?;
        let table = [VOCAB_SIZE, hidden_size];
        for (dtype, weight_dtype) in dtype_pairs() {
            let weight = caller.device.prepare_weight(caller.tensor(weight_dtype, table)?)?;
            let detail = format!("forward [{VOCAB_SIZE}, {hidden_size}] {weight_dtype} to {dtype}");
            caller.call(detail, || embedding::forward(&weight, &ids, dtype));
        }
        for dtype in DType::FLOATS {
            let dout = caller.tensor(dtype, [TOKENS, hidden_size])?;
            let mut dweight = caller.tensor(DType::F32, table)?;
            let detail = format!("backward [{VOCAB_SIZE}, {hidden_size}] {dtype}");
            caller.call(detail, || embedding::backward(&ids, &dout, &mut dweight));
        }
    }
    Ok(())
}
